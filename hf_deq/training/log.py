"""The log of a training run: means over steps, the file metrics.jsonl, and the text of the progress bar."""

import json
import math
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from ..evaluation import finite

logger = logging.get_logger(__name__)

TRAINING_COLUMNS = ("step", "forward_evaluations", "backward_evaluations", "residual", "loss")
# How the progress bar shows the values that a line may have.
SUMMARY = {
    "loss": "loss {:.3g}",
    "perplexity": "ppl {:.4g}",
    "forward_evaluations": "evals {:.1f}",
    "backward_evaluations": "back {:.1f}",
    "residual": "res {:.0e}",
    "tokens_per_second": "{:.0f} tok/s",
}
# With a summary, the bar fits into 100 columns. It shows tokens per second instead of steps per second.
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BLOCKS = "▁▂▃▄▅▆▇█"


class MetricsFile:
    """The file metrics.jsonl, one JSON object per line. The main process writes it. Trackers get the same numbers."""

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.path, self.accelerator = folder / "metrics.jsonl", accelerator

    def write(self, line: dict) -> None:
        """Append a line, which must have a `step`."""
        self.accelerator.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=line["step"])
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(finite(line)) + "\n")

    def keep_until(self, step: int) -> None:
        """Drop the lines of steps after `step`, because these steps will be taken again. With 0, drop all steps.

        What was said at the end of a run is dropped, too, because a run that goes on ends again.
        """
        if self.accelerator.is_main_process and self.path.is_file():
            lines = parse_metrics(self.path.read_text())
            replace_lines(self.path, [line for line in lines if line["step"] <= step and not has_ended(line)])
        self.accelerator.wait_for_everyone()


def is_report(line: dict) -> bool:
    """Whether a line of metrics.jsonl is the report at the end of a run. Only this line counts the tokens."""
    return "num_tokens" in line


def has_ended(line: dict) -> bool:
    """Whether a run ended with this line of metrics.jsonl: with its report, or because it diverged."""
    return is_report(line) or "diverged" in line


def replace_lines(file: Path, lines: Iterable[dict]) -> None:
    """Write a file of JSON objects, one per line. It is replaced in one operation, so that a kill loses no line."""
    new = file.with_suffix(".new")
    new.write_text("".join(json.dumps(finite(line)) + "\n" for line in lines))
    new.replace(file)


def parse_metrics(text: str) -> list[dict]:
    """Return the complete lines of a metrics.jsonl.

    A run that is killed while it writes leaves an incomplete line. Such lines are left out, with a warning.
    """
    whole, broken = [], 0
    for line in text.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict) and "step" in parsed:
            whole.append(parsed)
        else:
            broken += 1
    if broken:
        logger.warning(f"{broken} line(s) of metrics.jsonl are not whole and are left out.")
    return whole


class Clock:
    """Counts the seconds spent on training. It does not count within `paused`, and can continue from a checkpoint."""

    spent: float
    started: float | None  # None while it is paused

    def __init__(self):
        self.resume(0.0)

    def seconds(self) -> float:
        return self.spent + (0 if self.started is None else time.perf_counter() - self.started)

    def resume(self, spent: float) -> None:
        """Continue from this number of seconds."""
        self.spent, self.started = spent, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[float]:
        """Within this context, the clock does not count. It gives the seconds until here."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the pending work of the device still belongs to training
        self.spent, self.started = self.seconds(), None
        try:
            yield self.spent
        finally:
            self.resume(self.spent)


class Meter:
    """Means of the logged values since the last line. Sums stay on the device, so the host does not wait for it."""

    def __init__(self, device: torch.device, clock: Clock):
        self.device, self.clock = device, clock
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self.started = self.clock.seconds()

    def add(self, **values: torch.Tensor) -> None:
        """Add one value for each name, a scalar tensor. Values that are not finite are left out."""
        for name, value in values.items():
            is_finite = torch.isfinite(value.detach())
            self.sums[name] = self.sums.get(name, 0) + torch.where(is_finite, value.detach().float(), 0)
            self.counts[name] = self.counts.get(name, 0) + is_finite.float()

    def means(self) -> dict[str, float]:
        """Return the mean for every name over all processes. A name without any finite value has no mean."""
        totals = self.totals()
        counts = totals["counts"]
        return {name: total / counts[name] for name, total in totals["sums"].items() if counts[name]}

    def totals(self) -> dict[str, dict[str, float]]:
        """Return sums and counts over all processes. Processes may have added different names."""
        mine = {
            part: {name: float(value) for name, value in values.items()}
            for part, values in (("sums", self.sums), ("counts", self.counts))
        }
        everyone = gather_object([mine])
        return {
            part: {name: sum(one[part].get(name, 0) for one in everyone) for one in everyone for name in one[part]}
            for part in mine
        }

    def resume(self, state: dict) -> None:
        """Continue from the `totals` of a checkpoint."""
        self.sums, self.counts = (
            {name: torch.tensor(value, device=self.device) for name, value in state[part].items()}
            for part in ("sums", "counts")
        )

    def seconds(self) -> float:
        return self.clock.seconds() - self.started


class Summary:
    """Summarises a line of training metrics for the progress bar.

    After the number of evaluations of f, it shows a small chart of this number over the last six lines, if the encoding
    of the terminal has the characters.
    """

    def __init__(self, encoding: str | None):
        encoding = encoding or "ascii"
        can_show = BLOCKS.encode(encoding, "ignore").decode(encoding) == BLOCKS
        self.evaluations: deque[float] = deque(maxlen=6 if can_show else 0)

    def __call__(self, line: dict) -> str:
        words = {name: form.format(line[name]) for name, form in SUMMARY.items() if name in line}
        if "forward_evaluations" in line:
            self.evaluations.append(line["forward_evaluations"])
            words["forward_evaluations"] += f" {sparkline(self.evaluations)}".rstrip()
        return " ".join(words.values())


def sparkline(values: Collection[float]) -> str:
    """Return one block character for each value: a low block for the lowest, a high block for the highest value.

    If the values differ by less than one, the heights of the blocks differ less, too.
    """
    low, high = min(values, default=0), max(values, default=0)
    steps = (len(BLOCKS) - 1) / max(1, high - low)
    return "".join(BLOCKS[round((value - low) * steps)] for value in values)


def evaluations_over_training(metrics_file: str | Path) -> dict[str, np.ndarray]:
    """Read what a training run logged about its solves.

    Args:
        metrics_file: the `metrics.jsonl` of a run. Lines of validation are skipped.

    Returns:
        Arrays of equal length: `step`; `forward_evaluations` (calls of f) and `backward_evaluations` (vector-Jacobian
        products), means per sequence; `residual`, the relative residual; `loss`, in nats. A value is NaN if its line
        did not log it: for example, shallow pretraining has no backward solve.

    Raises:
        ValueError: if the file is missing, or has no training line.
    """
    metrics_file = Path(metrics_file)
    if not metrics_file.is_file():
        raise ValueError(f"there is no metrics file {metrics_file}: name a metrics.jsonl that scripts/train.py wrote.")
    lines = [line for line in parse_metrics(metrics_file.read_text()) if "forward_evaluations" in line]
    if not lines:
        raise ValueError(f"{metrics_file} has no line with forward_evaluations: train for more steps than it logs.")
    return {name: np.array([line.get(name, math.nan) for line in lines]) for name in TRAINING_COLUMNS}
