"""One training step by every gradient, and by peers: time, memory, and how near the gradient is to the exact one.

    python scripts/benchmark_training.py                                          # the shipped DEQ-Transformer
    python scripts/benchmark_training.py --model my-model --rows 8 --length 256
    python scripts/benchmark_training.py --precision                              # errors of the reversible gradient
    python scripts/benchmark_training.py --device cuda --dtype bfloat16 --hidden_size 768 --length 1024 --model fresh

A step is a forward and a backward pass of the loss. The ways take turns in one process. `ms` is the median over the
turns, `time` the ratio to the first row. `saved MB` is what autograd holds between forward and backward. `peak MB` is
the most that tensors take at once during the step, besides the weights (on an accelerator, the peak of allocated
memory). `1 - cos` and `error` compare the gradient of all weights with the exact gradient at the equilibrium,
in double precision. Explicit models have other weights, so they have no error. Without torchdeq its row is left out.

With --precision: the error of the reversible gradient against backpropagation through the same steps, in the same
precision of f.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from benchmarking import (
    FRESH,
    HARD,
    SHIPPED,
    DeviceArguments,
    TorchdeqGradient,
    double_precision,
    explicit_model,
    has_torchdeq,
    load,
    report,
    take_turns,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import hf_deq
from hf_deq import ImplicitGradient, PhantomGradient, PicardSolver, ReversibleGradient, UnrolledGradient
from hf_deq.commands import run
from hf_deq.data import read_recipe
from hf_deq.equilibrium import GradientEstimator, measured
from hf_deq.evaluation.activations import saved_bytes
from hf_deq.evaluation.operation_counts import LiveBytes
from hf_deq.reversible import most_steps
from hf_deq.tasks import TextArguments, held_out_text

EXPLICIT = "GPT-2, 12 layers"
COMPILED = "implicit, f compiled"


@dataclass
class TrainingBenchmarkArguments(DeviceArguments):
    """What is trained for a step, on how many tokens."""

    model: str = field(default=SHIPPED[0], metadata={"help": "Folder of a trained model, or fresh, or hard."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of a new model, with --model fresh."})
    rows: int = field(default=8, metadata={"help": "Sequences in a step."})
    length: int = field(default=128, metadata={"help": "Tokens of a sequence."})
    tolerance: float = field(default=1e-2, metadata={"help": "Of the solver, forward and backward."})
    seconds: float = field(default=3.0, metadata={"help": "How long each way is measured, about."})
    gpt2_layers: int = field(default=12, metadata={"help": "Layers of the explicit model."})
    precision: bool = field(default=False, metadata={"help": "Measure the reversible gradient's rounding errors."})
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 by autocast."})
    compiled: bool = field(default=False, metadata={"help": "Also a row with f compiled."})


def main(arguments: TrainingBenchmarkArguments) -> None:
    warnings.simplefilter("ignore", hf_deq.ConvergenceWarning)
    if arguments.precision:
        report("benchmark_training_precision", rounding_errors(arguments), arguments)
        return
    ids, ways = windows(arguments), gradients(arguments, has_torchdeq())
    models = {way: make_model(way, arguments) for way in ways}
    dtype = getattr(torch, arguments.dtype)
    steps = {
        way: partial(step, models[way], estimator, ids, arguments.tolerance, dtype) for way, estimator in ways.items()
    }
    times = take_turns(steps, arguments.seconds)
    exact, rows = exact_gradient(arguments, ids), []
    for way, estimator in ways.items():
        steps[way]()
        ours = None if estimator == EXPLICIT else flat_gradient(models[way])
        kept = saved_bytes(models[way], partial(loss_of, models[way], estimator, ids, dtype, arguments.tolerance))
        row = {"gradient": way, "ms": 1e3 * times[way], "time": times[way] / times[next(iter(ways))]}
        row |= {"saved MB": kept / 1e6, "peak MB": peak_bytes(models[way], steps[way]) / 1e6}
        rows.append(row | differences(ours, exact))
    report("benchmark_training", rows, arguments)


def gradients(arguments: TrainingBenchmarkArguments, peer: bool) -> dict[str, GradientEstimator | str]:
    """Every way to train: an estimator, or the name of an explicit model."""
    solver = hf_deq.AndersonSolver(arguments.tolerance)
    ways: dict[str, GradientEstimator | str] = {"implicit": ImplicitGradient(solver)}
    if arguments.compiled:
        ways[COMPILED] = ImplicitGradient(solver)
    for products in (1, 2, 4):
        ways[f"Neumann, {products} products"] = ImplicitGradient(PicardSolver(0.0, products))
    ways |= {"phantom, 5 steps": PhantomGradient(5, 0.5), "phantom, 1 step (Jacobian-free)": PhantomGradient(1, 1.0)}
    ways |= {f"reversible, {steps} steps": ReversibleGradient(steps, 0.8) for steps in (4, 8)}
    for steps in (8, 16):
        ways[f"unrolled, {steps} steps"] = UnrolledGradient(steps)
        ways[f"unrolled, {steps} steps, checkpointed"] = UnrolledGradient(steps, activation_checkpointing=True)
    if peer:
        ways["torchdeq, implicit"] = TorchdeqGradient(arguments.tolerance, 30)
    return ways | {f"GPT-2, {arguments.gpt2_layers} layers": EXPLICIT}


def make_model(way: str, arguments: TrainingBenchmarkArguments):
    """The model of a way, with its estimator; every call makes a new one with the same weights."""
    model = load(arguments.model)
    if arguments.hidden_size is not None:
        fields = dict(hidden_size=arguments.hidden_size, intermediate_size=4 * arguments.hidden_size)
        fields |= dict(num_attention_heads=arguments.hidden_size // 64, max_position_embeddings=arguments.length)
        fields |= dict(vocab_size=model.config.vocab_size)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deq_transformer", **fields))
    if way.startswith("GPT-2"):
        model = explicit_model("gpt2", model.config, arguments.gpt2_layers)
    if way == COMPILED:
        model.compile_f()
    return model.to(arguments.device).train()


def windows(arguments: TrainingBenchmarkArguments) -> Tensor:
    """Held-out windows `(rows, length)`."""
    folder = SHIPPED[0] if arguments.model in (FRESH, HARD) else arguments.model
    text = held_out_text(folder, read_recipe(folder), TextArguments(length=arguments.length))
    return text.windows(arguments.rows).to(arguments.device)


def loss_of(model, estimator: GradientEstimator | str, ids: Tensor, dtype: torch.dtype, tolerance: float) -> Tensor:
    """The loss, with an estimator in the place of the configured one. However it works, the tolerance is the same."""
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        if estimator == EXPLICIT:
            return model(ids, labels=ids, use_cache=False).loss
        layer = model.model.layers[0]
        layer.gradient_estimator = lambda dial: estimator
        try:
            return model(ids, labels=ids, use_cache=False, solver_tolerance=tolerance).loss
        finally:
            del layer.gradient_estimator


def step(model, estimator, ids: Tensor, tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    """One step without an optimizer."""
    model.zero_grad()
    loss_of(model, estimator, ids, dtype, tolerance).backward()


def exact_gradient(arguments: TrainingBenchmarkArguments, ids: Tensor) -> Tensor:
    """The gradient at the equilibrium, in double precision."""
    device = "cpu" if arguments.device == "mps" else arguments.device  # which has no double precision
    model, ids = double_precision(make_model("", arguments).to(device)), ids.to(device)
    config = model.config
    config.solver_tolerance = config.backward_tolerance = 1e-9
    config.solver_max_evaluations = config.backward_max_evaluations = 300
    config.gradient, config.backward_solver = "implicit", "anderson"
    model(ids, labels=ids, use_cache=False).loss.backward()
    return flat_gradient(model)


def flat_gradient(model) -> Tensor:
    return torch.cat([parameter.grad.flatten().cpu().double() for parameter in model.parameters()])


def differences(ours: Tensor | None, exact: Tensor) -> dict:
    """How far a gradient is from the exact one."""
    if ours is None:
        return {"1 - cos": None, "error": None}
    cosine = torch.nn.functional.cosine_similarity(ours, exact, dim=0).item()
    return {"1 - cos": max(1 - cosine, 0.0), "error": ((ours - exact).norm() / exact.norm()).item()}


def peak_bytes(model, work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` take at once."""
    model.zero_grad()  # the gradients of an earlier step are not there before this one
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        work()
    return live.most


@dataclass(frozen=True)
class BackpropagatedSteps:
    """The steps of the reversible gradient, with ordinary backpropagation: what it should be equal to."""

    steps: int
    beta: float

    def __call__(self, f: Callable, z0: Tensor, solver, texts=None):
        y = z = z0.double()
        for _ in range(self.steps):
            y = torch.lerp(y, f(z.to(z0.dtype)).to(y.dtype), self.beta)
            image = f(y.to(z0.dtype)).to(z.dtype)
            z = torch.lerp(z, image, self.beta)
        count = torch.full((len(z0),), 2 * self.steps)
        return measured(y.to(z0.dtype), image, z.to(z0.dtype), count, solver, texts)


def rounding_errors(arguments: TrainingBenchmarkArguments) -> list[dict]:
    """One row for each number of steps and beta: the errors in single and in half precision."""
    ids, rows = windows(arguments), []
    for steps in (4, 8, 16, 32):
        for beta in (0.3, 0.5, 0.8, 0.9):
            if steps > most_steps(beta):
                continue
            row = {"steps": steps, "beta": beta}
            for dtype in ("float32", "bfloat16"):
                found = []
                for estimator in (BackpropagatedSteps(steps, beta), ReversibleGradient(steps, beta)):
                    model = make_model("", arguments).to(getattr(torch, dtype))
                    step(model, estimator, ids, arguments.tolerance)
                    found.append(flat_gradient(model))
                row[f"error, {dtype}"] = differences(found[1], found[0])["error"]
            rows.append(row)
    return rows


if __name__ == "__main__":
    run(main, __doc__, TrainingBenchmarkArguments)
