"""Language modeling: predict the next token of a corpus."""

from dataclasses import dataclass, field, fields

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data import (
    ID_ORDERS,
    ContiguousBatches,
    CorpusArguments,
    SequenceBlocks,
    check_at_least,
    read_corpus,
    read_corpus_of,
)
from ..evaluation import HeldOutText, Protocol
from ..evaluation.ngrams import ngram_bits_per_byte
from .task import Task


@dataclass
class LanguageModelingArguments(CorpusArguments):
    """What text to train on, how it is read, and what to continue at the end.

    Raises:
        ValueError: if an argument is out of its range, or arguments do not go together.
    """

    tokenizer: str | None = field(
        default=None, metadata={"help": "An existing tokenizer (folder or Hub name); default: train one of vocab_size."}
    )
    id_order: str = field(
        default="frequency",
        metadata={
            "help": "Ids of words by falling frequency (as Transformer-XL) or by appearance (as TrellisNet). An "
            "existing tokenizer has its own."
        },
    )
    sequence_length: int = field(default=128, metadata={"help": "Predicted tokens per training sequence."})
    carry_memory: bool = field(
        default=False,
        metadata={
            "help": "Read the text as batch_size contiguous streams and hand the model's memory of each sequence on to "
            "the next (truncated backpropagation through time); validation does so too."
        },
    )
    sample_prompt: str = field(default="The ", metadata={"help": "Prompt of the text sample at the end."})
    sample_tokens: int = field(default=80, metadata={"help": "Tokens of the text sample at the end; 0 for no sample."})

    def __post_init__(self):
        super().__post_init__()
        if self.id_order not in ID_ORDERS:
            raise ValueError(f"id_order must be one of {', '.join(ID_ORDERS)}, got {self.id_order!r}.")
        if self.id_order != "frequency" and not self.word_level:
            raise ValueError(f"id_order={self.id_order!r} orders words: set word_level, or leave id_order out.")
        check_at_least(1, sequence_length=self.sequence_length)
        check_at_least(0, sample_tokens=self.sample_tokens)
        if self.sample_tokens and not self.sample_prompt:
            raise ValueError(
                "sample_prompt is empty: give the sample something to continue, or set sample_tokens to 0."
            )


@dataclass
class TextArguments(CorpusArguments):
    """Which text to evaluate on, and how it is read; by default as in training."""

    corpus: str | None = field(
        default=None, metadata={"help": "As for training; default: what the model was trained on."}
    )
    word_level: bool | None = field(
        default=None, metadata={"help": "Read lines of whitespace-separated words; default: as in training."}
    )
    split: str = field(default="validation", metadata={"help": "Split of the corpus: validation, test or train."})
    length: int | None = field(
        default=None,
        metadata={"help": "Tokens per window or segment; default: the sequence length of training, or 128."},
    )
    stride: int | None = field(default=None, metadata={"help": "Tokens a window advances; default: half of it."})
    batch_size: int = field(
        default=16, metadata={"help": "Windows per forward pass; with carried memory, streams (part of the protocol)."}
    )
    carry_memory: bool | None = field(
        default=None, metadata={"help": "Read contiguous streams, handing on the memory; default: as in training."}
    )
    drop_remainder: bool = field(
        default=False,
        metadata={
            "help": "With carried memory: streams of equal length, without the remainder and without predicting the "
            "first token of each, as the literature's code does."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, length=self.length, stride=self.stride, batch_size=self.batch_size)

    def protocol(self, recipe: dict) -> Protocol:
        """How the text is read: as asked for, or else as in training."""
        length = recipe.get("sequence_length", 128) if self.length is None else self.length
        carry_memory = recipe.get("carry_memory", False) if self.carry_memory is None else self.carry_memory
        return Protocol(length, self.stride, self.batch_size, carry_memory, self.drop_remainder)


class LanguageModeling(Task):
    """Predict the next token of a corpus."""

    name = "language_modeling"
    arguments = LanguageModelingArguments
    evaluation_arguments = TextArguments
    recipe = "tiny"

    tokenizer: PreTrainedTokenizerBase
    held_out: HeldOutText

    def __init__(self, arguments: LanguageModelingArguments, model_fields: dict):
        self.data, self.carries_memory = arguments, arguments.carry_memory
        self.corpus = read_corpus(arguments)
        if arguments.tokenizer:
            self.tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        else:
            self.tokenizer = self.corpus.train_tokenizer(model_fields.get("vocab_size", 2048), arguments.id_order)
        self.train = self.corpus.encode("train", self.tokenizer)
        self.examples = SequenceBlocks(self.train.ids, arguments.sequence_length)
        self.held_out = HeldOutText(
            dataset=self.corpus.title,
            split="validation",
            stream=self.corpus.encode("validation", self.tokenizer),
            start_id=self.tokenizer.eos_token_id,
            protocol=Protocol(length=arguments.sequence_length, carry_memory=arguments.carry_memory),
        )
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.model_fields = {"vocab_size": len(self.tokenizer)} | special
        self.recorded = {"corpus_fingerprint": self.corpus.fingerprint}

    @classmethod
    def judge(cls, folder, recipe, arguments):
        return held_out_text(folder, recipe, arguments)

    def __str__(self) -> str:
        return (
            f"{self.corpus.name} ({self.corpus.fingerprint}): {len(self.train.ids):,} training and "
            f"{len(self.held_out.stream.ids):,} validation tokens of {len(self.tokenizer):,} kinds"
        )

    def batches(self, steps, rows, pieces, seed):
        if not self.carries_memory:
            return super().batches(steps, rows, pieces, seed)
        return ContiguousBatches(len(self.examples), rows, pieces, steps.start, steps.stop)

    def baselines(self):
        """Bits per byte of n-gram models on the same tokens; none if these do not spell the text."""
        if self.held_out.stream.num_unknown:
            return {}
        names, start = ("unigram", "bigram", "trigram"), self.tokenizer.eos_token_id
        streams, size = (self.train, self.held_out.stream), len(self.tokenizer)
        return {
            f"bits_per_byte_{name}": ngram_bits_per_byte(*streams, start, size, order)
            for order, name in enumerate(names, start=1)
        }

    def describe(self, scores, baselines, config):
        per_token = f"perplexity {scores['perplexity']:.2f} per token"
        read = f"over {scores['num_tokens']:,} tokens ({self.held_out.how(config)})"
        if unknown := self.held_out.stream.num_unknown:
            return (
                f"{per_token} {read}\n"
                f"no score per word or byte: {unknown:,} words are not in the vocabulary, and <unk> stands for them"
            )
        grams = ", ".join(f"{name.removeprefix('bits_per_byte_')} {bits:.3f}" for name, bits in baselines.items())
        return (
            f"{per_token}, {scores['word_perplexity']:.1f} per word; "
            f"{scores['bits_per_byte']:.3f} bits per byte {read}\n"
            f"n-grams (Witten-Bell) on the same tokens: {grams} bits per byte"
        )

    def save(self, folder, config):
        self.tokenizer.model_max_length = getattr(config, "max_position_embeddings", self.tokenizer.model_max_length)
        self.tokenizer.save_pretrained(folder)

    @property
    def sample_length(self):
        return self.data.sample_tokens and len(self.tokenizer(self.prompt)["input_ids"]) + self.data.sample_tokens

    @property
    def prompt(self) -> str:
        """The sample prompt. Of words, only those that the vocabulary has, at the start of a line."""
        if not self.data.word_level:
            return self.data.sample_prompt
        known = self.tokenizer.get_vocab()
        return "\n" + " ".join(word for word in self.data.sample_prompt.split() if word in known)

    def sample(self, model):
        """What the model continues the sample prompt with."""
        if not self.data.sample_tokens:
            return None
        inputs = self.tokenizer(self.prompt, return_tensors="pt").to(model.device)
        sampling = dict(do_sample=True, top_p=0.9, temperature=0.8)
        ids = model.generate(**inputs, max_new_tokens=self.data.sample_tokens, **sampling)
        return self.tokenizer.decode(ids[0], skip_special_tokens=not self.data.word_level)  # <unk>, <eos> are words


def held_out_text(folder: str, recipe: dict, arguments: TextArguments | None = None) -> HeldOutText:
    """The text to evaluate a language model on.

    Args:
        folder: of the model, with its tokenizer.
        recipe: that it was trained by, see `read_recipe`.
        arguments: which text and how it is read, if not as in training.

    Raises:
        ValueError: if the corpus is missing, has no such split, or cannot be read in this way.
    """
    arguments = arguments or TextArguments()
    protocol, tokenizer = arguments.protocol(recipe), AutoTokenizer.from_pretrained(folder)
    corpus = read_corpus_of(recipe, {one.name: getattr(arguments, one.name) for one in fields(CorpusArguments)})
    stream = corpus.encode(arguments.split, tokenizer)
    return HeldOutText(corpus.title, arguments.split, stream, tokenizer.eos_token_id, protocol)
