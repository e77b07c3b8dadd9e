"""Perplexity protocols, each against a slow and obvious version."""

import math

import pytest
import torch
from families import ATTRACTOR, TRANSFORMER, TRELLISNET, every_remembering_family, random_ids

from hf_deq.data import TokenStream
from hf_deq.evaluation import (
    HeldOutText,
    Protocol,
    evaluate_dial,
    evaluate_perplexity,
    format_table,
    solver_settings,
)

pytestmark = pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")


@pytest.mark.parametrize(
    "length, stride, tokens", [(8, 8, 40), (8, 3, 41), (8, 1, 15), (8, None, 8), (8, 8, 5), (8, 4, 43)]
)
def test_every_token_is_predicted_once_with_the_most_context(length, stride, tokens):
    model = TRANSFORMER.model()
    stream = TokenStream(random_ids(1, tokens)[0], num_bytes=100, num_words=20)
    report = evaluate_perplexity(model, stream, 1, Protocol(length, stride, batch_size=3))
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
    evaluate_perplexity(model, stream, 1, Protocol(4))
    assert model.training
    with pytest.raises(ValueError, match="stride must lie in 1 to length=4, got 5"):
        Protocol(4, stride=5)


def test_dial_table_turns_the_dial():
    stream = TokenStream(random_ids(1, 30)[0], 30, 5)
    settings = [{"solver_max_evaluations": n, "solver_tolerance": 0.0} for n in (1, 4)]
    settings += [{"solver_max_evaluations": None, "solver_tolerance": 1e-6}]
    evaluation = evaluate_dial(TRANSFORMER.model(), HeldOutText("a text", "test", stream, 1, Protocol(8)), settings)
    rows = evaluation.rows
    assert [row["num_evaluations"] for row in rows[:2]] == [1, 4] and rows[2]["num_evaluations"] > 6
    assert rows[0]["residual"] > rows[1]["residual"] > rows[2]["residual"]
    assert evaluation.measured.startswith("the test split: 30 of 30 tokens counted (5 words, 30 bytes), windows of 8")
    assert 0 < evaluation.spectral_radius < 1
    table = format_table(evaluation.table()).splitlines()
    assert len(table) == 4 and len(set(map(len, table))) == 1


@every_remembering_family
@pytest.mark.parametrize("tokens, streams, length", [(40, 1, 7), (40, 4, 5), (41, 4, 5), (9, 6, 4), (5, 8, 3)])
def test_carried_memory_reads_each_stream_as_one_text(family, tokens, streams, length):
    """Segments with an exact memory are one forward pass over the whole stream."""
    model = family.model(**family.remembering)
    ids = random_ids(1, tokens)[0]
    protocol = Protocol(length, batch_size=streams, carry_memory=True)
    report = evaluate_perplexity(model, TokenStream(ids, 100, 20), 1, protocol)
    piece, nats, counted = math.ceil(tokens / streams), 0.0, 0
    with_start = torch.cat([torch.tensor([1]), ids])
    for start in range(0, tokens, piece):
        text = with_start[start : min(start + piece, tokens) + 1]
        logits = model(text[None, :-1], use_cache=False).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, text[1:], reduction="sum").item()
        counted += len(text) - 1
    assert counted == tokens == report.num_tokens
    assert report.nats_per_token == pytest.approx(nats / tokens, rel=1e-6)


@every_remembering_family
@pytest.mark.parametrize("tokens, streams, length", [(40, 1, 7), (43, 4, 5), (41, 4, 30), (9, 4, 1)])
def test_dropping_the_remainder_is_the_protocol_of_the_literature(family, tokens, streams, length):
    """Equal streams, each a text of its own: its first token is given, not predicted."""
    model = family.model(**family.remembering)
    ids = random_ids(1, tokens)[0]
    protocol = Protocol(length, batch_size=streams, carry_memory=True, drop_remainder=True)
    report = evaluate_perplexity(model, TokenStream(ids, 100, 20), 1, protocol)
    piece = tokens // streams
    texts = ids[: piece * streams].view(streams, piece)
    logits = model(texts[:, :-1], use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).item()
    assert report.num_tokens == streams * (piece - 1)
    assert report.nats_per_token == pytest.approx(nats, rel=1e-6)
    assert report.word_perplexity is None and report.bits_per_byte is None  # of a text of which parts are missing
    assert " - " in format_table([vars(report)])


def test_dropping_the_remainder_is_for_streams_that_are_long_enough():
    stream = TokenStream(random_ids(1, 10)[0], 10, 2)
    with pytest.raises(ValueError, match="drop_remainder is for streams: set carry_memory"):
        Protocol(4, drop_remainder=True)
    protocol = Protocol(4, batch_size=6, carry_memory=True, drop_remainder=True)
    with pytest.raises(ValueError, match="fewer than two for each of 6 streams"):
        evaluate_perplexity(TRELLISNET.model(), stream, 1, protocol)


def test_a_memory_can_be_longer_at_test_time_than_in_training():
    """`memory_length` decides what segments see; one as long as the stream sees all of it."""
    stream = TokenStream(random_ids(1, 24)[0], 24, 4)
    model = TRANSFORMER.model(memory_length=4)
    how = dict(batch_size=1, carry_memory=True)
    nats = {}
    for memory_length in (4, 24):
        model.config.memory_length = memory_length
        nats[memory_length] = evaluate_perplexity(model, stream, 1, Protocol(4, **how)).nats_per_token
    whole = evaluate_perplexity(model, stream, 1, Protocol(24, **how)).nats_per_token
    assert nats[24] == pytest.approx(whole, rel=1e-6) and nats[4] != pytest.approx(whole, rel=1e-6)


def test_the_protocol_in_words():
    assert str(Protocol(8, None, 3)) == "windows of 8, stride 4"
    assert str(Protocol(8, None, 3, True)) == "3 streams in segments of 8, memory carried"
    words = "3 streams in segments of 8, memory carried (at most 300 tokens), remainder dropped"
    assert Protocol(8, None, 3, True, drop_remainder=True).in_words(memory_length=300) == words
    config = TRANSFORMER.config(solver_tolerance=1e-3, solver_max_evaluations=30)
    assert solver_settings(config) == "solver anderson, scope causal, tolerance 0.001, at most 30 evaluations"


def test_a_model_without_memory_cannot_carry_it():
    stream = TokenStream(random_ids(1, 10)[0], 10, 2)
    with pytest.raises(ValueError, match="this deq_attractor does not: set carry_memory to false"):
        evaluate_perplexity(ATTRACTOR.model(), stream, 1, Protocol(4, carry_memory=True))
    with pytest.raises(ValueError, match="this deq_transformer does not: set memory_length"):
        evaluate_perplexity(model := TRANSFORMER.model().train(), stream, 1, Protocol(4, carry_memory=True))
    assert model.training
    with pytest.raises(ValueError, match="stride=2 is for windows"):
        Protocol(4, stride=2, carry_memory=True)


@pytest.mark.parametrize("carry_memory", [False, True])
def test_likelihood_heads_are_scored_without_their_logits(carry_memory, monkeypatch):
    """The same perplexity, and no distribution over the whole vocabulary is ever computed."""
    model = TRELLISNET.model(cutoffs=[9, 30])
    stream = TokenStream(random_ids(1, 43)[0], 100, 20)
    with_start = torch.cat([torch.tensor([1]), stream.ids])
    logits = model(with_start[None, :-1], use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, stream.ids).item()
    everything, rows = type(model.lm_head)._all, []
    monkeypatch.setattr(type(model.lm_head), "_all", lambda head, s: rows.append(s.shape[1]) or everything(head, s))
    length = 43 if not carry_memory else 10
    protocol = Protocol(length, batch_size=1, carry_memory=carry_memory)
    assert evaluate_perplexity(model, stream, 1, protocol).nats_per_token == pytest.approx(expected, rel=1e-6)
    assert rows and not any(rows)


def test_a_protocol_that_reads_nothing_is_refused():
    for fields in ({"length": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} must be at least 1, got 0"):
            Protocol(**fields)
