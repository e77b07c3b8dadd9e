"""What a run recorded in its folder: recipe, cost, results of evaluations, and figures.

record = read_record("deq-model", model.config)
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import PreTrainedConfig

from ..data import DEFAULT_CORPUS, is_local, parse_recipe
from ..evaluation import FIGURES, METRICS, finite, is_by_tolerance
from ..tasks import LanguageModeling
from ..training.log import is_report, parse_metrics

# Names in recipe.yaml that belong to the machine of the run, and names whose values may be a place on that machine.
MACHINE_FIELDS = ("output_dir", "overwrite", "resume", "report_to")
PLACE_FIELDS = ("corpus", "validation_file", "tokenizer", "init_from", "others", "metrics")
# What an evaluation says of the equilibrium; results of earlier versions have the first alone.
OF_THE_EQUILIBRIUM = ("spectral_radius", "distance_from_start", "path_independence")
SETTING = {"solver_tolerance", "solver_max_evaluations"}  # of a row; without a solver it has neither


@dataclass(frozen=True)
class RunRecord:
    """What a run recorded in its folder. What it did not record is empty.

    Attributes:
        recipe: of recipe.yaml, without what belongs to the machine of the run.
        steps: the last line of metrics.jsonl about training steps.
        cost: the last line of metrics.jsonl, if the run was finished: parameters, tokens, seconds, validation.
        results: rows of results.json, one for each setting of the dial.
        evaluation: the arguments of the evaluation that gave them, without places on the machine.
        dataset, split: what they were measured on.
        measured: the same, and how they were measured, in words.
        spectral_radius, distance_from_start, path_independence: of the equilibrium, from the same evaluation.
        figures: those of `hf-deq plot` in the folder, with the arguments of each.
    """

    recipe: dict = field(default_factory=dict)
    steps: dict = field(default_factory=dict)
    cost: dict = field(default_factory=dict)
    results: list[dict] = field(default_factory=list)
    evaluation: dict = field(default_factory=dict)
    dataset: str = DEFAULT_CORPUS
    split: str = "validation"
    measured: str = ""
    spectral_radius: float | None = None
    distance_from_start: float | None = None
    path_independence: float | None = None
    figures: dict[Path, dict] = field(default_factory=dict)

    def own_row(self, config: PreTrainedConfig) -> dict:
        """The row at the model's own tolerance, or else at the tightest, or else of the largest budget.

        For an unrolled model it is the row of its own number of applications.
        """
        if config.gradient == "unrolled":
            budget = config.solver_max_evaluations
            return next((row for row in self.results if row.get("solver_max_evaluations") == budget), {})
        at_tolerances = [row for row in self.results if is_by_tolerance(row)]
        own = [row for row in at_tolerances if row["solver_tolerance"] == config.solver_tolerance]
        if own:
            return own[0]
        if at_tolerances:
            return min(at_tolerances, key=lambda row: row["solver_tolerance"])
        return max(self.results, key=lambda row: row.get("solver_max_evaluations") or 0, default={})

    def save(self, folder: Path) -> None:
        """Write recipe, results and figures into another folder."""
        if self.recipe:
            (folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        if self.results:
            results = {
                "arguments": self.evaluation,
                "measured": self.measured,
                "dataset": self.dataset,
                "split": self.split,
                **{name: getattr(self, name) for name in OF_THE_EQUILIBRIUM},
                "rows": self.results,
            }
            (folder / "results.json").write_text(json.dumps(finite(results), indent=1))
        for figure in self.figures:
            shutil.copyfile(figure, folder / figure.name)


def read_record(folder: str | Path, config: PreTrainedConfig) -> RunRecord:
    """Read what the run of a folder recorded.

    Args:
        folder: with recipe.yaml, metrics.jsonl, results.json and figures, as far as they exist.
        config: of the model.

    Raises:
        ValueError: if a file cannot be read; if the recipe has something else than one name as its corpus; or if
            results.json was not written by `hf-deq evaluate`, or belongs to another model.
    """
    folder = Path(folder)
    recipe = parse_recipe(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    if not isinstance(recipe.get("corpus", DEFAULT_CORPUS), str):
        raise ValueError(f"{folder / 'recipe.yaml'}: corpus must be one name, got {recipe['corpus']!r}.")
    lines = _read(folder / "metrics.jsonl", parse_metrics) or []
    results = _read(folder / "results.json", _parse_results) or {"arguments": {}, "measured": "", "rows": []}
    steps = next((line for line in reversed(lines) if "loss" in line), {})
    dataset, split = _measured_on(results, recipe)
    record = RunRecord(
        recipe=_portable(recipe),
        steps=steps,
        cost=lines[-1] if lines and is_report(lines[-1]) else {},
        results=results["rows"],
        evaluation=_portable(results["arguments"]),
        dataset=dataset,
        split=split,
        measured=results["measured"],
        **{name: results.get(name) for name in OF_THE_EQUILIBRIUM},
        figures=_read_figures(folder),
    )
    if results["arguments"].keys() <= {"budgets", "tolerances"}:
        _check_agreement(record, config)
    return record


def _measured_on(results: dict, recipe: dict) -> tuple[str, str]:
    """Dataset and split of results. Results of earlier versions do not say them, but recipe and arguments do."""
    task = recipe.get("task", LanguageModeling.name)
    if results.get("dataset"):
        dataset, split = results["dataset"], results["split"]
    elif task != LanguageModeling.name:
        dataset, split = task, "test"
    else:
        dataset = results["arguments"].get("corpus", recipe.get("corpus", DEFAULT_CORPUS))
        split = results["arguments"].get("split", "validation")
    return _name_of(dataset), split


def _read(file: Path, parse):
    """Parse a file; `None` if it does not exist."""
    try:
        return parse(file.read_text()) if file.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _read_figures(folder: Path) -> dict[Path, dict]:
    """The figures whose numbers lie beside them, with the arguments that gave them."""
    figures = {}
    for name in FIGURES:
        numbers = _read(folder / f"{name}.json", json.loads)
        if numbers and "arguments" in numbers and (folder / f"{name}.png").is_file():
            figures[folder / f"{name}.png"] = _portable(numbers["arguments"])
    return figures


def _parse_results(text: str) -> dict:
    results = json.loads(text)
    if isinstance(results, list):
        raise ValueError("it has rows but not the arguments that gave them: write it again with hf-deq evaluate.")
    if not isinstance(results, dict) or not _is_ours(results):
        raise ValueError("it was not written by hf-deq evaluate --output.")
    return results


def _is_ours(results: dict) -> bool:
    """Whether results have what an evaluation writes. Those of earlier versions have no dataset and no split."""
    kinds = {"arguments": dict, "measured": str, "rows": list}
    kinds |= {"dataset": str, "split": str} if results.get("dataset") else {}
    if not all(isinstance(results.get(name), kind) for name, kind in kinds.items()):
        return False
    return all(
        isinstance(row, dict) and METRICS.keys() & row.keys() and len(SETTING & row.keys()) != 1
        for row in results["rows"]
    )


def _name_of(place: str | list[str]) -> str | list[str]:
    if isinstance(place, list):
        return [_name_of(one) for one in place]
    return Path(place).name if is_local(place) else place


def _portable(recipe: dict) -> dict:
    """A recipe for other machines: local files and folders keep only their name."""
    places = {name: recipe[name] for name in PLACE_FIELDS if recipe.get(name)}
    kept = {name: value for name, value in recipe.items() if name not in MACHINE_FIELDS}
    return kept | {name: _name_of(place) for name, place in places.items()}


def _check_agreement(record: RunRecord, config: PreTrainedConfig) -> None:
    """Results by the default protocol must equal the validation at the end of training, which has the same protocol."""
    own = record.own_row(config)
    if config.gradient != "unrolled" and own.get("solver_tolerance") != config.solver_tolerance:
        return
    for name in ("num_tokens", "perplexity"):
        ours, theirs = own.get(name), record.cost.get(f"validation_{name}")
        if None not in (ours, theirs) and not math.isclose(ours, theirs, rel_tol=0.01):
            raise ValueError(
                f"results.json has {name} {ours:g}, the validation in metrics.jsonl {theirs:g}: it is of another model "
                "or text than this run's. Write it again with hf-deq evaluate --output."
            )
