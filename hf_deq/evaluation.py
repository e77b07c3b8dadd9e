"""How good is it, and does the equilibrium matter: perplexity of a stream, and the dial as a table.

Every token of the stream is predicted once, the first one from an end-of-text token; the formula is that of
the metric in `perplexity/`. There are two protocols:

    sliding windows     windows of `length` tokens advance by `stride`; a token counts in the window
                        where it has the most context
    carried memory      `batch_size` contiguous streams are read side by side in segments of `length`, and what
                        the model remembers of a segment is handed on to the next

The literature's protocol (Transformer-XL and after) is the second one with `drop_remainder`: streams of equal length,
none of which is told what came before it, so that the first token of each and a remainder are left out. The number of
streams, `memory_length` and the solver's tolerance all change the number: `protocol` and `solver_settings` say them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .data import TokenStream
from .generation_deq import REPORTED
from .perplexity.formula import perplexity_of
from .position_algebra import widest_dtype
from .softmax_heads import LogProbabilityHead


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity of one stream and what the solver did for it.

    Attributes:
        num_tokens: predicted tokens.
        nats_per_token: mean negative log-likelihood.
        perplexity: per token; depends on the tokenizer.
        word_perplexity: per whitespace-separated word of the text; comparable between tokenizers. End-of-text and
            end-of-line tokens are no words, but what they cost is shared out among the words: for a word-level corpus
            it lies above `perplexity`, which is what papers quote. `None` where tokens were left out.
        bits_per_byte: per UTF-8 byte of the text, likewise.
        num_evaluations: mean calls of f per sequence.
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
    length: int = 128,
    stride: int | None = None,
    batch_size: int = 16,
    carry_memory: bool = False,
    drop_remainder: bool = False,
    accelerator=None,
    progress: bool = False,
    **dial,
) -> PerplexityReport:
    """Perplexity of a causal language model on a stream.

    Args:
        model: any causal language model; put into evaluation mode for the time being.
        stream: what to predict.
        start_id: the token in front of the first one, usually end-of-text.
        length: tokens per window or segment.
        stride: tokens by which the window advances, at most `length` (no overlap); default half of it.
        batch_size: windows per forward pass; with `carry_memory` the number of streams, which is then part of the
            protocol: each starts without a memory.
        carry_memory: the second protocol.
        drop_remainder: with `carry_memory`, the literature's variant of it.
        accelerator: an `accelerate.Accelerator` whose processes share the work.
        progress: show a progress bar.
        dial: `solver_tolerance` or `solver_max_evaluations` for the model's forward.

    Raises:
        ValueError: `stride` is not in 1 to `length` or given where there are no windows, the model has no memory, or
            `drop_remainder` is given without `carry_memory` or for fewer than two tokens a stream.
    """
    if carry_memory and stride is not None:
        raise ValueError(f"stride={stride} is for windows: with carry_memory segments follow each other.")
    if drop_remainder and not carry_memory:
        raise ValueError("drop_remainder is for streams: set carry_memory, or leave it out.")
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride must lie in 1 to length={length}, got {stride}.")
    ids = torch.cat([torch.tensor([start_id]), stream.ids])
    share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if carry_memory:
        streams = _equal_streams(stream.ids, batch_size) if drop_remainder else _streams(ids, batch_size)
        steps, scores = _score_streams(model, streams, length, share, dial)
    else:
        steps, scores = _score_windows(model, ids, length, stride, batch_size, share, dial)
    totals = torch.zeros(6, dtype=torch.float64)
    with evaluating(model):
        for sums in tqdm(scores, desc="evaluate", total=steps, leave=False, disable=not progress or share[0] > 0):
            totals += sums
    if accelerator is not None:
        totals = accelerator.reduce(totals.to(accelerator.device, widest_dtype(accelerator.device))).double().cpu()
    return _report(totals, stream)


def _report(totals: Tensor, stream: TokenStream) -> PerplexityReport:
    """From the sums of `_score` over all batches."""
    nats, counted, rows, evaluations, residual, converged = totals.tolist()
    everything = round(counted) == len(stream.ids)
    spelt = {"num_words": max(1, stream.num_words), "num_bytes": stream.num_bytes} if everything else {}
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


def protocol(
    length: int,
    stride: int | None,
    batch_size: int,
    carry_memory: bool,
    drop_remainder: bool = False,
    memory_length: int | None = None,
) -> str:
    """The arguments of `evaluate_perplexity` that decide its result, in words; `memory_length` is the model's."""
    if not carry_memory:
        return f"windows of {length}, stride {stride or max(1, length // 2)}"
    words = f"{batch_size} streams in segments of {length}, memory carried"
    if memory_length is not None:
        words += f" (at most {memory_length} tokens)"
    return words + (", remainder dropped" if drop_remainder else "")


def solver_settings(config: PreTrainedConfig) -> str:
    """What of a model's solver decides a result, in words."""
    if not hasattr(config, "solver_scope"):
        return "no solver"
    if config.gradient == "unrolled":
        return f"no solver, {config.solver_max_evaluations} unrolled applications of f"
    return (
        f"solver {config.solver}, scope {config.solver_scope}, tolerance {config.solver_tolerance:g}, at most "
        f"{config.solver_max_evaluations} evaluations"
    )


def dial_table(
    model: PreTrainedModel, stream: TokenStream, start_id: int, settings: Iterable[dict], **arguments
) -> list[dict]:
    """Perplexity against compute: one row per setting of the dial (`solver_tolerance`, `solver_max_evaluations`)."""
    settings = tqdm(list(settings), desc="rows", leave=False, disable=not arguments.get("progress", False))
    return [
        setting | asdict(evaluate_perplexity(model, stream, start_id, **arguments, **setting)) for setting in settings
    ]


def format_table(rows: list[dict]) -> str:
    """Rows with the same keys as an aligned text table."""
    cells = [list(rows[0])] + [[_format(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _score_windows(model, ids, length, stride, batch_size, share, dial) -> tuple[int, Iterator[Tensor]]:
    """How many batches this process has, and the sums over each."""
    rank, processes = share
    mine = list(_windows(len(ids) - 1, length, stride, batch_size))[rank::processes]

    def scores():
        for batch in mine:
            _, inputs, counted = batch[0]
            windows = torch.stack([ids[start : start + inputs + 1] for start, _, _ in batch])
            sums, _ = _score(model, windows[:, :-1], windows[:, 1:], counted, dial)
            yield sums

    return len(mine), scores()


def _windows(num_tokens: int, length: int, stride: int, batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Batches of windows (first input, inputs, predictions that count), all of a batch of one shape."""
    windows = [(0, min(length, num_tokens), min(length, num_tokens))]
    while (done := sum(windows[-1][:2])) < num_tokens:
        new = min(stride, num_tokens - done)
        windows.append((done + new - length, length, new))
    batch: list[tuple[int, int, int]] = []
    for window in windows:
        if batch and (len(batch) == batch_size or window[1:] != batch[0][1:]):
            yield batch
            batch = []
        batch.append(window)
    yield batch


@dataclass(frozen=True)
class _Streams:
    """Where contiguous streams lie in `ids`: of each its first input, and how many predictions the longest has.

    No prediction goes beyond `ids`: the last stream may be shorter.
    """

    ids: Tensor
    starts: Tensor
    predictions: int


def _streams(ids: Tensor, streams: int) -> _Streams:
    """Every id but the first is predicted, the first one of a stream from the last one of the stream before."""
    predictions = -(-(len(ids) - 1) // streams)
    return _Streams(ids, torch.arange(0, len(ids) - 1, predictions), predictions)


def _equal_streams(ids: Tensor, streams: int) -> _Streams:
    """Every id of `streams` pieces of equal length is predicted but the first one of each."""
    piece = len(ids) // streams
    if piece < 2:
        raise ValueError(
            f"The corpus has {len(ids)} tokens, fewer than two for each of {streams} streams: use more text, a smaller "
            "batch_size, or no drop_remainder."
        )
    return _Streams(ids, piece * torch.arange(streams), piece - 1)


def _score_streams(model, streams: _Streams, length, share, dial) -> tuple[int, Iterator[Tensor]]:
    """How many segments there are, and the sums over each, in order: the memory goes from one to the next."""
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
            if memory is None:
                raise ValueError("carry_memory: the model remembers nothing. Set memory_length in its configuration.")
            yield sums

    return len(offsets), scores()


@torch.no_grad()
def _score(model: PreTrainedModel, inputs: Tensor, targets: Tensor, counted: int, arguments: dict):
    """Sums over a batch (nats, counted tokens, rows, evaluations, residuals, converged rows), and the memory after it.

    `targets` belong to the inputs of the same place; the last `counted` count (0: all), except for -100.
    """
    targets = targets[:, -counted:].to(model.device)
    outputs, nats = _nats(model, inputs.to(model.device), targets, counted, arguments)
    solver = [getattr(outputs, name, None) for name in REPORTED]
    sums = [0.0 if report is None else report.float().sum().item() for report in solver]
    tokens = (targets != -100).sum().item()
    totals = torch.tensor([nats.item(), tokens, len(inputs), *sums], dtype=torch.float64)
    return totals, getattr(outputs, "memory", None)


def _nats(model: PreTrainedModel, inputs: Tensor, targets: Tensor, counted: int, arguments: dict):
    """The outputs, and the summed nats of the targets; an output layer that gives likelihoods gives no logits."""
    head = model.get_output_embeddings()
    if isinstance(head, LogProbabilityHead):
        labels = torch.nn.functional.pad(targets, (inputs.shape[1] - targets.shape[1], 0), value=-100)
        how = dict(labels=labels, shift_labels=labels, num_items_in_batch=1, logits_to_keep=labels.new_empty(0))
        outputs = model(inputs, use_cache=False, **how, **arguments)
        return outputs, outputs.loss
    outputs = model(inputs, use_cache=False, logits_to_keep=counted, **arguments)
    logits = outputs.logits.float().flatten(0, 1)
    return outputs, torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=-100)


def _format(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
