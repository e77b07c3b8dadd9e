"""How good is it, and does the equilibrium matter: perplexity with a sliding window, the dial, n-gram baselines.

`evaluate_perplexity` is the only place that computes a perplexity. Every token of the stream is
predicted once, the first one from an end-of-text token; windows of `length` tokens advance by
`stride`, and a token counts in the window where it has the most context.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .data import TokenStream


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity of one stream and what the solver did for it.

    Attributes:
        num_tokens: predicted tokens.
        nats_per_token: mean negative log-likelihood.
        perplexity: per token; depends on the tokenizer.
        word_perplexity: per whitespace-separated word of the text; comparable between tokenizers.
        bits_per_byte: per UTF-8 byte of the text; comparable between tokenizers.
        num_evaluations: mean calls of f per sequence.
        residual: mean relative residual per sequence.
        converged: share of the sequences that reached the tolerance.
    """

    num_tokens: int
    nats_per_token: float
    perplexity: float
    word_perplexity: float
    bits_per_byte: float
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
    accelerator=None,
    progress: bool = False,
    **dial,
) -> PerplexityReport:
    """Perplexity of a causal language model on a stream.

    Args:
        model: any causal language model; put into evaluation mode for the time being.
        stream: what to predict.
        start_id: the token in front of the first one, usually end-of-text.
        length: tokens per window.
        stride: tokens by which the window advances, at most `length` (no overlap); default half of it.
        batch_size: windows per forward pass.
        accelerator: an `accelerate.Accelerator` whose processes share the work.
        progress: show a progress bar.
        dial: `solver_tolerance` or `solver_max_evaluations` for the model's forward.

    Raises:
        ValueError: `stride` is not in 1 to `length`.
    """
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride must lie in 1 to length={length}, got {stride}.")
    ids = torch.cat([torch.tensor([start_id]), stream.ids])
    batches = list(_batches(len(stream.ids), length, stride, batch_size))
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    totals = torch.zeros(5, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for batch in tqdm(batches[rank::processes], desc="evaluate", leave=False, disable=not progress or rank > 0):
        totals += _score(model, ids, batch, dial)
    model.train(was_training)
    if accelerator is not None:
        totals = accelerator.reduce(totals.to(accelerator.device, _widest(accelerator.device))).double().cpu()
    nats, rows, evaluations, residual, converged = totals.tolist()
    return PerplexityReport(
        num_tokens=len(stream.ids),
        nats_per_token=nats / len(stream.ids),
        perplexity=_exp(nats / len(stream.ids)),
        word_perplexity=_exp(nats / max(1, stream.num_words)),
        bits_per_byte=nats / math.log(2) / stream.num_bytes,
        num_evaluations=evaluations / rows,
        residual=residual / rows,
        converged=converged / rows,
    )


def dial_table(
    model: PreTrainedModel, stream: TokenStream, start_id: int, settings: Iterable[dict], **arguments
) -> list[dict]:
    """Perplexity against compute: one row per setting of the dial (`solver_tolerance`, `solver_max_evaluations`)."""
    return [
        setting | asdict(evaluate_perplexity(model, stream, start_id, **arguments, **setting)) for setting in settings
    ]


def format_table(rows: list[dict]) -> str:
    """Rows with the same keys as an aligned text table."""
    cells = [list(rows[0])] + [[_format(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


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
    for n in range(1, order + 1):
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


def _batches(num_tokens: int, length: int, stride: int, batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
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


@torch.no_grad()
def _score(model: PreTrainedModel, ids: Tensor, batch: list[tuple[int, int, int]], dial: dict) -> Tensor:
    """Sums over a batch: nats, rows, evaluations, residuals, converged rows."""
    _, length, counted = batch[0]
    windows = torch.stack([ids[start : start + length + 1] for start, _, _ in batch]).to(model.device)
    outputs = model(windows[:, :-1], use_cache=False, logits_to_keep=counted, **dial)
    nats = torch.nn.functional.cross_entropy(
        outputs.logits.float().flatten(0, 1), windows[:, -counted:].flatten(), reduction="sum"
    )
    solver = [getattr(outputs, name, None) for name in ("num_evaluations", "residual", "converged")]
    sums = [0.0 if report is None else report.float().sum().item() for report in solver]
    return torch.tensor([nats.item(), len(batch), *sums], dtype=torch.float64)


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


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _format(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
