"""N-gram baselines: what counting achieves on the same tokens."""

import numpy as np

from ..data import TokenStream, with_progress


def ngram_bits_per_byte(train: TokenStream, valid: TokenStream, start_id: int, vocab_size: int, order: int) -> float:
    """Bits per byte of an interpolated Witten-Bell n-gram model (Witten & Bell 1991) on the same tokens.

    P(w | h) = (c(hw) + T(h) P(w | h')) / (c(h) + T(h)) where T(h) counts the distinct successors
    of h, h' is h without its oldest token, and the recursion ends at the uniform distribution.

    Args:
        train, valid: streams of the same tokenizer.
        start_id: stands in front of both streams.
        vocab_size: number of ids.
        order: 1 for unigrams, 2 for bigrams, 3 for trigrams.
    """
    train_ids, valid_ids = (
        np.concatenate([np.full(order - 1, start_id), stream.ids.numpy()]) for stream in (train, valid)
    )
    probability = np.full(len(valid.ids), 1 / vocab_size)
    for n in with_progress(range(1, order + 1), f"baseline: {order}-grams"):
        train_grams, valid_grams = (_ngram_keys(ids, n, order, vocab_size) for ids in (train_ids, valid_ids))
        grams, gram_counts = np.unique(train_grams, return_counts=True)
        contexts, successors = np.unique(grams // vocab_size, return_counts=True)
        context_counts = np.bincount(np.searchsorted(contexts, grams // vocab_size), weights=gram_counts)
        counts = _look_up(grams, gram_counts, valid_grams)
        context_count = _look_up(contexts, context_counts, valid_grams // vocab_size)
        types = _look_up(contexts, successors, valid_grams // vocab_size)
        seen = context_count + types > 0
        probability[seen] = ((counts + types * probability) / np.maximum(context_count + types, 1))[seen]
    return float(-np.log2(probability).sum() / valid.num_bytes)


def _ngram_keys(ids: np.ndarray, n: int, order: int, vocab_size: int) -> np.ndarray:
    """One integer per n-gram that ends at each token, the last token in the lowest digit."""
    keys = np.zeros(len(ids) - order + 1, dtype=np.int64)
    for offset in range(order - n, order):
        keys = keys * vocab_size + ids[offset : len(ids) - order + 1 + offset]
    return keys


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 for those not among the sorted keys."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
