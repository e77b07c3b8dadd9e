"""What a tolerance guarantees: how far predictions are from those at the equilibrium, in nats, at the worst position.

    python scripts/measure_tolerances.py                                        # the shipped models
    python scripts/measure_tolerances.py --models my-model --lengths 256

Held-out windows are solved at each tolerance, within the model's own budget, and at the equilibrium (in double
precision, to a residual of 1e-7). `worst` and `mean` are Kullback-Leibler divergences over all positions of all
windows; `worst, flagged` is the worst among windows that were flagged converged.
"""

import warnings
from dataclasses import dataclass, field

import torch
from benchmarking import SHIPPED, ReportArguments, report, title
from transformers import AutoModelForCausalLM

import hf_deq
from hf_deq.commands import run
from hf_deq.data import read_recipe
from hf_deq.evaluation.convergence import Divergence, divergences
from hf_deq.tasks import TextArguments, held_out_text

TOKENS_AT_ONCE = 4096


@dataclass
class ToleranceArguments(ReportArguments):
    """Which models, on how many windows of which lengths, at which tolerances."""

    models: list[str] = field(default_factory=lambda: list(SHIPPED), metadata={"help": "Folders of trained models."})
    lengths: list[int] = field(default_factory=lambda: [128, 256, 512], metadata={"help": "Tokens of a window."})
    windows: int = field(default=120, metadata={"help": "Windows of each length, spread over the held-out text."})
    tolerances: list[float] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3], metadata={"help": "Tolerances."})


def main(arguments: ToleranceArguments) -> None:
    warnings.simplefilter("ignore", hf_deq.ConvergenceWarning)
    rows = []
    for folder in arguments.models:
        model = AutoModelForCausalLM.from_pretrained(folder)
        for length in arguments.lengths:
            text = held_out_text(folder, read_recipe(folder), TextArguments(length=length))
            batches = text.windows(arguments.windows).split(max(1, TOKENS_AT_ONCE // length))
            measured = [divergences(model, batch, arguments.tolerances) for batch in batches]
            for tolerance in arguments.tolerances:
                parts = zip(*(batch[tolerance] for batch in measured), strict=True)
                named = {"model": title(folder), "length": length, "tolerance": tolerance}
                rows.append(named | summary(Divergence(*map(torch.cat, parts))))
    report("measure_tolerances", rows, arguments)


def summary(measured: Divergence) -> dict:
    """One row of the table."""
    worst = measured.nats.amax(1)
    return {
        "evaluations": measured.num_evaluations.double().mean().item(),
        "not converged": (~measured.converged).sum().item(),
        "worst": worst.max().item(),
        "worst, flagged": worst[measured.converged].max().item() if measured.converged.any() else float("nan"),
        "mean": measured.nats.mean().item(),
    }


if __name__ == "__main__":
    run(main, __doc__, ToleranceArguments)
