"""Draw how far models track a state: accuracy against the length of a word, for each number of evaluations.

    python scripts/plot_state_tracking.py model_cards/state-tracking --figure docs/state_tracking.png

Reads results.jsonl, which `scripts/sweep.py` writes: final runs whose model is called group-model, such as
`s3-deq-trellisnet`. A column is a group, a row is a model, and a line is a budget of the solver; the lines are those of
the first seed. The table of the same numbers, for every seed, is printed, and put into a page by --page.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from benchmarking import ReportArguments, report
from matplotlib import colormaps
from matplotlib.figure import Figure
from sweep import Sweep, has_diverged

from hf_deq.commands import run
from hf_deq.evaluation import is_by_tolerance
from hf_deq.tasks.state_tracking import ACCURACIES, MOVED, tested_lengths

DARKEST = 256  # the budget of the darkest line


@dataclass
class PlotStateTrackingArguments(ReportArguments):
    """Where the figure goes."""

    figure: str = field(default="state_tracking.png", metadata={"help": "File of the figure."})


def main(folder: str, arguments: PlotStateTrackingArguments) -> None:
    """Draw, and print the table."""
    sweep = Sweep(Path(folder) / "sweep.yaml")
    good = {model: [line for line in lines if not has_diverged(line)] for model, lines in sweep.finals().items()}
    finals = {model: lines[0] for model, lines in good.items() if lines}  # the first seed of each
    for model in good.keys() - finals.keys():
        print(f"{model} is left out: every seed diverged")
    draw(finals).savefig(arguments.figure, dpi=150)
    rows = [best_row(name, line) for name, lines in good.items() for line in lines]
    rows = sorted(rows, key=lambda row: list(MOVED).index(row["group"]))
    report("state_tracking", rows, arguments, footer="")  # nothing was measured here


def best_row(name: str, line: dict) -> dict:
    """What a model cost to train, and its accuracies at the largest budget."""
    row = max(rows_by_budget(line), key=budget_of)
    group, _, model = name.partition("-")
    accuracies = {
        str(length): f"{row[key]:.0%}"
        for length, key in zip(tested_lengths(line["flags"]["word_length"]), ACCURACIES, strict=True)
    }
    return {
        "group": group,
        "model": model,
        "seed": line["flags"]["seed"],
        "parameters": line["result"]["num_parameters"],
        "minutes": round(line["result"]["seconds"] / 60, 1),
        "budget": row.get("solver_max_evaluations"),
        "guessed": f"{line['result']['guessed_accuracy']:.0%}",
    } | accuracies


def rows_by_budget(line: dict) -> list[dict]:
    """The rows of an evaluation that stop after a number of evaluations, or the only row of an explicit model."""
    return [row for row in line["evaluation"]["rows"] if not is_by_tolerance(row)]


def budget_of(row: dict) -> int:
    """The number of evaluations of a row; 0 for an explicit model."""
    return row.get("solver_max_evaluations", 0)


def draw(finals: dict[str, dict]) -> Figure:
    """One panel for each group and model that has a result."""
    groups = [group for group in MOVED if any(name.startswith(f"{group}-") for name in finals)]
    models = list(dict.fromkeys(name.partition("-")[2] for name in finals))
    figure = Figure(figsize=(1 + 3 * len(groups), 0.6 + 2 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(groups), sharex=True, sharey=True, squeeze=False)
    for model, row in zip(models, panels, strict=True):
        for group, axes in zip(groups, row, strict=True):
            line = finals.get(f"{group}-{model}")
            axes.set_visible(line is not None)
            if line is not None:
                draw_panel(axes, line)
        first = next(axes for axes in row if axes.get_visible())
        first.set_ylabel(f"{model}\naccuracy", fontsize=9)
        first.tick_params(labelleft=True)
    for group, axes in zip(groups, panels[0], strict=True):
        axes.set_title(group, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("length of the word")
    handles = {
        text: handle for axes in panels.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def draw_panel(axes, line: dict) -> None:
    """The lines of one model, from the smallest budget (light) to the largest (dark)."""
    lengths = tested_lengths(line["flags"]["word_length"])
    for row in sorted(rows_by_budget(line), key=budget_of):
        budget = row.get("solver_max_evaluations")
        color = "black" if budget is None else colormaps["viridis_r"](math.log2(1 + budget) / math.log2(1 + DARKEST))
        label = "explicit layers" if budget is None else f"{budget} evaluations" if budget else "no solver"
        axes.plot(lengths, [row[name] for name in ACCURACIES], marker="o", markersize=3, color=color, label=label)
    guessed = line["result"]["guessed_accuracy"]
    axes.axhline(guessed, color="gray", linestyle=":", linewidth=1, label="guessed")
    axes.axvline(lengths[0], color="gray", linewidth=0.5)  # words of training
    axes.set(xscale="log", ylim=(0, 1.05))
    axes.set_xticks(lengths, map(str, lengths))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run(main, __doc__, PlotStateTrackingArguments, folder="Folder of the sweep.")
