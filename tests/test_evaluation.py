"""Perplexity protocol and n-gram baselines, each against a slow and obvious version."""

import math
from collections import Counter

import pytest
import torch
from families import TRANSFORMER, random_ids

from hf_deq.data import TokenStream
from hf_deq.evaluation import dial_table, evaluate_perplexity, format_table, ngram_bits_per_byte

pytestmark = pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")


@pytest.mark.parametrize(
    "length, stride, tokens", [(8, 8, 40), (8, 3, 41), (8, 1, 15), (8, None, 8), (8, 8, 5), (8, 4, 43)]
)
def test_every_token_is_predicted_once_with_the_most_context(length, stride, tokens):
    model = TRANSFORMER.model()
    stream = TokenStream(random_ids(1, tokens)[0], num_bytes=100, num_words=20)
    report = evaluate_perplexity(model, stream, start_id=1, length=length, stride=stride, batch_size=3)
    step = stride or length // 2
    ids, nats, done = torch.cat([torch.tensor([1]), stream.ids]), 0.0, 0
    while done < tokens:
        new = min(step if done else length, tokens - done)
        start = max(0, done + new - length)
        logits = model(ids[None, start : done + new], use_cache=False).logits[0, -new:]
        nats += torch.nn.functional.cross_entropy(logits, ids[done + 1 : done + new + 1], reduction="sum").item()
        done += new
    assert report.num_tokens == tokens
    assert report.nats_per_token == pytest.approx(nats / tokens, rel=1e-6)
    assert report.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert report.word_perplexity == pytest.approx(math.exp(nats / 20), rel=1e-5)
    assert report.bits_per_byte == pytest.approx(nats / math.log(2) / 100, rel=1e-6)
    assert report.converged == 1.0 and report.residual < 1e-9 and report.num_evaluations > 5


def test_mode_is_restored_and_stride_checked():
    model = TRANSFORMER.model().train()
    stream = TokenStream(random_ids(1, 10)[0], 10, 2)
    evaluate_perplexity(model, stream, 1, length=4)
    assert model.training
    with pytest.raises(ValueError, match="stride must lie in 1 to length=4, got 5"):
        evaluate_perplexity(model, stream, 1, length=4, stride=5)


def test_dial_table_turns_the_dial():
    stream = TokenStream(random_ids(1, 30)[0], 30, 5)
    settings = [{"solver_max_evaluations": n, "solver_tolerance": 0.0} for n in (1, 4)]
    settings += [{"solver_max_evaluations": None, "solver_tolerance": 1e-6}]
    rows = dial_table(TRANSFORMER.model(), stream, 1, settings, length=8)
    assert [row["num_evaluations"] for row in rows[:2]] == [1, 4] and rows[2]["num_evaluations"] > 6
    assert rows[0]["residual"] > rows[1]["residual"] > rows[2]["residual"]
    table = format_table(rows).splitlines()
    assert len(table) == 4 and len(set(map(len, table))) == 1


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
