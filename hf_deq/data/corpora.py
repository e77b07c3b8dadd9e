"""A corpus: its splits, how they become tokens, and a fingerprint.

    corpus = read_corpus(CorpusArguments("cpython_docs"))          # also a text file, or a dataset on the Hub
    tokenizer = corpus.train_tokenizer(vocab_size=2048)
    stream = corpus.encode("validation", tokenizer)                # one long tensor of ids

The same arguments name a corpus everywhere: in a recipe, on the command line and in lm-eval.
"""

import hashlib
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from .cpython_docs import VALIDATION_SHARE, cpython_docs
from .documents import batches_of_documents
from .files import ROW_FORMATS, read_documents, read_lines
from .tokens import TokenStream, encode_documents, train_tokenizer
from .words import KnownCorpus, check_counts, encode_words, known_corpus, train_word_tokenizer, word_files

logger = logging.get_logger(__name__)

BUILT_IN_CORPORA = {"cpython_docs": cpython_docs}  # by name, what reads them
DEFAULT_CORPUS = "cpython_docs"
TEXT_SUFFIXES = (".txt", ".text", ".md", *ROW_FORMATS)


@dataclass
class CorpusArguments:
    """Which text, and whether it is read word by word.

    Raises:
        ValueError: if arguments do not go together.
    """

    corpus: str = field(
        default=DEFAULT_CORPUS,
        metadata={
            "help": "cpython_docs (built in, no network), a local file (text in UTF-8, .jsonl, .csv or .parquet), or "
            "a Hub dataset; with word_level a local folder of train.txt, valid.txt and test.txt, or a Hub dataset."
        },
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Local file to validate on, if corpus is a local file."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of a .jsonl, .csv or .parquet file, or of a dataset; default: text."}
    )
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
        where: `corpus` is `"cpython_docs"` (built in), a local file (see `read_documents`), or a name that
            `datasets.load_dataset` takes: a dataset on the Hub such as `"Salesforce/wikitext"`, or a local folder.
            Without a `validation_file`, the last tenth of a local file is held out. With `word_level`, a local folder
            has `train.txt`, `valid.txt` and `test.txt` (or `wiki.train.tokens`, `ptb.train.txt` and so on).

    Raises:
        ValueError: if a local file is missing or cannot be read, an argument has no effect, the dataset has no `text`,
            `train` or `validation`, or the corpus is called Penn Treebank or WikiText-103 and does not have its number
            of tokens.
    """
    if not where.word_level:
        return Corpus(where.corpus, _read_documents(where))
    name = where.corpus
    if Path(name).is_file():
        raise ValueError(
            f"corpus {name!r} is a file: word_level reads a folder with train.txt, valid.txt and test.txt, or a Hub "
            "dataset of lines."
        )
    files = word_files(Path(name))
    for argument in ("corpus_config", "text_column") if files else ():
        _refuse(where, argument, "has no effect on a folder of text files")
    splits = DatasetDict({split: read_lines(file) for split, file in files.items()}) or _read_documents(where)
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
        why = "; the built-in one differs between Python versions" if corpus.name in BUILT_IN_CORPORA else ""
        logger.warning(
            f"This corpus ({corpus.fingerprint}) is not the one the model was trained on ({trained_on}){why}. Parts of "
            "it may have been trained on."
        )
    return corpus


def is_local(name: str) -> bool:
    """Whether the name of a corpus or tokenizer means a file or folder, which may be missing."""
    if name in BUILT_IN_CORPORA:
        return False
    return name.startswith((".", "/", "~")) or Path(name).suffix in TEXT_SUFFIXES or Path(name).exists()


def _read_documents(where: CorpusArguments) -> DatasetDict:
    name = where.corpus
    is_file = name not in BUILT_IN_CORPORA and Path(name).is_file()
    if not is_file:
        _refuse(where, "validation_file", "goes with a local file as corpus")
    if name in BUILT_IN_CORPORA:
        for argument in ("corpus_config", "text_column"):
            _refuse(where, argument, "does not go with a built-in corpus")
        return BUILT_IN_CORPORA[name]()
    if is_file:
        _refuse(where, "corpus_config", "is for a dataset on the Hub")
        return _local_file(where)
    if is_local(name) and not Path(name).exists():
        raise ValueError(f"corpus {name!r} looks like a local file, but there is no such file.")
    return _checked(load_dataset(name, where.corpus_config), name, where.text_column or "text")


def _refuse(where: CorpusArguments, argument: str, why: str) -> None:
    """Refuse an argument that would have no effect."""
    value = getattr(where, argument)
    if value:
        raise ValueError(f"{argument}={value!r} {why}, but corpus is {where.corpus!r}: leave {argument} out.")


def _local_file(where: CorpusArguments) -> DatasetDict:
    column = where.text_column or "text"
    documents = read_documents(where.corpus, column)
    if where.validation_file:
        return DatasetDict({"train": documents, "validation": read_documents(where.validation_file, column)})
    held_out = max(1, len(documents) // VALIDATION_SHARE)
    if held_out >= len(documents):
        raise ValueError(
            f"{where.corpus!r} has {len(documents)} documents, too few to hold out a validation part; give "
            "validation_file."
        )
    first = len(documents) - held_out
    return DatasetDict(
        {"train": documents.select(range(first)), "validation": documents.select(range(first, len(documents)))}
    )


def _checked(corpus: DatasetDict, name: str, column: str) -> DatasetDict:
    missing = [split for split in ("train", "validation") if split not in corpus]
    if missing:
        raise ValueError(f"Dataset {name!r} has no split {missing[0]!r}; it has {sorted(corpus)}.")
    for split in ("train", "validation"):
        if column not in corpus[split].column_names:
            raise ValueError(
                f"Dataset {name!r} has no column {column!r}; it has {corpus[split].column_names}: set text_column."
            )
    return corpus if column == "text" else DatasetDict(corpus).select_columns(column).rename_column(column, "text")
