"""Tune models with equal budgets, then train each best setting with several seeds: one queue, one file of results.

    python scripts/sweep.py model_cards/penn-treebank/sweep.yaml --set corpus=path/to/ptb --runs_dir runs
    python scripts/sweep.py model_cards/penn-treebank/sweep.yaml --show          # what is done, and what is left

The file of results lies beside the sweep: results.jsonl, a line for each finished run. A run whose line is there is not
run again, so a sweep can be stopped at any moment (Ctrl-C, or a kill) and started again. A run that was stopped in the
middle goes on from its last checkpoint, and a training that came to its end is only evaluated.

A sweep is a YAML file:

    score: validation_perplexity        # of the last line of metrics.jsonl; lower is better
    common: {task: copy_memory}         # flags of every run
    tuning: {max_steps: 500}            # flags of the short runs
    final: {max_steps: 2000}            # flags of the final runs
    seeds: [0, 1, 2]                    # of the final runs
    evaluate: {split: test}             # flags of the evaluation after a final run; without this line there is none
    models:
      gpt2:
        common: {model_type: gpt2}      # likewise tuning and final: flags of this model
        rounds:                         # each round tries its settings on top of the best so far; [] tries none
          - [{learning_rate: 1.0e-3}, {learning_rate: 3.0e-3}]
          - [{resid_pdrop: 0.0}]

A run has these flags and no others: no recipe adds to them. The models take their turns independently. All runs of a
model's round end before its next round starts. A training that diverges is a result, too, and never the best. If every
setting so far has diverged, a model has no further runs.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import yaml

from hf_deq.commands import run as run_command
from hf_deq.data import check_at_least, parse_recipe
from hf_deq.evaluation import format_table
from hf_deq.training.log import has_ended, parse_metrics, replace_lines

SCRIPTS = Path(__file__).parent
LATEST = 200  # steps that say how well a model fits its training text at the end
NAMES = {"score", "common", "tuning", "final", "seeds", "models"}  # of a sweep


@dataclass
class SweepArguments:
    """Where runs lie, and how many run side by side."""

    runs_dir: str = field(default="sweep-runs", metadata={"help": "Folder for the folders of the runs."})
    set: list[str] = field(
        default_factory=list, metadata={"help": "Flags that belong to this machine, such as corpus=path/to/ptb."}
    )
    workers: int = field(default=2, metadata={"help": "Runs side by side."})
    num_processes: int = field(
        default=1, metadata={"help": "CPU processes that share the batch of each run. Each has one thread."}
    )
    show: bool = field(default=False, metadata={"help": "Run nothing: print the results, and what is left."})

    def __post_init__(self):
        check_at_least(1, workers=self.workers, num_processes=self.num_processes)


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
        ValueError: if it lacks a name, or has one that does not exist.
    """

    def __init__(self, file: Path):
        self.plan = parse_recipe(file)
        check_plan(file, self.plan)
        self.results_file = file.with_name("results.jsonl")
        lines = self.results_file.read_text() if self.results_file.is_file() else ""
        self.results = {line["key"]: line for line in map(json.loads, lines.splitlines())}

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
        """The models that have no final runs, because every setting diverged."""
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


class Worker:
    """Trains runs in processes of their own.

    Args:
        runs_dir: folder for the folders of the runs.
        machine: flags that no result has, because they belong to this machine.
        evaluation: flags of the evaluation after a final run; `None` for no evaluation.
        num_processes: CPU processes of each training.

    Raises:
        ValueError: if a flag of the machine has no value.
    """

    def __init__(self, runs_dir: Path, machine: list[str], evaluation: dict | None, num_processes: int = 1):
        self.runs_dir, self.evaluation, self.num_processes = runs_dir, evaluation, num_processes
        if wrong := [pair for pair in machine if "=" not in pair]:
            raise ValueError(f"--set takes NAME=VALUE, such as corpus=path/to/ptb; got {wrong[0]!r}.")
        self.machine = flags_of(dict(pair.split("=", 1) for pair in machine))
        self.processes: set[subprocess.Popen] = set()
        self.stopping = threading.Event()

    def run(self, run: Run) -> dict | None:
        """Train and evaluate; the results, or `None` if the run was stopped.

        Raises:
            OSError: if a script fails. The message names the file with its output.
        """
        folder = self.runs_dir / run.key
        folder.mkdir(parents=True, exist_ok=True)
        line = self.trained(run, folder)
        if line is None or has_diverged(line) or run.round != "final" or self.evaluation is None:
            return line
        file = folder / "evaluation.json"
        command = ["evaluate.py", str(folder), *flags_of(self.evaluation), "--output", str(file)]
        if (status := self.call(command, folder)) is None:
            return None
        if status:
            raise OSError(f"an evaluation failed (exit status {status}): read {folder / 'evaluate.log'}.")
        return line | {"evaluation": json.loads(file.read_text())}

    def trained(self, run: Run, folder: Path) -> dict | None:
        """What a training measured, which may have ended earlier; `None` if it was stopped.

        Raises:
            OSError: if it did not come to its end.
        """
        status = 0 if is_finished(metrics_of(folder)) else self.train(run, folder)
        if status is None:
            return None
        metrics = metrics_of(folder)
        if not is_finished(metrics):
            raise OSError(f"a run did not come to its end (exit status {status}): read {folder / 'train.log'}.")
        line = {"result": metrics[-1], "validations": validations_of(metrics[:-1])}
        return line if has_diverged(line) else line | {"training_loss": latest_loss(metrics)}

    def train(self, run: Run, folder: Path) -> int | None:
        """Train to the end, from the last checkpoint if there is one; the exit status, or `None` if it was stopped."""
        recipe = folder / "flags.yaml"  # as flags, they would be added to the default recipe
        recipe.write_text(yaml.safe_dump(run.flags))
        flags = [*self.machine, "--output_dir", str(folder), "--num_threads", "1"]
        flags.append("--resume" if any((folder / "checkpoints").glob("step-*")) else "--overwrite")
        command = ["train.py", str(recipe), *flags]
        return self.call(command, folder, self.num_processes)

    def call(self, command: list[str], folder: Path, num_processes: int = 1) -> int | None:
        """Run a script; its exit status, or `None` if it was stopped."""
        if self.stopping.is_set():
            return None
        log = folder / f"{command[0].removesuffix('.py')}.log"
        environment, launcher = os.environ | {"OMP_NUM_THREADS": "1"}, []
        if num_processes > 1:
            environment["ACCELERATE_USE_CPU"] = "true"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        with open(log, "w") as output:
            command = [sys.executable, *launcher, str(SCRIPTS / command[0]), *command[1:]]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            self.processes.add(process)
            if self.stopping.is_set():  # since the test above
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self.processes.discard(process)
        return None if code and self.stopping.is_set() else code

    def stop(self, *signal_and_frame) -> None:
        """Ask the running trainings to save a checkpoint and end."""
        self.stopping.set()
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)


def metrics_of(folder: Path) -> list[dict]:
    """What a run has logged so far."""
    file = folder / "metrics.jsonl"
    return parse_metrics(file.read_text()) if file.is_file() else []


def is_finished(metrics: list[dict]) -> bool:
    """Whether a training came to its end, or diverged."""
    return bool(metrics) and has_ended(metrics[-1])


def has_diverged(line: dict) -> bool:
    """Whether a line of results is that of a training that diverged. It has no score."""
    return "diverged" in line["result"]


def latest_loss(metrics: list[dict]) -> float | None:
    """The mean training loss of the last `LATEST` steps; `None` if no loss of these was finite."""
    last = metrics[-1]["step"]
    losses = [line["loss"] for line in metrics if "loss" in line and line["step"] > last - LATEST]
    return statistics.mean(losses) if losses else None


def validations_of(metrics: list[dict]) -> list[dict]:
    """The lines of validations."""
    return [line for line in metrics if any(name.startswith("validation_") for name in line)]


def flags_of(values: dict) -> list[str]:
    """A command line of names and values. A list is several words."""
    words = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [word for name, of_it in words.items() for word in (f"--{name}", *map(str, of_it))]


def main(file: str, arguments: SweepArguments) -> None:
    """Run what is not finished, and print the results."""
    sweep = Sweep(Path(file))
    if not arguments.show:
        evaluation = sweep.plan.get("evaluate")
        worker = Worker(Path(arguments.runs_dir), arguments.set, evaluation, arguments.num_processes)
        run_all(sweep, worker, arguments.workers)
    print(format_table(sweep.table()) if sweep.results else "no run is finished")
    for model in sweep.stuck():
        print(f"\n{model} has no final runs: every setting diverged")
    left = sweep.ready()
    print(f"\n{len(left)} runs can start next, {[run.key for run in left]}" if left else "\nevery run is finished")


def run_all(sweep: Sweep, worker: Worker, workers: int) -> None:
    """Train until every run is finished, a run fails, or a signal stops the sweep. Other runs under way end first.

    Raises:
        OSError: if a run failed.
        ValueError: if a run has no score of the name in the plan.
    """
    handlers = {number: signal.signal(number, worker.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    running: dict[Future, Run] = {}
    failures: list[OSError | ValueError] = []
    with ThreadPoolExecutor(workers) as pool:
        while True:
            if not worker.stopping.is_set() and not failures:
                start(sweep, worker, pool, running, workers)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    if (line := future.result()) is not None:
                        sweep.add(run, line)
                except (OSError, ValueError) as error:
                    failures.append(error)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if failures:
        raise failures[0]


def start(sweep: Sweep, worker: Worker, pool: ThreadPoolExecutor, running: dict[Future, Run], workers: int) -> None:
    """Start as many of the waiting runs as there are free workers."""
    busy = {run.key for run in running.values()}
    for run in [run for run in sweep.ready() if run.key not in busy][: workers - len(running)]:
        print(f"{run.key} ({run.model}, {run.round})", flush=True)
        running[pool.submit(worker.run, run)] = run


if __name__ == "__main__":
    run_command(main, __doc__, SweepArguments, file="The YAML file of the sweep.")
