"""N-gram baselines against their definition."""

import math
from collections import Counter

import pytest
import torch

from hf_deq.data import TokenStream
from hf_deq.evaluation.ngrams import ngram_bits_per_byte


def slow_witten_bell(train, valid, start, vocab_size, order):
    train, valid = ([start] * (order - 1) + ids for ids in (train, valid))
    counts = [
        Counter(tuple(train[i - n + 1 : i + 1]) for i in range(order - 1, len(train))) for n in range(1, order + 1)
    ]

    def probability(word, history):
        if history is None:
            return 1 / vocab_size
        lower = probability(word, history[1:] if history else None)
        successors = {gram: c for gram, c in counts[len(history)].items() if gram[:-1] == history}
        total, types = sum(successors.values()), len(successors)
        return lower if total == 0 else (successors.get((*history, word), 0) + types * lower) / (total + types)

    return -sum(math.log2(probability(valid[i], tuple(valid[i - order + 1 : i]))) for i in range(order - 1, len(valid)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_against_the_definition(order):
    train, valid = (torch.randint(0, 6, (length,)) ** 2 % 7 for length in (60, 25))
    streams = [TokenStream(ids, num_bytes=50, num_words=1) for ids in (train, valid)]
    expected = slow_witten_bell(train.tolist(), valid.tolist(), 0, 7, order) / 50
    assert ngram_bits_per_byte(*streams, start_id=0, vocab_size=7, order=order) == pytest.approx(expected, rel=1e-12)


def test_unseen_tokens_keep_a_probability():
    streams = [TokenStream(torch.tensor(ids), 10, 1) for ids in ([1, 1, 2], [5, 6])]
    assert math.isfinite(ngram_bits_per_byte(*streams, start_id=0, vocab_size=7, order=3))
