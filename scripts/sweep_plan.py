"""The runs of a sweep: what its file asks for, what is finished, and what can start next."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from hf_deq.data import parse_recipe
from hf_deq.training.log import replace_lines

NAMES = {"score", "common", "tuning", "final", "seeds", "models"}  # of a sweep


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        model: its name in the sweep.
        round: its round of tuning, or "final".
        flags: of `scripts/train.py`, by name.
    """

    model: str
    round: int | str
    flags: dict

    @property
    def key(self) -> str:
        """A name that equal flags share."""
        return f"{self.model}-{sha256(json.dumps(self.flags, sort_keys=True).encode()).hexdigest()[:10]}"


class Sweep:
    """The runs of a sweep, and the results so far.

    Args:
        file: the YAML file.

    Raises:
        ValueError: if it lacks a name, or has one that does not exist, or the file of results cannot be read.
    """

    def __init__(self, file: Path):
        self.plan = parse_recipe(file)
        check_plan(file, self.plan)
        self.results_file = file.with_name("results.jsonl")
        self.results = {line["key"]: line for line in read_lines(self.results_file)}

    def score(self, run: Run) -> float:
        """The score of a finished run; infinite if it diverged or is not a number, so that it is never the best.

        Raises:
            ValueError: if the run has no such score.
        """
        line, name = self.results[run.key], self.plan["score"]
        if has_diverged(line):
            return math.inf
        if name not in line["result"]:
            raise ValueError(f"score: {name!r} is not in the results of {run.key}, which have {[*line['result']]}.")
        score = line["result"][name]
        return math.inf if score is None or math.isnan(score) else score

    def is_done(self, run: Run) -> bool:
        """Whether a run is trained and, if the plan says so, evaluated."""
        line = self.results.get(run.key)
        wants_evaluation = run.round == "final" and "evaluate" in self.plan
        return line is not None and (not wants_evaluation or has_diverged(line) or "evaluation" in line)

    def ready(self) -> list[Run]:
        """The unfinished runs that can start now: short runs by their round, then the final ones by seed."""
        # By their key, because settings that are equal would be trained twice, side by side in one folder.
        waiting = {run.key: run for runs in self.latest().values() for run in runs if not self.is_done(run)}.values()

        def order(run: Run) -> tuple[bool, int]:
            is_final = run.round == "final"
            return is_final, run.flags["seed"] if is_final else run.round

        return sorted(waiting, key=order)

    def rounds_of(self, model: str) -> Iterator[list[Run]]:
        """Yield the runs of each round of a model, as long as the rounds before are finished and have a best run."""
        mine, best = self.plan["models"][model], None
        flags = self.plan["common"] | self.plan["tuning"] | mine["common"] | mine.get("tuning", {})
        for number, settings in enumerate(mine["rounds"], start=1):
            runs = [Run(model, number, flags | setting) for setting in settings]
            yield runs
            if not all(map(self.is_done, runs)):
                return
            best = min([*runs, *([best] if best else [])], key=self.score)
            if math.isinf(self.score(best)):
                return
            flags = best.flags
        flags = flags | self.plan["final"] | mine.get("final", {})
        yield [Run(model, "final", flags | {"seed": seed}) for seed in self.plan["seeds"]]

    def latest(self) -> dict[str, list[Run]]:
        """The runs of the latest round that each model has come to."""
        return {model: list(self.rounds_of(model))[-1] for model in self.plan["models"]}

    def stuck(self) -> list[str]:
        """The models that have no final runs, because no setting has a finite score."""
        latest = self.latest().items()
        return [model for model, runs in latest if runs[0].round != "final" and all(map(self.is_done, runs))]

    def add(self, run: Run, line: dict) -> None:
        """Write down a finished run.

        Raises:
            ValueError: if it has no score of the name in the plan.
        """
        self.results[run.key] = {"key": run.key, "model": run.model, "round": run.round, "flags": run.flags} | line
        replace_lines(self.results_file, self.results.values())
        self.score(run)

    def finals(self) -> dict[str, list[dict]]:
        """The lines of the finished final runs of each model that has any. Runs that the file no longer asks for do not
        count."""
        latest = self.latest().items()
        lines = {model: [self.results[run.key] for run in runs if self.is_done(run)] for model, runs in latest}
        return {model: of_it for model, of_it in lines.items() if of_it and of_it[0]["round"] == "final"}

    def table(self) -> list[dict]:
        """A row for each finished run: its score, and the flags that are not the same in all runs of its model."""
        rows = []
        for line in self.results.values():
            others = [other["flags"] for other in self.results.values() if other["model"] == line["model"]]
            special = {
                name: value
                for name, value in line["flags"].items()
                if any(other.get(name) != value for other in others)
            }
            words = " ".join(f"{name}={value}" for name, value in special.items())
            row = {name: line[name] for name in ("model", "round")}
            score = self.score(Run(line["model"], line["round"], line["flags"]))
            row[self.plan["score"]] = None if math.isinf(score) else score
            row["minutes"] = line["result"]["seconds"] / 60 if "seconds" in line["result"] else None
            rows.append(row | {"setting": words})
        return rows


def read_lines(file: Path) -> list[dict]:
    """The JSON objects of a file, one per line; none if there is no such file.

    Raises:
        ValueError: if a line is not JSON. The message names file and line.
    """
    objects = []
    for number, line in enumerate(file.read_text().splitlines() if file.is_file() else [], start=1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}, is not JSON ({error}): mend the line, or remove it.") from error
    return objects


def check_plan(file: Path, plan: dict) -> None:
    """Refuse a plan that lacks a name, has one that does not exist, or a value where names belong.

    Raises:
        ValueError: if it does.
    """
    if plan.keys() - {"evaluate"} != NAMES:
        raise ValueError(f"{file} must have the names {sorted(NAMES)}, and may have evaluate: it has {[*plan]}.")
    for name in ("common", "tuning", "final", "models", "evaluate"):
        check_kind(file, name, plan.get(name, {}), dict)
    check_kind(file, "seeds", plan["seeds"], list)
    if not plan["seeds"]:
        raise ValueError(f"{file}: seeds must have at least one seed.")
    for model, mine in plan["models"].items():
        check_kind(file, model, mine, dict)
        if not {"common", "rounds"} <= mine.keys() <= {"common", "rounds", "tuning", "final"}:
            raise ValueError(
                f"{file}: the model {model!r} must have common and rounds, and may have tuning and final: it has "
                f"{[*mine]}."
            )
        for name, value in mine.items():
            check_kind(file, f"{name} of {model}", value, list if name == "rounds" else dict)
        for settings in mine["rounds"]:
            check_kind(file, f"a round of {model}", settings, list)
            if not settings:
                raise ValueError(f"{file}: a round of {model} must have at least one setting.")
            for setting in settings:
                check_kind(file, f"a setting of {model}", setting, dict)


def check_kind(file: Path, name: str, value, kind: type[dict] | type[list]) -> None:
    """Refuse a value of another kind.

    Raises:
        ValueError: if it has another kind. The message says how to write none.
    """
    if not isinstance(value, kind):
        what = "names with values ({} for none)" if kind is dict else "a list ([] for none)"
        raise ValueError(f"{file}: {name} must be {what}, got {value!r}.")


def has_diverged(line: dict) -> bool:
    """Whether a line of results is that of a training that diverged. It has no score."""
    return "diverged" in line["result"]
