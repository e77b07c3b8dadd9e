"""Perplexity of a stream of tokens, read by a `Protocol`.

    report = evaluate_perplexity(model, stream, tokenizer.eos_token_id, Protocol(length=128))

Every token of the stream is predicted once, the first one from an end-of-text token. The formula is that of the metric
in `perplexity/`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import TokenStream
from ..generation_deq import REPORTED
from ..position_algebra import widest_dtype
from ..softmax_heads import LogProbabilityHead
from .model_folders import check_remembers
from .perplexity.formula import perplexity_of
from .protocol import Protocol


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity of one stream, and what the solves took.

    Attributes:
        num_tokens: number of predicted tokens.
        nats_per_token: mean negative log-likelihood.
        perplexity: per token. It depends on the tokenizer.
        word_perplexity: per whitespace-separated word of the text. It can be compared between tokenizers. End-of-text
            and end-of-line tokens are not words, but their nats are shared among the words. So for a word-level corpus
            it is larger than `perplexity`, which papers quote. `None` if tokens were left out, or if `<unk>` stands for
            words of the text.
        bits_per_byte: per UTF-8 byte of the text, likewise.
        num_evaluations: mean number of calls of f per sequence.
        residual: mean relative residual per sequence.
        converged: share of the sequences that reached the tolerance.
    """

    num_tokens: int
    nats_per_token: float
    perplexity: float
    word_perplexity: float | None
    bits_per_byte: float | None
    num_evaluations: float
    residual: float
    converged: float


def evaluate_perplexity(
    model: PreTrainedModel,
    stream: TokenStream,
    start_id: int,
    protocol: Protocol | None = None,
    accelerator=None,
    progress: bool = False,
    **dial,
) -> PerplexityReport:
    """Score a causal language model on a stream.

    Args:
        model: any causal language model. It is in evaluation mode meanwhile.
        stream: the tokens to predict.
        start_id: the token in front of the first one, usually end-of-text.
        protocol: how the stream is read; by default `Protocol()`.
        accelerator: an `accelerate.Accelerator` whose processes share the work.
        progress: whether to show a progress bar.
        dial: `solver_tolerance` or `solver_max_evaluations` for the model's forward.

    Raises:
        ValueError: if memory is to be carried and the model has none, or a stream has fewer than two tokens.
    """
    protocol = protocol or Protocol()
    ids = torch.cat([torch.tensor([start_id]), stream.ids])
    share = share_of(accelerator)
    if protocol.carry_memory:
        check_remembers(model.config)
        streams = (
            _equal_streams(stream.ids, protocol.batch_size)
            if protocol.drop_remainder
            else _streams(ids, protocol.batch_size)
        )
        steps, scores = _score_streams(model, streams, protocol.length, share, dial)
    else:
        steps, scores = _score_windows(model, ids, protocol, share, dial)
    totals = torch.zeros(6, dtype=torch.float64)
    with evaluating(model):
        scores = in_step(scores, steps, model, ids[None, :1], accelerator)
        for sums in tqdm(scores, desc="evaluate", total=steps, leave=False, disable=not progress or share[0] > 0):
            totals += sums
    return _report(summed(totals, accelerator), stream)


def share_of(accelerator=None) -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def in_step(scores: Iterable, calls: int, model: PreTrainedModel, input_ids: Tensor, accelerator=None) -> Iterator:
    """Go through scores so that all processes call the model equally often, because a sharded model needs all of them.

    Args:
        scores: each one calls the model once.
        calls: how many there are in this process.
        input_ids: any inputs, for the calls that are missing.
        accelerator: of the processes; without one there is a single process.
    """
    most = calls
    if accelerator is not None and accelerator.num_processes > 1:
        most = int(accelerator.gather(torch.tensor([calls], device=accelerator.device)).max())
    yield from scores
    with torch.no_grad():
        for _ in range(most - calls):
            model(input_ids.to(model.device), use_cache=False)


def summed(totals: Tensor, accelerator=None) -> Tensor:
    """Sum totals over the processes of an accelerator, if there is one; float64 on the CPU."""
    if accelerator is None:
        return totals
    return accelerator.reduce(totals.to(accelerator.device, widest_dtype(accelerator.device))).cpu().double()


def solve_sums(outputs) -> list[float]:
    """Sums over the rows of what a model reports of its solves (`REPORTED`); zeros for a model that solves nothing."""
    reports = [getattr(outputs, name, None) for name in REPORTED]
    return [0.0 if report is None else report.float().sum().item() for report in reports]


def _report(totals: Tensor, stream: TokenStream) -> PerplexityReport:
    """Make the report from the sums of `_score` over all batches."""
    nats, counted, rows, evaluations, residual, converged = totals.tolist()
    is_spelt = round(counted) == len(stream.ids) and not stream.num_unknown
    spelt: dict = {"num_words": max(1, stream.num_words), "num_bytes": stream.num_bytes} if is_spelt else {}
    return PerplexityReport(
        num_tokens=round(counted),
        num_evaluations=evaluations / rows,
        residual=residual / rows,
        converged=converged / rows,
        **{"word_perplexity": None, "bits_per_byte": None} | perplexity_of([nats], [round(counted)], **spelt),
    )


@contextmanager
def evaluating(model: torch.nn.Module):
    """Within this context the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _score_windows(model, ids, protocol: Protocol, share, dial) -> tuple[int, Iterator[Tensor]]:
    """The number of batches of this process, and the sums over each of them."""
    rank, processes = share
    mine = list(_windows(len(ids) - 1, protocol))[rank::processes]

    def scores():
        for batch in mine:
            _, inputs, counted = batch[0]
            windows = torch.stack([ids[start : start + inputs + 1] for start, _, _ in batch])
            sums, _ = _score(model, windows[:, :-1], windows[:, 1:], counted, dial)
            yield sums

    return len(mine), scores()


def _windows(num_tokens: int, protocol: Protocol) -> Iterator[list[tuple[int, int, int]]]:
    """Batches of windows (first input, number of inputs, predictions that count). Those of a batch have one shape."""
    length = protocol.length
    windows = [(0, min(length, num_tokens), min(length, num_tokens))]
    while (done := sum(windows[-1][:2])) < num_tokens:
        new = min(protocol.advance, num_tokens - done)
        windows.append((done + new - length, length, new))
    batch: list[tuple[int, int, int]] = []
    for window in windows:
        if batch and (len(batch) == protocol.batch_size or window[1:] != batch[0][1:]):
            yield batch
            batch = []
        batch.append(window)
    yield batch


@dataclass(frozen=True)
class _Streams:
    """Contiguous streams in `ids`: the first input of each, and the number of predictions of the longest.

    No prediction goes beyond `ids`, so the last stream may be shorter.
    """

    ids: Tensor
    starts: Tensor
    predictions: int


def _streams(ids: Tensor, streams: int) -> _Streams:
    """Every id except the first is predicted. The first id of a stream is predicted from the last of the one before."""
    predictions = -(-(len(ids) - 1) // streams)
    return _Streams(ids, torch.arange(0, len(ids) - 1, predictions), predictions)


def _equal_streams(ids: Tensor, streams: int) -> _Streams:
    """In `streams` pieces of equal length, every id except the first of each piece is predicted."""
    piece = len(ids) // streams
    if piece < 2:
        raise ValueError(
            f"The corpus has {len(ids)} tokens, fewer than two for each of {streams} streams: use more text, a smaller "
            "batch_size, or no drop_remainder."
        )
    return _Streams(ids, piece * torch.arange(streams), piece - 1)


def _score_streams(model, streams: _Streams, length, share, dial) -> tuple[int, Iterator[Tensor]]:
    """The number of segments, and the sums over each, in order, because memory goes from one to the next."""
    rank, processes = share
    ids, piece = streams.ids, streams.predictions
    tokens = len(ids) - 1
    starts = streams.starts[rank::processes]
    longest = min(piece, tokens - int(starts[0])) if len(starts) else 0
    offsets = range(0, longest, length)

    def scores():
        memory = None
        for offset in offsets:
            going_on = starts + offset < tokens  # the last stream is shorter
            places = starts[going_on, None] + torch.arange(offset, min(offset + length, piece))
            targets = ids[(places + 1).clamp_max(tokens)]
            targets[places >= tokens] = -100
            memory = memory and tuple(state[: len(places)] for state in memory)
            sums, memory = _score(model, ids[places.clamp_max(tokens)], targets, 0, dial | {"memory": memory})
            yield sums

    return len(offsets), scores()


@torch.no_grad()
def _score(model: PreTrainedModel, inputs: Tensor, targets: Tensor, counted: int, arguments: dict):
    """Sums over a batch (nats, counted tokens, rows, evaluations, residuals, converged rows), and the memory after it.

    `targets` belong to the inputs at the same place. The last `counted` of them count (0: all), except -100.
    """
    targets = targets[:, -counted:].to(model.device)
    outputs, nats = _nats(model, inputs.to(model.device), targets, counted, arguments)
    tokens = (targets != -100).sum().item()
    totals = torch.tensor([nats.item(), tokens, len(inputs), *solve_sums(outputs)], dtype=torch.float64)
    return totals, getattr(outputs, "memory", None)


def _nats(model: PreTrainedModel, inputs: Tensor, targets: Tensor, counted: int, arguments: dict):
    """The outputs, and the sum of the nats of the targets. An output layer that gives likelihoods makes no logits."""
    head = model.get_output_embeddings()
    if isinstance(head, LogProbabilityHead):
        labels = torch.nn.functional.pad(targets, (inputs.shape[1] - targets.shape[1], 0), value=-100)
        how = dict(labels=labels, shift_labels=labels, num_items_in_batch=1, logits_to_keep=labels.new_empty(0))
        outputs = model(inputs, use_cache=False, **how, **arguments)
        return outputs, outputs.loss
    outputs = model(inputs, use_cache=False, logits_to_keep=counted, **arguments)
    logits = outputs.logits.float().flatten(0, 1)
    return outputs, torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=-100)
