"""Text to batches of token ids: corpora by name, tokenizers, contiguous sequences.

    corpus = load_corpus("cpython_docs")                # DatasetDict with "train" and "validation"
    tokenizer = train_tokenizer(corpus["train"], 2048)  # byte-level BPE
    stream = encode_corpus(corpus["train"], tokenizer)  # one long tensor of ids
    blocks = SequenceBlocks(stream.ids, length=128)     # a torch dataset for any DataLoader

A corpus is a `datasets.DatasetDict` with one document per row in the column `text`.
"""

import ast
import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BUILT_IN_CORPUS = "cpython_docs"
END_OF_TEXT = "<|endoftext|>"

# One document in so many goes to the validation part, chosen by a hash of its name.
VALIDATION_SHARE = 10

DOCUMENTS_PER_BATCH = 1000

# Of the standard library, what is not documentation for its users.
LEFT_OUT_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "ensurepip",
}


def load_corpus(name: str, config_name: str | None = None, validation_file: str | None = None) -> DatasetDict:
    """A corpus by name, with the splits `train` and `validation`.

    Args:
        name: `"cpython_docs"` (built in: the English documentation inside the running Python), a
            local text file, or what `datasets.load_dataset` takes: a dataset on the Hub, such as
            `"Salesforce/wikitext"`, or a local folder.
        config_name: configuration of a Hub dataset, such as `"wikitext-2-raw-v1"`.
        validation_file: text file to validate on; without it the last tenth of a local file is held out.

    Raises:
        ValueError: a local path that is not there, a dataset without `text`, `train` or `validation`.
    """
    if name == BUILT_IN_CORPUS:
        return _cpython_docs()
    if Path(name).is_file():
        return _local_text(name, validation_file)
    looks_local = Path(name).suffix in (".txt", ".text", ".md") or name.startswith((".", "/", "~"))
    if looks_local and not Path(name).exists():
        raise ValueError(f"corpus {name!r} looks like a local file, but there is no such file.")
    return _checked_hub_corpus(load_dataset(name, config_name), name)


def corpus_fingerprint(corpus: DatasetDict) -> str:
    """Twelve hexadecimal digits that change with any character of any split, for logs and cards."""
    digest = hashlib.sha256()
    for split in sorted(corpus):
        for texts in batches_of_documents(corpus[split], f"fingerprint of {split}"):
            for text in texts:
                digest.update(f"{split}\0{len(text)}\0{text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:12]


def with_progress(items, doing: str, total: int | None = None) -> tqdm:
    """The items, and a bar if working on them takes over five seconds; of several processes in the first alone."""
    elsewhere = int(os.environ.get("LOCAL_RANK", 0)) > 0
    return tqdm(items, desc=doing, total=total, leave=False, delay=5, disable=elsewhere)


def batches_of_documents(split: Dataset, doing: str) -> Iterator[list[str]]:
    """The column `text` in batches, with progress: by row it takes ten times as long."""
    batches = split.iter(batch_size=DOCUMENTS_PER_BATCH)
    total = -(-len(split) // DOCUMENTS_PER_BATCH)
    for batch in with_progress(batches, doing, total):
        yield batch["text"]


def train_tokenizer(split: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a split; its first token ends and pads texts.

    Args:
        split: documents in the column `text`.
        vocab_size: at least 257 (every byte and the end of text).
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size must be at least 257 for byte-level BPE (256 bytes and end of text), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(with_progress(split["text"], "train tokenizer"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


@dataclass(frozen=True)
class TokenStream:
    """A split as one stream of ids, each document followed by an end-of-text token.

    Attributes:
        ids: `(tokens,)`, int64.
        num_bytes, num_words: UTF-8 bytes and whitespace-separated words of the text, so that
            perplexities of different tokenizers can be compared.
    """

    ids: Tensor
    num_bytes: int
    num_words: int


def encode_corpus(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Tokenize and join the documents of a split.

    Raises:
        ValueError: the split is empty or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, which separates documents: set tokenizer.eos_token.")
    pieces, num_bytes, num_words = [], 0, 0
    for batch in batches_of_documents(split, "tokenize"):
        texts = [text for text in batch if text]
        if not texts:
            continue
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        pieces += [np.array([*document, tokenizer.eos_token_id], dtype=np.int64) for document in encoded]
        num_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        num_words += sum(len(text.split()) for text in texts)
    if not pieces:
        raise ValueError("The corpus has no text in this split.")
    return TokenStream(torch.from_numpy(np.concatenate(pieces)), num_bytes, num_words)


class SequenceBlocks(torch.utils.data.Dataset):
    """A stream cut into contiguous blocks of `length` inputs; `labels` are the ids that follow each.

    Raises:
        ValueError: the stream is shorter than one block.
    """

    def __init__(self, ids: Tensor, length: int):
        if len(ids) < length + 1:
            raise ValueError(
                f"The corpus has {len(ids)} tokens, less than one sequence of {length} + 1: use more text or a smaller "
                "sequence_length."
            )
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.length
        ids = self.ids[start : start + self.length + 1]
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class ContiguousBatches(torch.utils.data.Sampler):
    """Index batches of steps `first` to `last` for `rows` parallel streams: a row's next block continues its last.

    Row r of step k is block r * steps_per_epoch + k % steps_per_epoch; the remainder of the blocks is left out. Each
    step is split into `pieces` batches of neighbouring rows.

    Raises:
        ValueError: there are fewer blocks than rows.
    """

    def __init__(self, num_blocks: int, rows: int, pieces: int, first: int, last: int):
        self.rows, self.first, self.last = rows, first, last
        self.batch_size = rows // pieces
        self.steps_per_epoch = num_blocks // rows
        self.drop_last = True  # accelerate asks; every batch is full
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"The corpus has {num_blocks} sequences, less than one for each of {rows} streams: use more text, a "
                "smaller batch_size or a smaller sequence_length."
            )

    def starts_anew_at(self, step: int) -> bool:
        """Whether that step does not continue the one before it: the streams are at their beginning."""
        return step % self.steps_per_epoch == 0

    def __len__(self) -> int:
        return (self.last - self.first) * (self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            blocks = [row * self.steps_per_epoch + step % self.steps_per_epoch for row in range(self.rows)]
            for start in range(0, self.rows, self.batch_size):
                yield blocks[start : start + self.batch_size]


class StepBatches(torch.utils.data.Sampler):
    """Index batches of steps `first` to `last`: contiguous pieces of seeded permutations, one per epoch."""

    def __init__(self, num_blocks: int, batch_size: int, seed: int, first: int, last: int):
        self.num_blocks, self.batch_size, self.seed, self.first, self.last = num_blocks, batch_size, seed, first, last
        self.drop_last = True  # accelerate asks; every batch is full

    def starts_anew_at(self, step: int) -> bool:
        """Yes: no sequence continues another."""
        return True

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        for position in range(self.first * self.batch_size, self.last * self.batch_size, self.batch_size):
            batch = []
            for place in range(position, position + self.batch_size):
                if place // self.num_blocks != epoch:
                    epoch = place // self.num_blocks
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.num_blocks, generator=generator)
                batch.append(int(order[place % self.num_blocks]))
            yield batch


def _cpython_docs() -> DatasetDict:
    """The documentation that ships inside CPython: the language reference topics and all docstrings.

    Everything is read with `ast`; nothing is imported or run. It differs between Python versions.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for name, text in _documents(Path(sysconfig.get_paths()["stdlib"])):
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        splits["train" if number % VALIDATION_SHARE else "validation"].append(text)
    if not splits["train"]:
        raise ValueError(
            f"No documentation found in the standard library of {sys.executable} (is it zipped or stripped?): "
            "name another corpus."
        )
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in splits.items()})


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every topic of the language reference and of every module, in a fixed order."""
    relatives = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    ours = [
        relative
        for relative in relatives
        if not LEFT_OUT_FOLDERS & set(relative.parts) and not relative.parts[0].startswith("config-")
    ]
    for relative in with_progress(ours, "read documentation"):
        tree = _parse(library / relative)
        if tree is None:
            continue
        if relative.parts[:2] == ("pydoc_data", "topics.py"):
            yield from _topics(tree)
        else:
            docstrings = list(_docstrings(tree))
            if docstrings:
                yield relative.as_posix(), "\n\n".join(docstrings)


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # files that test other encodings or old syntax
        return None


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            topics = ast.literal_eval(node)
            yield from ((f"topic {name}", topics[name]) for name in sorted(topics))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring if isinstance(node, ast.Module) else f"{node.name}: {docstring}"


def _local_text(name: str, validation_file: str | None) -> DatasetDict:
    """Documents are separated by blank lines; a file without any is one document per line."""
    files = {"train": name} | ({"validation": validation_file} if validation_file else {})
    for file in files.values():
        if not Path(file).is_file():
            raise ValueError(f"validation_file {file!r} does not exist.")
    files = {split: as_given(file) for split, file in files.items()}
    corpus = load_dataset("text", data_files=files, sample_by="paragraph")
    if validation_file:
        return corpus
    documents = corpus["train"]
    if len(documents) < VALIDATION_SHARE:
        documents = load_dataset("text", data_files=as_given(name), split="train")
    held_out = max(1, len(documents) // VALIDATION_SHARE)
    if held_out >= len(documents):
        raise ValueError(
            f"{name!r} has {len(documents)} documents, too few to hold out a validation part; give validation_file."
        )
    first = len(documents) - held_out
    return DatasetDict(
        {"train": documents.select(range(first)), "validation": documents.select(range(first, len(documents)))}
    )


def as_given(file: str | Path) -> str:
    """The name of a local file such that `datasets`, to which it is a pattern, finds this file and no other.

    Raises:
        ValueError: the name has a `::`, by which `datasets` means a file within an archive.
    """
    if "::" in str(file):
        raise ValueError(f"{str(file)!r} has '::' in its name, which means a file within an archive: rename it.")
    return glob.escape(str(file))


def _checked_hub_corpus(corpus, name: str) -> DatasetDict:
    missing = [split for split in ("train", "validation") if split not in corpus]
    if missing:
        raise ValueError(f"Dataset {name!r} has no split {missing[0]!r}; it has {sorted(corpus)}.")
    for split in ("train", "validation"):
        if "text" not in corpus[split].column_names:
            raise ValueError(f"Dataset {name!r} has no column 'text'; it has {corpus[split].column_names}.")
    return corpus
