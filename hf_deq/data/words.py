"""Words as tokens, as the literature reads Penn Treebank and WikiText-103.

    tokenizer = train_word_tokenizer(splits, "frequency")   # every word of the corpus is a token
    stream = encode_words(splits["train"], tokenizer)       # a TokenStream like that of any other corpus

White space separates tokens. Case is kept, `<unk>` is a word like any other, and `<eos>` ends every line, also an empty
one. A perplexity per token is then the one that papers quote: it counts `<eos>` as a token. Do not compare it with a
perplexity per token of another tokenizer.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .documents import batches_of_documents
from .tokens import TokenStream

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
ID_ORDERS = ("frequency", "appearance")

# What `str.split()` takes for white space: Unicode's, and four control characters.
WHITE_SPACE = r"[\s\x1c-\x1f]+"

FILE_NAMES = {
    "train": ("train.txt", "wiki.train.tokens", "ptb.train.txt"),
    "validation": ("valid.txt", "wiki.valid.tokens", "ptb.valid.txt"),
    "test": ("test.txt", "wiki.test.tokens", "ptb.test.txt"),
}


@dataclass(frozen=True)
class KnownCorpus:
    """What a published corpus must measure, so that a perplexity on it is the published quantity.

    Attributes:
        title: as papers call it.
        num_tokens: by split, `<eos>` included.
        vocab_size: `<eos>` included.
        counted: splits whose words are counted for ids by frequency (Transformer-XL's choice for each).
    """

    title: str
    num_tokens: dict[str, int]
    vocab_size: int
    counted: tuple[str, ...]


PENN_TREEBANK = KnownCorpus(
    title="Penn Treebank",
    num_tokens={"train": 929_589, "validation": 73_760, "test": 82_430},
    vocab_size=10_000,
    counted=("train", "validation", "test"),
)
WIKITEXT_103 = KnownCorpus(
    title="WikiText-103",
    num_tokens={"train": 103_227_021, "validation": 217_646, "test": 245_569},
    vocab_size=267_735,
    counted=("train",),
)
KNOWN_CORPORA = {
    "ptb": PENN_TREEBANK,
    "penn": PENN_TREEBANK,
    "penn-treebank": PENN_TREEBANK,
    "wikitext-103": WIKITEXT_103,
    "wikitext-103-v1": WIKITEXT_103,
}


def known_corpus(name: str, config_name: str | None = None) -> KnownCorpus | None:
    """The published corpus that a configuration, or else the last part of a path or name, claims to be."""
    claim = config_name or Path(name).name
    return KNOWN_CORPORA.get(claim.lower().replace("_", "-"))


def train_word_tokenizer(
    corpus: DatasetDict, id_order: str = "frequency", known: KnownCorpus | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of a corpus.

    Every word is a token, and a line break is `<eos>`. So whole lines get the ids that `encode_words` gives them.
    `<eos>` also begins texts and pads them. If the corpus has `<unk>`, it stands for words that the corpus lacks.

    Args:
        corpus: lines in the column `text` of each split.
        id_order: `"frequency"` (Transformer-XL: `<eos>` is 0, then by falling frequency in the training part, ties by
            first appearance) or `"appearance"` (TrellisNet: by first appearance in the training, validation and test
            part, one after the other).
        known: the published corpus that this is. It says which parts are counted for `"frequency"`, and the number
            of words.

    Raises:
        ValueError: `id_order` is another, or the number of words is not that of the published corpus.
    """
    if id_order not in ID_ORDERS:
        raise ValueError(f"id_order must be one of {', '.join(ID_ORDERS)}, got {id_order!r}.")
    if id_order == "frequency":
        counts = _count_words(corpus, known.counted if known else ("train",))
        del counts[END_OF_LINE]
        words = [END_OF_LINE, *(word for word, _ in counts.most_common())]  # stable: ties by first appearance
    else:
        words = list(_count_words(corpus, FILE_NAMES))
    if known is not None and len(words) != known.vocab_size:
        raise ValueError(
            f"{known.title} has {known.vocab_size:,} kinds of words, this corpus {len(words):,}: use the preprocessed "
            "files of the literature, or call the corpus something else."
        )
    return _word_tokenizer(words)


def encode_words(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """The words of a split as one stream of ids, with `<eos>` after every line.

    `num_words` counts words without the `<eos>` that the stream adds, and `num_bytes` counts the lines without white
    space at either end, as for any other corpus. So word perplexity and bits per byte divide the nats of all tokens,
    `<eos>` included, by these numbers. `num_unknown` does not count an `<unk>` that the text itself has.

    Raises:
        ValueError: the split has no lines, the tokenizer is not one of words, or a word has no id and there is no
            `<unk>`.
    """
    if not isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), models.WordLevel):
        raise ValueError(
            "word_level needs a tokenizer of words, and this one is not: leave tokenizer out to make one of the "
            "corpus, or leave word_level out."
        )
    vocabulary, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    pieces, num_bytes, num_words, num_unknown = [], 0, 0, 0
    for lines in batches_of_documents(split, "encode words"):
        words = _words(lines)
        try:
            ids = map(vocabulary.__getitem__, words)
            pieces.append(np.fromiter(ids, np.int64, len(words)))
        except KeyError as missing:
            if unknown is None:
                raise ValueError(
                    f"The word {missing.args[0]!r} is not in the vocabulary, and the vocabulary has no {UNKNOWN} to "
                    f"stand for it: replace rare words by {UNKNOWN} in all parts of the corpus, or use "
                    'id_order="appearance", which takes in the words of every part.'
                ) from None
            pieces.append(np.fromiter((vocabulary.get(word, unknown) for word in words), np.int64, len(words)))
            num_unknown += sum(word not in vocabulary for word in words)
        num_words += len(words) - len(lines)
        num_bytes += sum(len(line.strip().encode("utf-8", "surrogatepass")) for line in lines)
    if not num_words:
        raise ValueError("The corpus has no text in this split.")
    return TokenStream(torch.from_numpy(np.concatenate(pieces)), num_bytes, num_words, num_unknown)


def unknown_words(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words of a text for which the tokenizer puts `<unk>`, each once. An `<unk>` that is written is none."""
    unknown = tokenizer.unk_token_id
    words = [word for word in dict.fromkeys(text.split()) if word != tokenizer.unk_token]
    return [word for word in words if unknown is not None and unknown in tokenizer(word)["input_ids"]]


def word_files(folder: Path) -> dict[str, str]:
    """The file of each split in a local folder; empty if it has none of them."""
    found = {
        split: [folder / name for name in names if (folder / name).is_file()] for split, names in FILE_NAMES.items()
    }
    present = {split: str(files[0]) for split, files in found.items() if files}
    for split in ("train", "validation"):
        if present and split not in present:
            raise ValueError(f"corpus {str(folder)!r} has no {split} part: add {' or '.join(FILE_NAMES[split])}.")
    return present


def check_counts(known: KnownCorpus, corpus: DatasetDict, name: str) -> None:
    for split in [split for split in known.num_tokens if split in corpus]:
        batches = batches_of_documents(corpus[split], f"check {split}")
        counted = sum(len(_words(lines)) for lines in batches)
        if counted != known.num_tokens[split]:
            raise ValueError(
                f"corpus {name!r} is called {known.title}, whose {split} part has {known.num_tokens[split]:,} tokens "
                f"with one {END_OF_LINE} a line, but it has {counted:,}: use the preprocessed files of the literature "
                "(for WikiText-103 the configuration wikitext-103-v1, not raw), or call the corpus something else."
            )


def _count_words(corpus: DatasetDict, splits) -> Counter:
    """Words and how often they occur, in order of first appearance."""
    counts: Counter[str] = Counter()
    for split in [split for split in splits if split in corpus]:
        for lines in batches_of_documents(corpus[split], f"count words of {split}"):
            counts.update(_words(lines))
    return counts


def _words(lines: list[str]) -> list[str]:
    """The words of all lines, each line followed by its end; by line it would take several times as long."""
    return f" {END_OF_LINE} ".join([*lines, ""]).split()


def _word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WHITE_SPACE), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_LINE,
        eos_token=END_OF_LINE,
        pad_token=END_OF_LINE,
        unk_token=UNKNOWN if UNKNOWN in vocabulary else None,
        split_special_tokens=True,  # otherwise "<unk>s" would be two tokens, though it is one word
    )
