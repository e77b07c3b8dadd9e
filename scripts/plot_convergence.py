"""The figures of "Deep Equilibrium Models" (Bai et al. 2019), drawn from runs of one's own.

    python scripts/plot_convergence.py deq-model --output figures
    python scripts/plot_convergence.py deq-model --others unrolled-model      # its residuals in the same axes
    python scripts/plot_convergence.py deq-model --metrics a/metrics.jsonl b/metrics.jsonl     # several runs
    python scripts/plot_convergence.py deq-model --text "The iterator yields"    # what every token of a text takes

Into the output folder go four figures (PNG), and beside each the numbers in it (JSON):

    training     evaluations of f and relative residual over training, forward and backward  (figure 2, left)
    residuals    relative residual against evaluations of f, solver by solver                (figures 2, right, and 4)
    dial         perplexity against tolerance and against budget                             (figure 3)
    memory       bytes a training step keeps for backward, against evaluations of f          (the claim of figure 1)

or, for a --text, one:

    text         relative residual of every token against evaluations of f, and after how many it stays below the
                 tolerance

What the model was trained on is read from its recipe.yaml, as in evaluate.py. Needs matplotlib:
pip install "hf_deq[plot]".
"""

import json
import math
import runpy
import sys
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from hf_deq.command_line import run_script
from hf_deq.convergence import (
    activations_by_depth,
    evaluations_over_training,
    evaluations_to_tolerance,
    held_out_windows,
    residual_trajectories,
    token_trajectories,
)
from hf_deq.data import TokenStream
from hf_deq.fixed_point import ConvergenceWarning
from hf_deq.modeling_deq import DEQForCausalLM
from hf_deq.tasks import read_recipe
from hf_deq.training_arguments import CopyMemoryArguments

try:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:
    sys.exit('error: figures are drawn by matplotlib, which is missing here: pip install "hf_deq[plot]"')

# By its path: as a module, evaluate.py would hide the library of that name, or be hidden by it.
EVALUATE = runpy.run_path(str(Path(__file__).with_name("evaluate.py")))
SOLVERS = {"anderson": "Anderson", "broyden": "Broyden", "picard": "plain iteration\n(deep weight-tied stack)"}
TOKENS_PER_LINE, MOST_TOKENS = 40, 512  # of a text
COLORS = ("#0072B2", "#D55E00", "#666666", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by everyone


@dataclass
class PlotArguments(EVALUATE["EvaluateArguments"]):
    """What to draw, and from what."""

    budgets: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 6, 8, 12], metadata={"help": "Perplexity at these evaluations of f."}
    )
    tolerances: list[float] = field(
        default_factory=lambda: [1.0, 0.3, 0.1, 0.03, 0.01, 0.001], metadata={"help": "Perplexity at these tolerances."}
    )
    others: list[str] = field(
        default_factory=list,
        metadata={"help": "Further model folders whose residuals to draw: by their solver, or plainly if unrolled."},
    )
    metrics: list[str] = field(
        default_factory=list, metadata={"help": "Files metrics.jsonl of runs; default: the model folder's."}
    )
    windows: int = field(default=16, metadata={"help": "Held-out windows over which residuals are shown."})
    evaluations: int = field(default=30, metadata={"help": "Evaluations of f over which residuals are shown."})
    depths: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Evaluations of f at which memory is measured."}
    )
    text: str | None = field(
        default=None, metadata={"help": "Draw what every token of this text takes, and nothing else."}
    )
    output: str = field(default="figures", metadata={"help": "Folder for figures and their numbers."})


class Trained(NamedTuple):
    """A trained language model, a text that it has not seen, and `windows` `(windows, length)` of that text."""

    name: str
    model: DEQForCausalLM
    recipe: dict
    stream: TokenStream
    start_id: int
    windows: torch.Tensor


def load_model(folder: str, arguments: PlotArguments) -> tuple[DEQForCausalLM, dict]:
    """The language model in a folder, and its recipe."""
    recipe = read_recipe(folder)
    if recipe.get("task") == CopyMemoryArguments.task:
        raise ValueError(f"{folder} has learnt to copy and has no held-out text: name the folder of a language model.")
    model = EVALUATE["load_model"](folder, arguments)
    if not isinstance(model, DEQForCausalLM):
        raise ValueError(f"{folder} is a {type(model).__name__}, which solves for nothing: name a model of hf_deq.")
    return model, recipe


def load(folder: str, arguments: PlotArguments) -> Trained:
    """A model folder and the text that evaluate.py would take for it."""
    model, recipe = load_model(folder, arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = EVALUATE["load_stream"](recipe, tokenizer, arguments)
    windows = held_out_windows(stream.ids, arguments.windows, EVALUATE["window_length"](recipe, arguments))
    return Trained(Path(folder).resolve().name, model, recipe, stream, tokenizer.eos_token_id, windows)


def draw_training(files: list[Path]) -> tuple[Figure, dict]:
    runs = {str(file): evaluations_over_training(file) for file in files}
    figure = Figure(figsize=(9, 5), layout="constrained")
    evaluations, residuals = axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for (file, run), color in zip(runs.items(), repeated(COLORS), strict=False):
        name = Path(file).resolve().parent.name
        evaluations.plot(run["step"], run["forward_evaluations"], color=color, label=f"{name}: forward (calls of f)")
        if np.isfinite(run["backward_evaluations"]).any():
            label = f"{name}: backward\n(vector-Jacobian products)"
            evaluations.plot(run["step"], run["backward_evaluations"], color=color, linestyle="--", label=label)
        residuals.plot(run["step"], run["residual"], color=color)
    evaluations.set(ylabel="evaluations per sequence", title="Evaluations of f over training", ylim=(0, None))
    residuals.set(xlabel="optimizer steps", ylabel="relative residual,\nforward", yscale="log")
    finish(figure, *axes)
    return figure, {file: {name: column.tolist() for name, column in run.items()} for file, run in runs.items()}


def draw_residuals(trained: Trained, others: list[Trained], budget: int) -> tuple[Figure, dict]:
    curves = {name_of(solver, trained): (trained, solver) for solver in SOLVERS}
    for other in others:
        solver = "picard" if other.model.config.gradient == "unrolled" else other.model.config.solver
        depth = other.model.config.solver_max_evaluations
        how = (
            f"trained with {depth} unrolled steps" if solver == "picard" else f"{other.model.config.gradient} gradient"
        )
        curves[f"{other.name}: {name_of(solver, other)},\n{how}"] = (other, solver)
    figure, data = Figure(figsize=(9, 4.5), layout="constrained"), {}
    axes, steps = figure.subplots(), range(1, budget + 1)
    for (label, (source, solver)), color in zip(curves.items(), repeated(COLORS), strict=False):
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
    finish(figure, axes)
    return figure, {"residuals (windows, evaluations)": data}


def draw_dial(trained: Trained, arguments: PlotArguments) -> tuple[Figure, dict]:
    tolerances = [
        {"solver_max_evaluations": None, "solver_tolerance": tolerance}
        for tolerance in sorted(arguments.tolerances, reverse=True)
    ]
    budgets = [{"solver_max_evaluations": budget, "solver_tolerance": 0.0} for budget in sorted(arguments.budgets)]
    evaluate, settings = EVALUATE["evaluate_language_model"], tolerances + budgets
    evaluation = evaluate(trained.model, trained.stream, trained.start_id, trained.recipe, settings, arguments)
    measured, rows = evaluation.measured, evaluation.rows
    rows = rows[: len(tolerances)], rows[len(tolerances) :]
    figure = Figure(figsize=(9, 4), layout="constrained")
    by_tolerance, by_budget = panels = figure.subplots(1, 2, sharey=True)
    for axes, table, dial in zip(panels, rows, ("solver_tolerance", "solver_max_evaluations"), strict=True):
        axes.plot([row[dial] for row in table], [row["perplexity"] for row in table], marker="o", color=COLORS[0])
    for row in rows[0]:
        place = (row["solver_tolerance"], row["perplexity"])
        text = f"{row['num_evaluations']:.1f}"
        by_tolerance.annotate(text, place, (4, 6), textcoords="offset points", fontsize=8)
    title = "Stopped at a tolerance\n(numbers: mean evaluations of f)"
    by_tolerance.set(xlabel="tolerance of the relative residual", ylabel="perplexity per token", xscale="log")
    by_tolerance.set(title=title)
    by_tolerance.invert_xaxis()
    by_budget.set(xlabel="evaluations of f", title="Stopped after a budget\n(1: no solver, f(0))")
    by_budget.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(textwrap.fill(f"{trained.name} on {measured}", 130), fontsize=9)
    finish(figure, *panels, legend=False)
    return figure, {"measured": measured, "by tolerance": rows[0], "by budget": rows[1]}


def draw_memory(trained: Trained, depths: list[int]) -> tuple[Figure, dict]:
    depths, windows = sorted(depths), trained.windows[: trained.recipe.get("batch_size", 8)]
    sizes = activations_by_depth(trained.model, windows, depths)
    labels = {
        "implicit": "implicit gradient\n(at most so many evaluations)",
        "phantom": "phantom gradient\n(at most so many evaluations)",
        "unrolled": "unrolled gradient\n(so many steps)",
    }
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for (gradient, kept), color in zip(sizes.items(), COLORS, strict=False):
        axes.plot(depths, [size / 1e6 for size in kept], marker="o", color=color, label=labels[gradient])
    count, length = windows.shape
    title = f"{trained.name}: activations kept for backward,\na training step of {count} x {length} tokens"
    axes.set(xlabel="evaluations of f", ylabel="saved activations (MB)", title=title, xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(figure, axes)
    return figure, {"evaluations": depths, "batch and sequence": list(windows.shape), "saved bytes": sizes}


def draw_text(model: DEQForCausalLM, tokenizer, name: str, arguments: PlotArguments) -> tuple[Figure, dict]:
    ids = read_text(arguments.text, tokenizer, model.config)
    labels = [readable(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids]
    # What rounding lets the solver reach, if that is more than what is asked of it.
    tolerance, budget = max(model.config.solver_tolerance, torch.finfo(model.dtype).eps / 2), arguments.evaluations
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
        image = draw_line(axes, residuals[:height, line], taken[line], labels[line], norm, width)
    bar = figure.colorbar(image, ax=panels, extend="both", fraction=0.03, pad=0.01, aspect=16 * lines)
    bar.set_label("relative residual", fontsize=9)
    bar.ax.axhline(tolerance, color="white", linewidth=2)
    in_all = f"{late} of {len(taken)} tokens not within {budget}" if late else f"{taken.mean():.1f} on average"
    title = f"{name}: evaluations of f after which\na token's residual stays below {tolerance:g} ({in_all})"
    figure.suptitle(title, fontsize=10, parse_math=False)
    data = {"tokens": labels, "tolerance": tolerance, "evaluations": taken.tolist()}
    return figure, data | {"residuals (evaluations, tokens)": residuals.tolist()}


def draw_line(axes, residuals: np.ndarray, taken: np.ndarray, labels: list[str], norm: LogNorm, width: int):
    """One line of a text: its heat map `(evaluations, tokens)`, tokens below and numbers above; returns the image."""
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


def read_text(text: str, tokenizer, config) -> list[int]:
    """The ids of a text.

    Raises:
        ValueError: it is empty, longer than the model or a figure can take, or has words that the tokenizer does not
            know.
    """
    if not text.strip():
        raise ValueError("the text is empty: give --text some words.")
    ids = tokenizer(text, verbose=False)["input_ids"]
    limit = min(MOST_TOKENS, getattr(config, "max_position_embeddings", MOST_TOKENS))
    if len(ids) > limit:
        raise ValueError(f"the text has {len(ids):,} tokens, the model and a figure take {limit:,}: shorten it.")
    unknown = tokenizer.unk_token_id
    words = [word for word in dict.fromkeys(text.split()) if word != tokenizer.unk_token]
    strange = [word for word in words if unknown is not None and unknown in tokenizer(word)["input_ids"]]
    if strange:
        raise ValueError(
            f"the tokenizer does not know {', '.join(map(repr, strange))}: use other words, as the corpus writes them "
            f"(lower case, perhaps), or {tokenizer.unk_token}."
        )
    return ids


def readable(token: str) -> str:
    """A token as the label of an axis: white space can be seen, and what is long is cut."""
    for blank, sign in ((" ", "·"), ("\n", "↵"), ("\t", "⇥")):
        token = token.replace(blank, sign)
    return token if len(token) <= 14 else token[:13] + "…"


def name_of(solver: str, trained: Trained) -> str:
    return SOLVERS[solver] + ("" if solver == "picard" else f" ({trained.model.config.solver_scope})")


def repeated(colors):
    while True:
        yield from colors


def finish(figure: Figure, *panels, legend: bool = True) -> None:
    """What all figures share: a faint grid, no frame, the legend beside the lines."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    if legend:
        figure.legend(loc="outside right upper", frameon=False, labelspacing=0.9)


def save(arguments: PlotArguments, name: str, figure: Figure, data: dict) -> None:
    """The figure, and its numbers with the arguments that gave them."""
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / f"{name}.png", dpi=150)
    given = {"arguments": EVALUATE["given_arguments"](arguments, is_solved=True)}
    (output / f"{name}.json").write_text(json.dumps(finite(given | data), indent=1))
    print(f"{output / name}.png, .json")


def finite(data):
    """The same with `null` for what JSON cannot say: no value, or one that is not finite."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def main(folder: str, arguments: PlotArguments) -> None:
    warnings.simplefilter("ignore", ConvergenceWarning)  # what has not converged is what is drawn
    if arguments.text is not None:
        model, _ = load_model(folder, arguments)
        figure, data = draw_text(model, AutoTokenizer.from_pretrained(folder), Path(folder).resolve().name, arguments)
        save(arguments, "text", figure, data)
        return
    trained, *others = (load(each, arguments) for each in (folder, *arguments.others))
    files = [Path(file) for file in arguments.metrics] or [Path(folder) / "metrics.jsonl"]
    if arguments.metrics or files[0].is_file():
        save(arguments, "training", *draw_training(files))
    else:
        print(f"note: {folder} has no metrics.jsonl, so training is not drawn; name one by --metrics.")
    figures = {
        "residuals": lambda: draw_residuals(trained, others, arguments.evaluations),
        "memory": lambda: draw_memory(trained, arguments.depths),
        "dial": lambda: draw_dial(trained, arguments),
    }
    for name, draw in figures.items():
        print(f"measuring {name} ...", flush=True)
        save(arguments, name, *draw())


if __name__ == "__main__":
    run_script(main, PlotArguments, __doc__, model="Model folder or Hub repository.")
