"""What there is to learn: examples to train on, a validation, and words for its result.

    task = make_task(DataArguments(), {"hidden_size": 192})           # a language model of a corpus
    task = make_task(CopyMemoryArguments(copy_delay=50), {...})       # the copy memory task

A task gives `examples` (a dataset of `input_ids` and the `labels` of the same positions), sampled by
`batches`, and the fields that a model's configuration must have; `validate` returns numbers, `describe` says them.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .copy_memory import CLASSES, SYMBOLS, CopyMemory
from .data import (
    BUILT_IN_CORPUS,
    ContiguousBatches,
    SequenceBlocks,
    StepBatches,
    TokenStream,
    corpus_fingerprint,
    encode_corpus,
    load_corpus,
    train_tokenizer,
)
from .evaluation import evaluate_perplexity, evaluating, protocol, solver_settings
from .generation_deq import REPORTED
from .ngrams import ngram_bits_per_byte
from .position_algebra import widest_dtype
from .training_arguments import CopyMemoryArguments, DataArguments, TrainingArguments
from .word_level import encode_words, known_corpus, load_word_corpus, train_word_tokenizer


class LanguageModeling:
    """Predict the next token of a corpus.

    Args:
        data: the corpus and how it is read.
        model_fields: of the model's configuration; `vocab_size` is that of a tokenizer to be trained. With word_level
            the vocabulary is as large as the corpus makes it.
    """

    def __init__(self, data: DataArguments, model_fields: dict):
        self.data = data
        corpus = read_corpus(data)
        self.fingerprint = corpus_fingerprint(corpus)
        if data.tokenizer:
            self.tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
        elif data.word_level:
            known = known_corpus(data.corpus, data.corpus_config)
            self.tokenizer = train_word_tokenizer(corpus, data.id_order, known)
        else:
            self.tokenizer = train_tokenizer(corpus["train"], model_fields.get("vocab_size", 2048))
        encode = encode_words if data.word_level else encode_corpus
        self.train, self.validation = (encode(corpus[split], self.tokenizer) for split in ("train", "validation"))
        self.examples = SequenceBlocks(self.train.ids, data.sequence_length)
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.model_fields = {"vocab_size": len(self.tokenizer)} | special
        self.recipe = {"corpus_fingerprint": self.fingerprint}
        self.config = None  # of the model that is to learn this

    def __str__(self) -> str:
        return (
            f"{self.data.corpus} ({self.fingerprint}): {len(self.train.ids):,} training and "
            f"{len(self.validation.ids):,} validation tokens of {len(self.tokenizer):,} kinds"
        )

    def adapt_to(self, config: PreTrainedConfig) -> None:
        """Take note of the model that is to learn this.

        Raises:
            ValueError: memory is to be carried, and the model has none.
        """
        if self.data.carry_memory and getattr(config, "memory_length", None) == 0:
            raise ValueError("carry_memory needs a model that remembers: set memory_length, say to sequence_length.")
        self.config = config
        self.tokenizer.model_max_length = getattr(config, "max_position_embeddings", self.tokenizer.model_max_length)

    def batches(self, training: TrainingArguments, first_step: int) -> ContiguousBatches | StepBatches:
        """Indices of the examples of every micro-batch from a step on."""
        if not self.data.carry_memory:
            return _shuffled(self.examples, training, first_step)
        rows, pieces = training.batch_size, training.gradient_accumulation_steps
        return ContiguousBatches(len(self.examples), rows, pieces, first_step, training.max_steps)

    def validate(self, model: PreTrainedModel, accelerator=None) -> dict[str, float]:
        """Perplexity on the validation stream, as in `evaluate_perplexity`, by the protocol that trains."""
        return asdict(
            evaluate_perplexity(
                model,
                self.validation,
                self.tokenizer.eos_token_id,
                **self.protocol,
                accelerator=accelerator,
                progress=True,
            )
        )

    @property
    def protocol(self) -> dict:
        """How the validation stream is read."""
        carry_memory = self.data.carry_memory
        return dict(length=self.data.sequence_length, stride=None, batch_size=16, carry_memory=carry_memory)

    def baselines(self) -> dict[str, float]:
        """Bits per byte of n-gram models on the same tokens."""
        names, start = ("unigram", "bigram", "trigram"), self.tokenizer.eos_token_id
        return {
            f"bits_per_byte_{name}": ngram_bits_per_byte(self.train, self.validation, start, len(self.tokenizer), order)
            for order, name in enumerate(names, start=1)
        }

    def describe(self, metrics: dict[str, float], baselines: dict[str, float]) -> str:
        """Metrics and baselines in a sentence or two."""
        grams = ", ".join(f"{name.removeprefix('bits_per_byte_')} {bits:.3f}" for name, bits in baselines.items())
        return (
            f"perplexity {metrics['perplexity']:.2f} per token, {metrics['word_perplexity']:.1f} per word; "
            f"{metrics['bits_per_byte']:.3f} bits per byte over {metrics['num_tokens']:,} tokens "
            f"({protocol(**self.protocol, memory_length=getattr(self.config, 'memory_length', None))}; "
            f"{solver_settings(self.config)})\n"
            f"n-grams (Witten-Bell) on the same tokens: {grams} bits per byte"
        )

    def save(self, folder: Path) -> None:
        """What a model needs besides itself."""
        self.tokenizer.save_pretrained(folder)

    def prompt(self, training: TrainingArguments) -> str:
        """The sample prompt; of words, those that the vocabulary has, at the start of a line."""
        if not self.data.word_level:
            return training.sample_prompt
        known = self.tokenizer.get_vocab()
        return "\n" + " ".join(word for word in training.sample_prompt.split() if word in known)

    def sample(self, model: PreTrainedModel, training: TrainingArguments) -> str:
        """What the model continues the sample prompt with."""
        inputs = self.tokenizer(self.prompt(training), return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(
            **inputs.to(model.device), max_new_tokens=training.sample_tokens, do_sample=True, top_p=0.9, temperature=0.8
        )
        return self.tokenizer.decode(ids[0], skip_special_tokens=not self.data.word_level)  # <unk>, <eos> are words


class CopyMemoryTask:
    """Recall symbols after a delay; see `copy_memory`.

    Args:
        data: which variant, and how long the delay is.
        model_fields: of the model's configuration; nothing is asked of them.
    """

    def __init__(self, data: CopyMemoryArguments, model_fields: dict):
        self.data = data
        self.examples, self.test = (
            CopyMemory(data.copy_delay, data.copy_variant, split) for split in ("train", "test")
        )
        self.tokenizer = None  # ids are the symbols themselves
        self.model_fields = {"vocab_size": CLASSES}
        self.recipe = {}

    def __str__(self) -> str:
        return (
            f"copy memory, variant {self.data.copy_variant!r}, delay {self.data.copy_delay}: "
            f"{len(self.examples):,} training and {len(self.test):,} test sequences"
        )

    def adapt_to(self, config: PreTrainedConfig) -> None:
        """Any model will do."""

    def batches(self, training: TrainingArguments, first_step: int) -> StepBatches:
        """Indices of the examples of every micro-batch from a step on."""
        return _shuffled(self.examples, training, first_step)

    def validate(self, model: PreTrainedModel, accelerator=None, batch_size: int = 50, **dial) -> dict[str, float]:
        """Loss over all positions of the test sequences, share of the symbols recalled, and the solver's report."""
        rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        mine = torch.utils.data.Subset(self.test, range(rank, len(self.test), processes))
        batches = tqdm(DataLoader(mine, batch_size), desc="evaluate", leave=False, disable=rank > 0)
        with evaluating(model):
            totals = sum(_score(model, batch, dial) for batch in batches)
        if accelerator is not None:
            totals = accelerator.reduce(totals.to(accelerator.device, widest_dtype(accelerator.device))).double().cpu()
        names = ("loss", "recalled", *REPORTED)
        return dict(zip(names, (totals / len(self.test)).tolist(), strict=True))

    def baselines(self) -> dict[str, float]:
        """What a model scores that remembers nothing."""
        return {"memoryless_loss": self.test.memoryless_loss}

    def describe(self, metrics: dict[str, float], baselines: dict[str, float]) -> str:
        """Metrics and baselines in a sentence."""
        return (
            f"loss {metrics['loss']:.2e} nats per position (without a memory {baselines['memoryless_loss']:.2e}); "
            f"{metrics['recalled']:.2%} of the symbols recalled"
        )

    def save(self, folder: Path) -> None:
        """Nothing."""

    def sample(self, model: PreTrainedModel, training: TrainingArguments) -> str:
        """One test sequence: what was to be recalled, and what was."""
        example = self.test[0]
        answer = model(example["input_ids"][None].to(model.device)).logits[0].argmax(-1)
        wanted, given = (ids[-SYMBOLS:].tolist() for ids in (example["labels"], answer))
        return f"to recall {wanted}\nrecalled  {given}"


def read_recipe(model: str | Path) -> dict:
    """What recipe.yaml says in a model's folder or Hub repository; nothing if it is not there."""
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(str(model), "recipe.yaml", **optional)
    return yaml.safe_load(Path(file).read_text()) if file else {}


def read_split(
    split: str,
    recipe: dict,
    corpus: str | None = None,
    corpus_config: str | None = None,
    validation_file: str | None = None,
    word_level: bool | None = None,
) -> tuple[Dataset, bool]:
    """A split to evaluate a model on, and whether it is read word by word.

    Args:
        split: `"validation"`, `"test"` or `"train"`.
        recipe: of the model. What is not given is as there, or else the built-in corpus; of the places nothing is, if
            a corpus is given. A corpus of another fingerprint than in training is said to be one.
        corpus, corpus_config, validation_file, word_level: as in `DataArguments`.

    Raises:
        ValueError: the corpus is not there, or has no such split.
    """
    if corpus is None and "corpus" not in recipe:
        print("note: no recipe says what the model was trained on; this is the built-in corpus.", file=sys.stderr)
    word_level = recipe.get("word_level", False) if word_level is None else word_level
    recipe = recipe if corpus is None else {}
    splits = read_corpus(
        DataArguments(
            corpus=corpus or recipe.get("corpus", BUILT_IN_CORPUS),
            corpus_config=corpus_config or recipe.get("corpus_config"),
            validation_file=validation_file or recipe.get("validation_file"),
            word_level=word_level,
        )
    )
    if split not in splits:
        raise ValueError(f"the corpus has no split {split!r}; it has {sorted(splits)}.")
    trained_on = recipe.get("corpus_fingerprint")
    if trained_on and (fingerprint := corpus_fingerprint(splits)) != trained_on:
        print(
            f"note: this corpus ({fingerprint}) is not the one the model was trained on "
            f"({trained_on}); the built-in one differs between Python versions, and parts of it may "
            "have been trained on.",
            file=sys.stderr,
        )
    return splits[split], word_level


def read_stream(tokenizer: PreTrainedTokenizerBase, split: str, recipe: dict, *where) -> TokenStream:
    """The stream of a split to evaluate a model on; arguments as of `read_split`."""
    texts, word_level = read_split(split, recipe, *where)
    return (encode_words if word_level else encode_corpus)(texts, tokenizer)


def read_corpus(data: DataArguments) -> DatasetDict:
    """The corpus that the arguments name, as documents or as lines of words."""
    if data.word_level:
        return load_word_corpus(data.corpus, data.corpus_config)
    return load_corpus(data.corpus, data.corpus_config, data.validation_file)


def make_task(data: DataArguments | CopyMemoryArguments, model_fields: dict) -> LanguageModeling | CopyMemoryTask:
    """The task that the arguments are for."""
    return (CopyMemoryTask if isinstance(data, CopyMemoryArguments) else LanguageModeling)(data, model_fields)


def _shuffled(examples, training: TrainingArguments, first_step: int) -> StepBatches:
    pieces = training.gradient_accumulation_steps
    return StepBatches(
        len(examples), training.batch_size // pieces, training.seed, first_step * pieces, training.max_steps * pieces
    )


@torch.no_grad()
def _score(model: PreTrainedModel, batch: dict, dial: dict) -> torch.Tensor:
    """Sums over a batch of sequences: mean nats, share of symbols recalled, evaluations, residual, converged."""
    labels, outputs = batch["labels"], model(batch["input_ids"].to(model.device), use_cache=False, **dial)
    logits = outputs.logits.cpu().double()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    recalled = (logits[:, -SYMBOLS:].argmax(-1) == labels[:, -SYMBOLS:]).double().mean(1)
    rows = (nats, recalled, outputs.num_evaluations, outputs.residual, outputs.converged)
    return torch.stack([row.cpu().double().sum() for row in rows])
