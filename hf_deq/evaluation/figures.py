"""The figures of "Deep Equilibrium Models" (Bai, Kolter & Koltun 2019), drawn from measurements of one's own models.

Every `draw_...` returns a figure and the numbers in it:

    draw_training     evaluations of f and relative residual over training (figure 2, left)
    draw_residuals    relative residual against evaluations of f, solver by solver (figures 2, right, and 4)
    draw_dial         quality against tolerance and against budget (figure 3)
    draw_memory       bytes that a training step keeps for backward, against evaluations of f (the claim of figure 1)
    draw_text         relative residual of every token of a text against evaluations of f
    draw_lens         the token that every number of evaluations would predict, over a text

Needs matplotlib: pip install "hf_deq[plot]".
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..data import unknown_words
from ..fixed_point import SOLVERS
from ..modeling_deq import DEQForCausalLM
from .activations import activations_by_depth
from .convergence import evaluations_to_tolerance, residual_trajectories, token_trajectories
from .held_out import HeldOut
from .reports import METRICS, by_budget, by_tolerance, score_settings
from .starts import logit_lens

SOLVER_TITLES = {"anderson": "Anderson", "broyden": "Broyden", "picard": "plain iteration\n(deep weight-tied stack)"}
TOKENS_PER_LINE, MOST_TOKENS = 40, 512  # of a text
LENS_TOKENS_PER_LINE = 14  # its cells have words in them
COLORS = ("#0072B2", "#D55E00", "#666666", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by everyone


@dataclass(frozen=True)
class Trained:
    """A trained model and inputs that it has not seen.

    Attributes:
        name: of the model, for titles.
        windows: inputs `(windows, length)` on which residuals are measured.
    """

    name: str
    model: DEQForCausalLM
    windows: Tensor


def draw_training(runs: dict[str, dict[str, np.ndarray]]) -> tuple[Figure, dict]:
    """Draw what runs logged of their solves: by metrics file, what `evaluations_over_training` returns."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    evaluations, residuals = axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for (file, run), color in zip(runs.items(), cycle(COLORS), strict=False):
        name = Path(file).resolve().parent.name
        evaluations.plot(run["step"], run["forward_evaluations"], color=color, label=f"{name}: forward (calls of f)")
        if np.isfinite(run["backward_evaluations"]).any():
            label = f"{name}: backward\n(vector-Jacobian products)"
            evaluations.plot(run["step"], run["backward_evaluations"], color=color, linestyle="--", label=label)
        residuals.plot(run["step"], run["residual"], color=color)
    evaluations.set(ylabel="evaluations per sequence", title="Evaluations of f over training", ylim=(0, None))
    residuals.set(xlabel="optimizer steps", ylabel="relative residual,\nforward", yscale="log")
    _finish(figure, *axes)
    return figure, {file: {key: column.tolist() for key, column in run.items()} for file, run in runs.items()}


def draw_residuals(trained: Trained, others: Sequence[Trained], budget: int) -> tuple[Figure, dict]:
    """Draw how every solver approaches the equilibrium of a model, and how other models do by their own solver."""
    curves = {_name_of(solver, trained): (trained, solver) for solver in SOLVERS}
    for other in others:
        config = other.model.config
        unrolled = config.gradient == "unrolled"
        solver = "picard" if unrolled else config.solver
        how = f"{config.solver_max_evaluations} unrolled steps" if unrolled else f"{config.gradient} gradient"
        curves[f"{other.name}: {_name_of(solver, other)},\ntrained with {how}"] = (other, solver)
    figure, data = Figure(figsize=(9, 4.5), layout="constrained"), {}
    axes, steps = figure.subplots(), range(1, budget + 1)
    for (label, (source, solver)), color in zip(curves.items(), cycle(COLORS), strict=False):
        residual = residual_trajectories(source.model, source.windows, [solver], budget)[solver]
        axes.plot(steps, residual.mean(0), color=color, label=label)
        axes.fill_between(steps, residual.min(0), residual.max(0), color=color, alpha=0.18, linewidth=0)
        data[label.replace("\n", " ")] = residual.tolist()
    dtype = trained.model.dtype
    rounding = f"rounding step of {str(dtype).removeprefix('torch.')}"
    axes.axhline(torch.finfo(dtype).eps, color="black", linestyle=":", linewidth=1, label=rounding)
    count, length = trained.windows.shape
    title = f"{trained.name}: mean over {count} held-out windows of {length} tokens\n(band: smallest to largest)"
    axes.set(xlabel="evaluations of f", ylabel="relative residual  ||f(z) - z|| / ||f(z)||", yscale="log", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, axes)
    return figure, {"residuals (windows, evaluations)": data}


def draw_dial(
    trained: Trained, held_out: HeldOut, tolerances: Sequence[float], budgets: Sequence[int]
) -> tuple[Figure, dict]:
    """Draw the headline metric of a model against tolerance and against budget."""
    settings = by_tolerance(sorted(tolerances, reverse=True)), by_budget(sorted(budgets))
    rows = [score_settings(trained.model, held_out, half) for half in settings]
    measured, headline = held_out.describe(rows[0][0], trained.model.config), held_out.headline
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = panels = figure.subplots(1, 2, sharey=True)
    for axes, table, dial in zip(panels, rows, ("solver_tolerance", "solver_max_evaluations"), strict=True):
        axes.plot([row[dial] for row in table], [row[headline] for row in table], marker="o", color=COLORS[0])
    for row in rows[0]:
        place = (row["solver_tolerance"], row[headline])
        text = f"{row['num_evaluations']:.1f}"
        left.annotate(text, place, (4, 6), textcoords="offset points", fontsize=8)
    title = "Stopped at a tolerance\n(numbers: mean evaluations of f)"
    left.set(xlabel="tolerance of the relative residual", ylabel=METRICS[headline], xscale="log")
    left.set(title=title)
    left.invert_xaxis()
    right.set(xlabel="evaluations of f", title="Stopped after a budget\n(1: one application of f, no solver)")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(textwrap.fill(f"{trained.name} on {measured}", 130), fontsize=9)
    _finish(figure, *panels, legend=False)
    return figure, {"measured": measured, "by tolerance": rows[0], "by budget": rows[1]}


def draw_memory(trained: Trained, batch_size: int, depths: Sequence[int]) -> tuple[Figure, dict]:
    """Draw the bytes that a training step keeps for backward, against the evaluations of f."""
    depths, windows = sorted(depths), trained.windows[:batch_size]
    sizes = activations_by_depth(trained.model, windows, depths)
    labels = {
        "implicit": "implicit gradient\n(at most so many evaluations)",
        "phantom": "phantom gradient\n(at most so many evaluations)",
        "unrolled": "unrolled gradient\n(so many steps)",
        "reversible": "reversible gradient\n(its own number of steps)",
    }
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for (gradient, kept), color in zip(sizes.items(), COLORS, strict=False):
        axes.plot(depths, [size / 1e6 for size in kept], marker="o", color=color, label=labels[gradient])
    count, length = windows.shape
    title = f"{trained.name}: activations kept for backward,\na training step of {count} x {length} tokens"
    axes.set(xlabel="evaluations of f", ylabel="saved activations (MB)", title=title, xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, axes)
    return figure, {"evaluations": depths, "batch and sequence": list(windows.shape), "saved bytes": sizes}


def draw_text(name: str, model: DEQForCausalLM, tokenizer, text: str, budget: int) -> tuple[Figure, dict]:
    """Draw how the residual of every token of a text falls, and after how many evaluations it stays small.

    Raises:
        ValueError: as in `tokens_of`.
    """
    ids = tokens_of(text, tokenizer, model.config)
    labels = [_readable(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids]
    # Rounding may keep the solver from reaching the tolerance.
    tolerance = max(model.config.solver_tolerance, torch.finfo(model.dtype).eps / 2)
    residuals = token_trajectories(model, torch.tensor(ids), budget)
    taken = evaluations_to_tolerance(residuals, tolerance)
    late = int(np.isinf(taken).sum())
    lines = -(-len(ids) // TOKENS_PER_LINE)
    width = -(-len(ids) // lines)
    height = budget if late else min(budget, int(taken.max()) + 2)  # once all have settled, no more is to be seen
    size = (max(6.5, 0.27 * width + 1.6), lines * (0.11 * height + 1.4) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, 1, squeeze=False)[:, 0]
    norm = LogNorm(max(tolerance, torch.finfo(model.dtype).eps) / 10, 1, clip=True)
    for axes, start in zip(panels, range(0, len(ids), width), strict=True):
        line = slice(start, start + width)
        image = _draw_line(axes, residuals[:height, line], taken[line], labels[line], norm, width)
    bar = figure.colorbar(image, ax=panels, extend="both", fraction=0.03, pad=0.01, aspect=16 * lines)
    bar.set_label("relative residual", fontsize=9)
    bar.ax.axhline(tolerance, color="white", linewidth=2)
    in_all = f"{late} of {len(taken)} tokens not within {budget}" if late else f"{taken.mean():.1f} on average"
    title = f"{name}: evaluations of f after which\na token's residual stays below {tolerance:g} ({in_all})"
    figure.suptitle(title, fontsize=10, parse_math=False)
    data = {"tokens": labels, "tolerance": tolerance, "evaluations": taken.tolist()}
    return figure, data | {"residuals (evaluations, tokens)": residuals.tolist()}


def draw_lens(name: str, model: DEQForCausalLM, tokenizer, text: str, budget: int) -> tuple[Figure, dict]:
    """Draw a logit lens over evaluations: the most probable next token after each number of evaluations.

    The color is the probability of this token. Evaluations after the last change are left out.

    Raises:
        ValueError: as in `tokens_of`.
    """
    ids = tokens_of(text, tokenizer, model.config)

    def words(tokens) -> list[str]:
        return [_readable(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in tokens]

    probabilities, predicted = logit_lens(model, torch.tensor(ids), budget).exp().max(-1)
    changes = (predicted != predicted[-1]).any(1).nonzero()
    height = min(budget, (int(changes.max()) if len(changes) else 0) + 3)
    read, cells = words(ids), [words(row) for row in predicted[:height].tolist()]
    probabilities = probabilities[:height].cpu().double().numpy()
    lines = -(-len(ids) // LENS_TOKENS_PER_LINE)
    width = -(-len(ids) // lines)
    size = (max(5, 0.75 * width + 1.6), lines * (0.22 * height + 1.0) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, 1, squeeze=False)[:, 0]
    for axes, start in zip(panels, range(0, len(ids), width), strict=True):
        line = slice(start, start + width)
        image = _draw_cells(axes, probabilities[:, line], [row[line] for row in cells], read[line], width)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01)
    bar.set_label("probability of the predicted token", fontsize=8)
    figure.suptitle(f"{name}: the next token that each number of evaluations predicts", fontsize=10, parse_math=False)
    data = {"tokens": read, "predicted (evaluations, tokens)": cells}
    return figure, data | {"probability (evaluations, tokens)": probabilities.tolist()}


def _draw_cells(axes, probabilities: np.ndarray, cells: list[list[str]], read: list[str], width: int):
    """Draw one line of a text: a word in each cell `(evaluations, tokens)`, and the tokens below; returns the image."""
    image = axes.pcolormesh(probabilities, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    centered = dict(ha="center", va="center", fontsize=6, parse_math=False)
    for (row, place), probability in np.ndenumerate(probabilities):
        color = "white" if probability > 0.6 else "black"  # on dark and on light cells
        axes.text(place + 0.5, row + 0.5, cells[row][place], color=color, **centered)
    axes.set_xticks(np.arange(len(read)) + 0.5, read, parse_math=False, fontsize=7)
    axes.set_yticks(np.arange(len(cells)) + 0.5, range(1, len(cells) + 1), fontsize=7)
    axes.set(xlim=(0, width), ylabel="evaluations of f")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _draw_line(axes, residuals: np.ndarray, taken: np.ndarray, labels: list[str], norm: LogNorm, width: int):
    """Draw one line of a text: its heat map `(evaluations, tokens)`, tokens below, numbers above; returns the image."""
    height, tokens = residuals.shape
    edges = np.arange(tokens + 1) - 0.5
    image = axes.pcolormesh(edges, np.arange(height + 1) + 0.5, residuals, norm=norm, cmap="viridis")
    axes.vlines(edges, 0.5, height + 0.5, color="white", linewidth=0.5)
    axes.stairs(np.minimum(taken, height + 1) - 0.5, edges, baseline=None, color="white", linewidth=2)
    for place, count in enumerate(taken):
        text = f"{count:.0f}" if np.isfinite(count) else "-"
        axes.annotate(text, (place, height + 0.5), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    slanted = dict(rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_xticks(range(tokens), labels, parse_math=False, **slanted)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel("evaluations of f", fontsize=9)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(0.5, height + 0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def tokens_of(text: str, tokenizer, config) -> list[int]:
    """The ids of a text.

    Raises:
        ValueError: if the text is empty, longer than the model or a figure can take, or has words that the tokenizer
            does not know.
    """
    if not text.strip():
        raise ValueError("the text is empty: give --text some words.")
    ids = tokenizer(text, verbose=False)["input_ids"]
    limit = min(MOST_TOKENS, getattr(config, "max_position_embeddings", MOST_TOKENS))
    if len(ids) > limit:
        raise ValueError(f"the text has {len(ids):,} tokens, the model and a figure take {limit:,}: shorten it.")
    if strange := unknown_words(text, tokenizer):
        raise ValueError(
            f"the tokenizer does not know {', '.join(map(repr, strange))}: use other words, as the corpus writes them "
            f"(lower case, perhaps), or {tokenizer.unk_token}."
        )
    return ids


def _readable(token: str) -> str:
    """A token as the label of an axis: white space is made visible, and a long token is cut."""
    for blank, sign in ((" ", "·"), ("\n", "↵"), ("\t", "⇥")):
        token = token.replace(blank, sign)
    return token if len(token) <= 14 else token[:13] + "…"


def _name_of(solver: str, trained: Trained) -> str:
    return SOLVER_TITLES.get(solver, solver) + ("" if solver == "picard" else f" ({trained.model.config.solver_scope})")


def _finish(figure: Figure, *panels, legend: bool = True) -> None:
    """Give a figure what all figures share: a faint grid, no frame, the legend beside the lines."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    if legend:
        figure.legend(loc="outside right upper", frameon=False, labelspacing=0.9)
