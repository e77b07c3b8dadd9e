"""Text as token ids: a byte-level BPE tokenizer, and a split as one stream of ids.

tokenizer = train_tokenizer(corpus.splits["train"], 2048)
stream = encode_documents(corpus.splits["train"], tokenizer)
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .documents import batches_of_documents, with_progress

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 100  # characters
LONG_RUN = re.compile(rf"(\S{{{LONGEST_WORD}}})(?=\S)")


def train_tokenizer(split: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a split. Its first token ends texts and pads them.

    Args:
        split: documents in the column `text`.
        vocab_size: at least 257, for every byte and the end of text.

    Raises:
        ValueError: if `vocab_size` is smaller.
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
    pieces = (piece for text in with_progress(split["text"], "train tokenizer") for piece in _pieces(text))
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _pieces(text: str) -> list[str]:
    """Cut runs without white space to `LONGEST_WORD`. Training time grows with the square of their length."""
    return LONG_RUN.sub("\\1\0", text).split("\0") if LONG_RUN.search(text) else [text]


@dataclass(frozen=True)
class TokenStream:
    """A split as one stream of ids. An end-of-text token follows each document.

    Attributes:
        ids: `(tokens,)`, int64.
        num_bytes, num_words: number of UTF-8 bytes and of whitespace-separated words in the text. With them
            perplexities of different tokenizers can be compared.
        num_unknown: number of words that a vocabulary of words lacks. `<unk>` stands for them, so a score of these
            tokens is not one of the text.
    """

    ids: Tensor
    num_bytes: int
    num_words: int
    num_unknown: int = 0


def encode_documents(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Tokenize the documents of a split and join them.

    Raises:
        ValueError: if the split is empty, or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, which separates documents: set tokenizer.eos_token.")
    pieces, num_bytes, num_words = [], 0, 0
    for batch in batches_of_documents(split, "tokenize"):
        texts = [text for text in batch if text]
        if not texts:
            continue
        # A text may spell a special token. It is text there, and ends no document.
        how = dict(add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False)
        encoded = tokenizer(texts, **how)["input_ids"]
        pieces += [np.array([*document, tokenizer.eos_token_id], dtype=np.int64) for document in encoded]
        num_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        num_words += sum(len(text.split()) for text in texts)
    if not pieces:
        raise ValueError("The corpus has no text in this split.")
    return TokenStream(torch.from_numpy(np.concatenate(pieces)), num_bytes, num_words)
