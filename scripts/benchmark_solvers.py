"""Our solvers against torchdeq's, on the f of trained and new models: evaluations, time, operations, memory.

    python scripts/benchmark_solvers.py                                      # the shipped models, a new f, a hard f
    python scripts/benchmark_solvers.py --models my-model --states 1x256     # one row of 256 tokens

The solvers take turns on the same f, with the same start and the same tolerance, in one process. A time is the median
over the turns, and `ratio` is the time of torchdeq divided by ours. torchdeq stops when the residual of every whole
row is at the tolerance. Our solvers stop when the residual of every position is. Therefore the row `torchdeq, worst
position` gives torchdeq a tolerance at which its worst position reaches the tolerance too. A row with `lam` gives
torchdeq's Anderson the number of our regularization (absolute there, relative here) in place of 1e-4, its default.
`operations` counts the
operations outside of f in each evaluation, views included. `memory` is what a solve holds besides the output of f, in
states. `fresh` is a new DEQ-Transformer, `hard` one with larger weights, whose f is less contractive. Without torchdeq
(`pip install -e ".[bench]"`) its rows are left out.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from benchmarking import FRESH, HARD, SHIPPED, DeviceArguments, has_torchdeq, load, report, take_turns, title
from torch import Tensor

import hf_deq
from hf_deq.commands import run
from hf_deq.data import read_recipe
from hf_deq.evaluation.convergence import captured_map
from hf_deq.evaluation.operation_counts import CountOperations, LiveBytes
from hf_deq.fixed_point import SOLVERS
from hf_deq.position_algebra import GRAM_REGULARIZATION, own_residuals
from hf_deq.tasks import TextArguments, held_out_text
from hf_deq.weight_tying import keeping_weights

TORCHDEQ_NAMES = {"anderson": "anderson", "broyden": "broyden", "picard": "fixed_point_iter"}


@dataclass
class SolverBenchmarkArguments(DeviceArguments):
    """What is solved, how exactly, and how often."""

    models: list[str] = field(
        default_factory=lambda: [*SHIPPED, FRESH, HARD], metadata={"help": "Folders of trained models, fresh, hard."}
    )
    states: list[str] = field(
        default_factory=lambda: ["8x128", "1x128", "1x1"], metadata={"help": "Rows x positions of the states."}
    )
    tolerances: list[float] = field(default_factory=lambda: [1e-3, 1e-5], metadata={"help": "Tolerances."})
    solvers: list[str] = field(default_factory=lambda: list(SOLVERS), metadata={"help": "Which solvers."})
    max_evaluations: int = field(default=60, metadata={"help": "Budget of evaluations of f."})
    seconds: float = field(default=1.0, metadata={"help": "How long each solver is measured, about."})


def main(arguments: SolverBenchmarkArguments) -> None:
    warnings.simplefilter("ignore", hf_deq.ConvergenceWarning)
    rows, peer = [], has_torchdeq()
    for name in arguments.models:
        model = load(name).to(arguments.device)
        for state in arguments.states:
            batch, length = (int(size) for size in state.split("x"))
            f, z0 = captured_map(model, windows(name, model, batch, length).to(arguments.device))
            for tolerance in arguments.tolerances:
                named = {"model": title(name), "state": state, "tolerance": tolerance}
                with keeping_weights():
                    rows += [named | row for row in compare(f, z0, tolerance, arguments, peer)]
    report("benchmark_solvers", rows, arguments)


def windows(name: str, model, batch: int, length: int) -> Tensor:
    """Held-out text for a trained model, random tokens for a new one."""
    if name in (FRESH, HARD):
        return torch.randint(3, model.config.vocab_size, (batch, length))
    return held_out_text(name, read_recipe(name), TextArguments(length=length)).windows(batch)


@torch.no_grad()
def compare(f: Callable, z0: Tensor, tolerance: float, arguments: SolverBenchmarkArguments, peer: bool) -> list[dict]:
    """One row for each solver of ours, and of torchdeq's."""
    rows = []
    for name in arguments.solvers:
        ours = SOLVERS[name](tolerance, arguments.max_evaluations)
        ways = {f"{name}": lambda f, ours=ours: ours(f, z0).image}
        ways |= torchdeq_ways(name, f, z0, tolerance, arguments.max_evaluations) if peer else {}
        times = take_turns({way: partial(solve, f) for way, solve in ways.items()}, arguments.seconds)
        for way, solve in ways.items():
            counted = measure(solve, f, z0)
            rows.append({"solver": way} | counted | {"ms": times[way] * 1e3, "ratio": times[way] / times[name]})
    return rows


def torchdeq_ways(name: str, f: Callable, z0: Tensor, tolerance: float, budget: int) -> dict[str, Callable]:
    """torchdeq's solver of that name at this tolerance, and at one at which its worst position reaches it; Anderson
    also with our regularization."""
    if name not in TORCHDEQ_NAMES:
        return {}
    from torchdeq.solver import get_solver

    solver = get_solver(TORCHDEQ_NAMES[name])

    def at(tolerance: float, **options) -> Callable:
        return lambda f: solver(f, z0, max_iter=budget, tol=tolerance, stop_mode="rel", **options)[0]

    def at_worst_position(**options) -> Callable:
        stricter = tolerance
        while worst_residual(f, at(stricter, **options)(f)) > tolerance and stricter > tolerance / 100:
            stricter /= 1.5
        return at(stricter, **options)

    ways = {f"torchdeq {name}": at(tolerance), f"torchdeq {name}, worst position": at_worst_position()}
    if name == "anderson":
        how = f"lam={GRAM_REGULARIZATION:g}"
        ways[f"torchdeq anderson, {how}, worst position"] = at_worst_position(lam=GRAM_REGULARIZATION)
    return ways


def worst_residual(f: Callable, state: Tensor) -> float:
    """The relative residual of the worst position."""
    return own_residuals(state, f(state)).max().item()


def measure(solve: Callable, f: Callable, z0: Tensor) -> dict:
    """What a solve takes that has no noise."""
    calls = 0

    def counted(z):
        nonlocal calls
        calls += 1
        return f(z)

    with CountOperations() as operations:
        state = solve(operations.uncounted(counted))
    evaluations = calls
    with LiveBytes() as live:
        solve(live.uncounted(f))
    return {
        "evaluations": evaluations,
        "operations": operations.total / evaluations,
        "memory": live.most / z0.nbytes,
        "worst residual": worst_residual(f, state),
    }


if __name__ == "__main__":
    run(main, __doc__, SolverBenchmarkArguments)
