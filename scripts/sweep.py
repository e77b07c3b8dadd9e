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
model's round end before its next round starts. A training that diverges is a result, too, and never the best. If no
setting so far has a finite score, a model has no further runs.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from sweep_plan import Run, Sweep, has_diverged

from hf_deq.commands import run as run_command
from hf_deq.data import check_at_least
from hf_deq.evaluation import format_table
from hf_deq.training.folder import locked
from hf_deq.training.log import has_ended, parse_metrics

SCRIPTS = Path(__file__).parent
LATEST = 200  # steps that say how well a model fits its training text at the end


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
        with alone_with(sweep.results_file):
            sweep = Sweep(Path(file))  # another sweep may have ended since it was read
            run_all(sweep, worker, arguments.workers)
    print(format_table(sweep.table()) if sweep.results else "no run is finished")
    for model in sweep.stuck():
        print(f"\n{model} has no final runs: no setting has a finite score")
    left = sweep.ready()
    print(f"\n{len(left)} runs can start next, {[run.key for run in left]}" if left else "\nevery run is finished")


def alone_with(results_file: Path) -> AbstractContextManager[None]:
    """Within this context no other sweep can write to this file: each would write its results over those of the other.

    Raises:
        ValueError: if another one runs.
    """
    refusal = f"another sweep runs that writes {results_file}: wait for its end, or run more --workers there."
    return locked(results_file.with_name(".sweep"), refusal)


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
