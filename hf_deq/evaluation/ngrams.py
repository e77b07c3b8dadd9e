"""N-gram baselines: the score that counting n-grams achieves on the same tokens."""

import numpy as np

from ..data import TokenStream, with_progress


def ngram_bits_per_byte(train: TokenStream, valid: TokenStream, start_id: int, vocab_size: int, order: int) -> float:
    """Return the bits per byte of an interpolated Witten-Bell n-gram model (Witten & Bell 1991) on `valid`.

    P(w | h) = (c(hw) + T(h) P(w | h')) / (c(h) + T(h)). Here c counts occurrences in `train`, T(h) is the number of
    distinct successors of h, and h' is h without its oldest token. The recursion ends at the uniform distribution.

    Args:
        train, valid: token streams of the same tokenizer.
        start_id: the id that is put before both streams, `order - 1` times.
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
    """Return one integer for the n-gram that ends at each token. The last token is the lowest digit."""
    keys = np.zeros(len(ids) - order + 1, dtype=np.int64)
    for offset in range(order - n, order):
        keys = keys * vocab_size + ids[offset : len(ids) - order + 1 + offset]
    return keys


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key; 0 for a key that is not among the sorted `keys`."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
