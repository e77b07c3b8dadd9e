"""How an equilibrium is approached, and what training through it keeps: the measurements behind the paper's figures.

    windows = held_out_windows(stream.ids, count=16, length=128)
    residual_trajectories(model, windows, ["anderson", "picard"], budget=30)      # figures 2 (right) and 4
    activations_by_depth(model, windows, [1, 2, 4, 8])                            # the claim of figure 1
    evaluations_over_training("deq-model/metrics.jsonl")                          # figure 2 (left)

Figures are those of Bai, Kolter & Koltun 2019 (arXiv 1909.01377); figure 3 is `evaluation.dial_table`. A measurement
leaves the model as it was: weights, mode and random state. `scripts/plot_convergence.py` draws what is measured here.
"""

import json
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .equilibrium import equilibrium
from .evaluation import evaluating
from .fixed_point import SOLVERS, ConvergenceWarning, FixedPointSolver
from .layer_deq import make_solver
from .modeling_deq import DEQPreTrainedModel
from .position_algebra import relative_residual, square_norm

TRAINING_COLUMNS = ("step", "forward_evaluations", "backward_evaluations", "residual", "loss")


def held_out_windows(ids: Tensor, count: int, length: int) -> Tensor:
    """Windows spread evenly over a stream of token ids `(tokens,)`, shape `(count, length)`.

    They overlap where the stream is shorter than `count * length`.

    Raises:
        ValueError: `count` or `length` is not positive, or the stream is shorter than one window.
    """
    if count < 1 or length < 1:
        raise ValueError(f"count and length must be at least 1, got {count} and {length}.")
    if len(ids) < length:
        raise ValueError(f"a window of length={length} does not fit a stream of {len(ids)} tokens: lower length.")
    starts = torch.linspace(0, len(ids) - length, count, dtype=torch.float64).long()
    return ids[starts[:, None] + torch.arange(length)]


@torch.no_grad()
def residual_trajectories(
    model: DEQPreTrainedModel, input_ids: Tensor, solvers: Sequence[str], budget: int
) -> dict[str, np.ndarray]:
    """The relative residual at every evaluation of f, for several solvers from the same start.

    Solvers have the configured scope, history and damping, except that `"picard"` is not damped: plain iteration is
    the deep weight-tied stack that it is compared with, whatever estimator the model was trained by.

    Args:
        model: a deep equilibrium model, with or without its language modelling head.
        input_ids: `(batch, sequence)`, without padding.
        solvers: names in `SOLVERS`.
        budget: evaluations of f, at least 1; the tolerance is zero.

    Returns:
        For each solver, float64 `(batch, budget)`: `||f(z) - z|| / ||f(z)||` of every row at its 1st, 2nd, ...
        evaluation. These are residuals of iterates, not the best so far, so they may rise. A solve that rounding ends
        before its budget stays where it is.

    Raises:
        ValueError: a solver has no such name, or the budget is not positive.
    """
    unknown = [name for name in solvers if name not in SOLVERS]
    if unknown:
        raise ValueError(f"solvers must be among {sorted(SOLVERS)}, got {unknown}.")
    input_ids, trajectories = input_ids.to(model.device), {}
    for name in solvers:
        solver = _plain_or_configured(name, model.config, budget)
        with evaluating(model), _unconverged_on_purpose(), recorded_residuals(model, solver) as residuals:
            model.base_model(input_ids, use_cache=False)
        # After its budget a solver may evaluate its best iterate once more; after an early end nothing moves.
        kept = residuals[:budget] + residuals[-1:] * (budget - len(residuals))
        trajectories[name] = torch.stack(kept, 1).double().cpu().numpy()
    return trajectories


@contextmanager
def recorded_residuals(model: DEQPreTrainedModel, solver: FixedPointSolver) -> Iterator[list[Tensor]]:
    """Within this context the model solves by `solver`, without gradients, and says how every evaluation went.

    Yields:
        A list that grows by one tensor `(batch,)` for each call of f: the relative residual of the state it was
        called with. The last one is the residual that the solve reports.
    """
    (layer,), residuals = model.base_model.layers, []

    def solve(f, z0, dial):
        def recorded(z):
            f_z = f(z)
            residuals.append(relative_residual(square_norm(f_z - z).sum(1), square_norm(f_z).sum(1)))
            return f_z

        with torch.no_grad():
            return equilibrium(recorded, z0, solver), None

    layer.solve = solve  # on the instance, in front of the method of its class
    try:
        yield residuals
    finally:
        del layer.solve


def activations_by_depth(model: DEQPreTrainedModel, input_ids: Tensor, depths: Sequence[int]) -> dict[str, list[int]]:
    """Bytes that a training step keeps for backward: the model's own gradient against the explicit stack's.

    Args:
        model: a deep equilibrium language model.
        input_ids: `(batch, sequence)`; the labels too.
        depths: evaluations of f, each at least 1: the solver's whole budget, or so many unrolled steps.

    Returns:
        `saved_activation_bytes` at each depth, under the name of the configured estimator (`config.gradient`) and
        under `"unrolled"`.
    """
    own = [
        saved_activation_bytes(model, input_ids, solver_max_evaluations=depth, solver_tolerance=0.0) for depth in depths
    ]
    unrolled = [saved_activation_bytes(model, input_ids, unroll_steps=depth) for depth in depths]
    return {model.config.gradient: own, "unrolled": unrolled}


def saved_activation_bytes(model: DEQPreTrainedModel, input_ids: Tensor, **dial) -> int:
    """Bytes that autograd holds between the forward and the backward pass of one training step.

    Counted are the distinct storages of all tensors that the graph of the loss has saved, those of parameters and
    buffers left out. Not counted is what a solver needs while it runs, which its history bounds, and the one state by
    which the implicit gradient remembers f(z).

    Args:
        model: a deep equilibrium language model; taken in training mode, dropout and regularization as configured and
            drawn alike in every call.
        input_ids: `(batch, sequence)`; the labels too.
        dial: `solver_tolerance`, `solver_max_evaluations` or `unroll_steps` for the model's forward.

    Raises:
        ValueError: the budget or the number of steps is not positive.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    input_ids, held = input_ids.to(model.device), weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        held.add(saved)  # weakly: what the graph lets go of during the forward pass is not kept
        return saved

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
    with _training(model), _unconverged_on_purpose(), torch.enable_grad(), hooks:
        outputs = model(input_ids, labels=input_ids, use_cache=False, **dial)
    storages = [saved.tensor.untyped_storage() for saved in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
    del outputs  # until here, since it owns the graph
    return sum(sizes.values())


def evaluations_over_training(metrics_file: str | Path) -> dict[str, np.ndarray]:
    """What a training run logged of its solves.

    Args:
        metrics_file: the `metrics.jsonl` of a run; lines of validation are skipped.

    Returns:
        Arrays of one length: `step`; `forward_evaluations` (calls of f) and `backward_evaluations` (vector-Jacobian
        products), means per sequence; `residual`, relative; `loss`, nats. Not a number where a step did not log a
        value: shallow pretraining has no backward solve.

    Raises:
        ValueError: the file is not there, or has no line of training.
    """
    metrics_file = Path(metrics_file)
    if not metrics_file.is_file():
        raise ValueError(f"there is no metrics file {metrics_file}: name a metrics.jsonl that scripts/train.py wrote.")
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    lines = [line for line in lines if "forward_evaluations" in line]
    if not lines:
        raise ValueError(f"{metrics_file} has no line with forward_evaluations: train for more steps than it logs.")
    return {name: np.array([line.get(name, math.nan) for line in lines]) for name in TRAINING_COLUMNS}


class _Saved:
    """A saved tensor that can be referred to weakly."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _plain_or_configured(name: str, config, budget: int) -> FixedPointSolver:
    damping = 1.0 if name == "picard" else config.solver_damping
    return make_solver(name, 0.0, budget, config.solver_history, damping, config.solver_scope)


@contextmanager
def _unconverged_on_purpose() -> Iterator[None]:
    """No warning for a solve that is cut short; one that should converge can still give its first one later."""
    warned = set(FixedPointSolver._warned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            yield
        finally:
            FixedPointSolver._warned.intersection_update(warned)


@contextmanager
def _training(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model is in training mode and draws the same random numbers every time."""
    was_training = model.training
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        model.train()
        try:
            yield
        finally:
            model.train(was_training)
