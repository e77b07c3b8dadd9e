"""Text to batches of token ids."""

from .batches import ContiguousBatches, SequenceBlocks, StepBatches
from .corpora import BUILT_IN_CORPORA, DEFAULT_CORPUS, Corpus, CorpusArguments, is_local, read_corpus, read_corpus_of
from .documents import with_progress
from .ranges import check_at_least
from .recipes import find_recipe, parse_recipe, read_recipe
from .tokens import TokenStream, encode_documents, train_tokenizer
from .words import ID_ORDERS, encode_words, known_corpus, train_word_tokenizer, unknown_words

__all__ = [
    "BUILT_IN_CORPORA",
    "DEFAULT_CORPUS",
    "ID_ORDERS",
    "ContiguousBatches",
    "Corpus",
    "CorpusArguments",
    "SequenceBlocks",
    "StepBatches",
    "TokenStream",
    "check_at_least",
    "encode_documents",
    "encode_words",
    "find_recipe",
    "is_local",
    "known_corpus",
    "parse_recipe",
    "read_corpus",
    "read_corpus_of",
    "read_recipe",
    "train_tokenizer",
    "train_word_tokenizer",
    "unknown_words",
    "with_progress",
]
