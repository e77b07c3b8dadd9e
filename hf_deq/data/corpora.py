"""A corpus: its splits, how they become tokens, and a fingerprint.

    corpus = read_corpus(CorpusArguments("cpython_docs"))          # also a text file, or a dataset on the Hub
    tokenizer = corpus.train_tokenizer(vocab_size=2048)
    stream = corpus.encode("validation", tokenizer)                # one long tensor of ids

The same four arguments name a corpus everywhere: in a recipe, on the command line and in lm-eval.
"""

import hashlib
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from .cpython_docs import VALIDATION_SHARE, cpython_docs
from .documents import as_given, batches_of_documents
from .tokens import TokenStream, encode_documents, train_tokenizer
from .words import KnownCorpus, check_counts, encode_words, known_corpus, train_word_tokenizer, word_files

logger = logging.get_logger(__name__)

BUILT_IN_CORPORA = {"cpython_docs": cpython_docs}  # by name, what reads them
DEFAULT_CORPUS = "cpython_docs"
TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass
class CorpusArguments:
    """Which text, and whether it is read word by word.

    Raises:
        ValueError: if arguments do not go together.
    """

    corpus: str = field(
        default=DEFAULT_CORPUS,
        metadata={
            "help": "cpython_docs (built in, no network), a local text file, or a Hub dataset; with word_level a local "
            "folder of train.txt, valid.txt and test.txt, or a Hub dataset of lines."
        },
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    validation_file: str | None = field(default=None, metadata={"help": "Local text file to validate on."})
    word_level: bool = field(
        default=False,
        metadata={
            "help": "Whitespace-separated words as tokens, one <eos> a line, vocabulary of the training files, as the "
            "paper reads Penn Treebank and WikiText-103."
        },
    )

    def __post_init__(self):
        if self.word_level and self.validation_file:
            raise ValueError(
                f"validation_file={self.validation_file!r} goes with a single text file: with word_level put valid.txt "
                "into the folder that corpus names."
            )


@dataclass(frozen=True)
class Corpus:
    """A text in parts.

    Attributes:
        name: what was asked for.
        splits: documents in the column `text` of each split; with `word_level` lines.
        word_level: whether tokens are words. Otherwise a tokenizer decides.
        known: the published corpus that this one claims to be, if any.
    """

    name: str
    splits: DatasetDict
    word_level: bool = False
    known: KnownCorpus | None = None

    @property
    def title(self) -> str:
        """The name without a place on this machine, for logs and cards."""
        return Path(self.name).name if is_local(self.name) else self.name

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with any character of any split, for logs and cards."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            for texts in batches_of_documents(self.splits[split], f"fingerprint of {split}"):
                for text in texts:
                    digest.update(f"{split}\0{len(text)}\0{text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:12]

    def split(self, name: str) -> Dataset:
        """One of the splits.

        Raises:
            ValueError: if there is no such split.
        """
        if name not in self.splits:
            raise ValueError(f"the corpus has no split {name!r}; it has {sorted(self.splits)}.")
        return self.splits[name]

    def train_tokenizer(self, vocab_size: int, id_order: str = "frequency") -> PreTrainedTokenizerFast:
        """Make a tokenizer of this corpus.

        Args:
            vocab_size: number of tokens. With `word_level` every word is a token, and this number does not count.
            id_order: the order of words, see `train_word_tokenizer`.
        """
        if self.word_level:
            return train_word_tokenizer(self.splits, id_order, self.known)
        return train_tokenizer(self.splits["train"], vocab_size)

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
        """Return a split as one stream of ids.

        Raises:
            ValueError: if there is no such split, or the tokenizer cannot encode it.
        """
        return (encode_words if self.word_level else encode_documents)(self.split(split), tokenizer)


def read_corpus(where: CorpusArguments) -> Corpus:
    """Read a corpus, with the splits `train` and `validation` at least.

    Args:
        where: `corpus` is `"cpython_docs"` (built in), a local text file, or a name that `datasets.load_dataset` takes:
            a dataset on the Hub such as `"Salesforce/wikitext"`, or a local folder. Without a `validation_file`, the
            last tenth of a local file is held out. With `word_level`, a local folder has `train.txt`, `valid.txt` and
            `test.txt` (or `wiki.train.tokens`, `ptb.train.txt` and so on).

    Raises:
        ValueError: if a local file is missing, the dataset has no `text`, `train` or `validation`, or the corpus is
            called Penn Treebank or WikiText-103 and does not have its number of tokens.
    """
    name = where.corpus
    if not where.word_level:
        return Corpus(name, _read_documents(name, where.corpus_config, where.validation_file))
    if Path(name).is_file():
        raise ValueError(
            f"corpus {name!r} is a file: word_level reads a folder with train.txt, valid.txt and test.txt, or a Hub "
            "dataset of lines."
        )
    files = {split: as_given(file) for split, file in word_files(Path(name)).items()}
    splits = load_dataset("text", data_files=files) if files else _read_documents(name, where.corpus_config)
    known = known_corpus(name, where.corpus_config)
    if known is not None:
        check_counts(known, splits, name)
    return Corpus(name, splits, word_level=True, known=known)


def read_corpus_of(recipe: dict, given: dict) -> Corpus:
    """Read the corpus that a model was trained on, or another one to evaluate it on.

    A warning says if no recipe names the corpus, or if the corpus is not the one of the training.

    Args:
        recipe: of the model, see `read_recipe`.
        given: fields of `CorpusArguments`; what is missing or `None` is as in training. If a `corpus` is given, only
            `word_level` is.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "corpus" not in given | recipe:
        logger.warning("No recipe says what the model was trained on; this is the built-in corpus.")
    inherited = ("word_level",) if "corpus" in given else [one.name for one in fields(CorpusArguments)]
    trained = {name: recipe[name] for name in inherited if recipe.get(name) is not None}
    corpus = read_corpus(CorpusArguments(**(trained | given)))
    trained_on = recipe.get("corpus_fingerprint")
    if "corpus" not in given and trained_on and corpus.fingerprint != trained_on:
        logger.warning(
            f"This corpus ({corpus.fingerprint}) is not the one the model was trained on ({trained_on}); the built-in "
            "one differs between Python versions, and parts of it may have been trained on."
        )
    return corpus


def is_local(name: str) -> bool:
    """Whether the name of a corpus or tokenizer means a file or folder, which may be missing."""
    if name in BUILT_IN_CORPORA:
        return False
    return name.startswith((".", "/", "~")) or Path(name).suffix in TEXT_SUFFIXES or Path(name).exists()


def _read_documents(name: str, config_name: str | None = None, validation_file: str | None = None) -> DatasetDict:
    if name in BUILT_IN_CORPORA:
        return BUILT_IN_CORPORA[name]()
    if Path(name).is_file():
        return _local_text(name, validation_file)
    if is_local(name) and not Path(name).exists():
        raise ValueError(f"corpus {name!r} looks like a local file, but there is no such file.")
    return _checked(load_dataset(name, config_name), name)


def _local_text(name: str, validation_file: str | None) -> DatasetDict:
    """Blank lines separate documents. In a file without blank lines every line is a document."""
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


def _checked(corpus: DatasetDict, name: str) -> DatasetDict:
    missing = [split for split in ("train", "validation") if split not in corpus]
    if missing:
        raise ValueError(f"Dataset {name!r} has no split {missing[0]!r}; it has {sorted(corpus)}.")
    for split in ("train", "validation"):
        if "text" not in corpus[split].column_names:
            raise ValueError(f"Dataset {name!r} has no column 'text'; it has {corpus[split].column_names}.")
    return corpus
