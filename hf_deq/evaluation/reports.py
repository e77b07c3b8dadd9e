"""What an evaluation says: quality against compute as rows of a table, and the settings behind them.

evaluation = evaluate_dial(model, held_out, dial_settings(model.config, budgets=[1, 2], tolerances=[1e-2]))
print(format_table(evaluation.table()))
"""

import math
from dataclasses import dataclass

from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_deq import DEQConfig
from ..generation_deq import REPORTED
from .convergence import spectral_radii
from .held_out import HeldOut
from .model_folders import check_positions
from .starts import distances_from_start, path_independence, starts_at_zero, unsolved

# What evaluations measure, and what a card or a figure calls it.
METRICS = {
    "perplexity": "perplexity",
    "word_perplexity": "perplexity per word",
    "bits_per_byte": "bits per byte",
    "loss": "loss (nats per position)",
    "recalled": "share of the symbols recalled",
    "accuracy": "accuracy at the length of training",
    "accuracy_2x": "accuracy at twice the length",
    "accuracy_4x": "accuracy at 4 times the length",
    "accuracy_8x": "accuracy at 8 times the length",
}
# What `hf-deq plot` draws, and what a card says under it.
FIGURES = {
    "dial": "Quality against tolerance and budget",
    "residuals": "Relative residual against evaluations of f",
    "training": "Evaluations of f over training",
    "memory": "Bytes that a training step keeps for backward",
    "text": "Evaluations of f per token",
    "lens": "What each number of evaluations predicts",
}
RADIUS_WINDOWS = 8
START = {"solver_max_evaluations": 0, "solver_tolerance": 0.0}  # the row that does not solve


def by_budget(budgets: list[int]) -> list[dict]:
    """Settings of the dial that stop after a number of evaluations."""
    return [{"solver_max_evaluations": budget, "solver_tolerance": 0.0} for budget in budgets]


def by_tolerance(tolerances: list[float]) -> list[dict]:
    """Settings of the dial that stop at a tolerance, within the model's own budget."""
    return [{"solver_max_evaluations": None, "solver_tolerance": tolerance} for tolerance in tolerances]


def dial_settings(config: PreTrainedConfig, budgets: list[int], tolerances: list[float]) -> list[dict]:
    """The settings of a table: first budgets, then tolerances.

    An unrolled model has no tolerance, so its last row is its own number of applications. A model without an
    equilibrium has a single row.
    """
    if not isinstance(config, DEQConfig):
        return [{}]
    if config.gradient == "unrolled":
        return by_budget([*budgets, config.solver_max_evaluations])
    return by_budget(budgets) + by_tolerance(tolerances)


def is_by_tolerance(row: dict) -> bool:
    """Whether a row stopped at a tolerance."""
    return "solver_tolerance" in row and row["solver_max_evaluations"] is None


def score_settings(model: PreTrainedModel, held_out: HeldOut, settings: list[dict]) -> list[dict]:
    """Score a model at every setting of the dial: one row for each, with the setting and the scores."""
    bar = tqdm(settings, desc="rows", leave=False)
    return [setting | held_out.score(model, progress=True, **setting) for setting in bar]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    Attributes:
        measured: what the model was judged on, and how, in words.
        rows: a setting of the dial and its scores in each.
        dataset, split, metrics: as in `HeldOut`.
        spectral_radius: of the Jacobian of f at the equilibrium, the mean over windows; `None` without an equilibrium.
        distance_from_start, path_independence: see `starts`, means over the same windows; `None` likewise. With a
            single window, `path_independence` is `None`, too.
    """

    measured: str
    rows: list[dict]
    dataset: str
    split: str
    metrics: tuple[str, ...]
    spectral_radius: float | None = None
    distance_from_start: float | None = None
    path_independence: float | None = None

    @property
    def is_solved(self) -> bool:
        """Whether the model solves for an equilibrium, so that the rows are settings of the dial."""
        return "solver_tolerance" in self.rows[0]

    def table(self) -> list[dict]:
        """The rows with the columns that are shown, for `format_table`."""
        columns = [*self.metrics, *(REPORTED if self.is_solved else ())]
        return [{"dial": dial_label(row)} | {name: row[name] for name in columns} for row in self.rows]


def evaluate_dial(model: PreTrainedModel, held_out: HeldOut, settings: list[dict]) -> Evaluation:
    """Score a model at every setting of the dial (`solver_tolerance`, `solver_max_evaluations`).

    If the solve starts at a state that the input proposes, a first row scores this state.

    Raises:
        ValueError: if windows are longer than the table of positions of an explicit model.
    """
    length, remedy = held_out.windows(1).shape[1], "give a length of at most {positions}"
    check_positions(model.config, "the windows (length)", length, remedy)
    rows = score_settings(model, held_out, settings)
    of_equilibrium = {}
    if getattr(model.config, "gradient", "unrolled") != "unrolled":
        windows = held_out.windows(RADIUS_WINDOWS)
        of_equilibrium = {
            "spectral_radius": spectral_radii(model, windows).mean().item(),
            "distance_from_start": distances_from_start(model, windows).mean().item(),
            "path_independence": path_independence(model, windows) if len(windows) > 1 else None,
        }
        if not starts_at_zero(model, windows):
            with unsolved(model):
                rows = [START | held_out.score(model, progress=True), *rows]
    return Evaluation(
        measured=held_out.describe(rows[-1], model.config),
        rows=rows,
        dataset=held_out.dataset,
        split=held_out.split,
        metrics=held_out.metrics,
        **of_equilibrium,
    )


def format_table(rows: list[dict]) -> str:
    """Format rows with the same keys as an aligned text table."""
    cells = [list(rows[0])] + [[_format(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def finite(data):
    """The same data with `null` in place of numbers that JSON cannot hold."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def dial_label(row: dict) -> str:
    """The setting of a row, in words."""
    if "solver_max_evaluations" not in row:
        return "no solver"
    if is_by_tolerance(row):
        return f"tolerance {row['solver_tolerance']:g}"
    budget = row["solver_max_evaluations"]
    if budget == 0:
        return "no evaluation, the start"
    return "1 evaluation" if budget == 1 else f"{budget} evaluations"


def _format(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
