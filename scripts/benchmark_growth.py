"""How a solve grows with the length of the text, the width and the batch, beside f itself.

    python scripts/benchmark_growth.py
    python scripts/benchmark_growth.py --lengths 64 256 1024 --figure growth.png     # log-log plot, needs matplotlib

Models are new, without gradients. `ms` is the median time of a solve, `f ms` that of f for as many evaluations, and
`memory` what the solve holds at most besides the output of f, in MB. The last rows fit `value ~ size ** exponent` for
the larger half of the sizes. Nothing should grow faster than f itself.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from benchmarking import ReportArguments, report, take_turns
from transformers import AutoConfig, AutoModelForCausalLM

import hf_deq
from hf_deq.commands import run
from hf_deq.evaluation.convergence import captured_map
from hf_deq.evaluation.operation_counts import LiveBytes
from hf_deq.layer_deq import Dial

SIZES = {
    "deq_transformer": lambda width: {"intermediate_size": 4 * width, "num_attention_heads": max(1, width // 32)},
    "deq_trellisnet": lambda width: {"intermediate_size": width},
    "deq_attractor": lambda width: {"intermediate_size": 3 * width, "num_attention_heads": max(1, width // 32)},
}
MEASURED = ("evaluations", "ms", "f ms", "memory")


@dataclass
class GrowthArguments(ReportArguments):
    """Which sizes are measured. Every other size stays at the first of its list."""

    model_types: list[str] = field(default_factory=lambda: list(SIZES), metadata={"help": "Which models."})
    lengths: list[int] = field(
        default_factory=lambda: [64, 128, 256, 512, 1024, 2048, 4096], metadata={"help": "Tokens of a text."}
    )
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512], metadata={"help": "Features of the state."})
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Texts at once."})
    tolerance: float = field(default=1e-3, metadata={"help": "Tolerance of the solver."})
    seconds: float = field(default=1.0, metadata={"help": "How long each size is measured, about."})
    figure: str | None = field(default=None, metadata={"help": "Also draw the growth into this file."})


@torch.no_grad()
def main(arguments: GrowthArguments) -> None:
    warnings.simplefilter("ignore", hf_deq.ConvergenceWarning)
    rows = []
    for model_type in arguments.model_types:
        for name in ("lengths", "widths", "batches"):
            sizes = sorted(getattr(arguments, name))
            rows += [measure(model_type, name, size, arguments) for size in sizes]
            rows.append(exponents([row for row in rows if (row["model"], row["grows"]) == (model_type, name)]))
    report("benchmark_growth", rows, arguments, shown=[row for row in rows if row["size"] == "exponent"])
    if arguments.figure:
        draw([row for row in rows if isinstance(row["size"], int)], arguments.figure)


def measure(model_type: str, name: str, size: int, arguments: GrowthArguments) -> dict:
    """One size: a solve, and f alone for as many evaluations."""
    usual = {"lengths": min(128, max(arguments.lengths)), "widths": min(128, max(arguments.widths)), "batches": 1}
    sizes = usual | {name: size}
    torch.manual_seed(0)
    width, length = sizes["widths"], sizes["lengths"]
    fields = dict(vocab_size=1000, hidden_size=width, max_position_embeddings=length) | SIZES[model_type](width)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    f, z0 = captured_map(model, torch.randint(3, 1000, (sizes["batches"], length)))
    solver = model.model.layers[0].forward_solver(Dial(solver_tolerance=arguments.tolerance))
    evaluations = int(solver(f, z0).num_evaluations.max())

    def f_alone():
        for _ in range(evaluations):
            f(z0)

    times = take_turns({"ms": lambda: solver(f, z0), "f ms": f_alone}, arguments.seconds / 2, least=2)
    with LiveBytes() as live:
        solver(live.uncounted(f), z0)
    row = {"model": model_type, "grows": name, "size": size, "evaluations": evaluations}
    return row | {way: 1e3 * seconds for way, seconds in times.items()} | {"memory": live.most / 1e6}


def exponents(rows: list[dict]) -> dict:
    """The slope of every quantity in log-log axes, over the larger half of the sizes."""
    upper = rows[-max(2, (len(rows) + 1) // 2) :]
    row = {"model": rows[0]["model"], "grows": rows[0]["grows"], "size": "exponent"}
    if len(upper) < 2:
        return row | dict.fromkeys(MEASURED)
    sizes = np.log([one["size"] for one in upper])
    slopes = {name: np.polyfit(sizes, np.log([one[name] for one in upper]), 1)[0] for name in MEASURED}
    return row | {name: round(float(slope), 3) + 0.0 for name, slope in slopes.items()}  # + 0.0: no minus before zero


def draw(rows: list[dict], file: str) -> None:
    """Draw time and memory against every size, in log-log axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 3, sharex="col")
    for column, name in enumerate(("lengths", "widths", "batches")):
        for model_type, color in zip(SIZES, ("#0072B2", "#D55E00", "#009E73"), strict=True):
            mine = [row for row in rows if (row["model"], row["grows"]) == (model_type, name)]
            sizes = [row["size"] for row in mine]
            panels[0, column].loglog(sizes, [row["ms"] for row in mine], color=color, marker="o", label=model_type)
            panels[0, column].loglog(sizes, [row["f ms"] for row in mine], color=color, linestyle=":")
            panels[1, column].loglog(sizes, [row["memory"] for row in mine], color=color, marker="o")
        panels[1, column].set_xlabel({"lengths": "tokens", "widths": "features", "batches": "texts"}[name])
    panels[0, 0].set_ylabel("ms of a solve (dotted: f alone)")
    panels[1, 0].set_ylabel("memory of the solver (MB)")
    panels[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    run(main, __doc__, GrowthArguments)
