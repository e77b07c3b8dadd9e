"""How solvers approach an equilibrium: the measurements for the paper's figures.

    windows = held_out_windows(stream.ids, count=16, length=128)
    residual_trajectories(model, windows, ["anderson", "picard"], budget=30)      # figures 2 (right) and 4
    evaluations_to_tolerance(token_trajectories(model, ids, budget=30), 1e-3)     # evaluations for every token
    spectral_radii(model, windows)                                                # how contractive f is there

Figure numbers are those of Bai, Kolter & Koltun 2019 (arXiv 1909.01377). `reports.evaluate_dial` measures figure 3. A
measurement does not change the model's weights and mode, or the random state. `figures.py` draws the measurements.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..equilibrium import equilibrium
from ..fixed_point import SOLVERS, ConvergenceWarning, FixedPointSolver, PicardSolver, SequenceMap
from ..jacobian import spectral_radius
from ..layer_deq import make_solver
from ..modeling_deq import DEQForCausalLM, DEQPreTrainedModel
from ..position_algebra import own_residuals, widest_dtype
from .scoring import evaluating


def held_out_windows(ids: Tensor, count: int, length: int) -> Tensor:
    """Return windows spread evenly over a stream of token ids `(tokens,)`, shape `(count, length)`.

    The windows overlap if the stream is shorter than `count * length`.

    Raises:
        ValueError: if `count` or `length` is not positive, or the stream is shorter than one window.
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
    """Return the relative residual at every evaluation of f, for several solvers from the same start.

    Solvers have the configured scope, history and damping, except that `"picard"` is not damped. Undamped iteration is
    the deep weight-tied stack, with which the solvers are compared. This holds for every gradient estimator that a
    model was trained with.

    Args:
        model: a deep equilibrium model, with or without its language modelling head.
        input_ids: `(batch, sequence)`, without padding.
        solvers: names in `SOLVERS`.
        budget: number of evaluations of f, at least 1. The tolerance is zero.

    Returns:
        For each solver, float64 `(batch, budget)`: `||f(z) - z|| / ||f(z)||` of every row's worst position at the
        1st, 2nd, ... evaluation. These are the residuals of the iterates, not the smallest residuals so far, so they
        may rise. If rounding ends a solve before its budget, the last residual is repeated.

    Raises:
        ValueError: if a name is not in `SOLVERS`, or the budget is not positive.
    """
    unknown = [name for name in solvers if name not in SOLVERS]
    if unknown:
        raise ValueError(f"solvers must be among {sorted(SOLVERS)}, got {unknown}.")
    input_ids, trajectories = input_ids.to(model.device), {}
    for name in solvers:
        solver = _configured(name, model.config, budget, damping=1.0 if name == "picard" else None)
        with evaluating(model), unconverged_on_purpose(), recorded_residuals(model, solver) as residuals:
            model.base_model(input_ids, use_cache=False)
        trajectories[name] = _stacked([residual.amax(1) for residual in residuals], budget, dim=1)
    return trajectories


@torch.no_grad()
def token_trajectories(model: DEQPreTrainedModel, input_ids: Tensor, budget: int) -> np.ndarray:
    """Return the relative residual of every token's state at every evaluation of f, with the configured solver.

    The tolerance is zero, so that no token stops while others still move. Still, in causal scope, the column of a token
    depends only on the tokens up to it. So this column is the same in all texts with the same beginning.

    Args:
        model: a deep equilibrium model, with or without its language modelling head. Its gradient must not be
            `"unrolled"`.
        input_ids: `(tokens,)`, one text.
        budget: number of evaluations of f, at least 1.

    Returns:
        Float64 `(budget, tokens)`: `||f(z)_t - z_t|| / ||f(z)_t||` at the 1st, 2nd, ... evaluation. If the solve starts
        from the zero state, the first residual is 1. As in `residual_trajectories`, residuals may rise, and the last
        residual is repeated if rounding ends the solve early.

    Raises:
        ValueError: if the model's gradient is `"unrolled"`, there is no token, or the budget is not positive.
    """
    if model.config.gradient == "unrolled":
        raise ValueError('the model has gradient="unrolled": it applies f a fixed number of times and solves nothing.')
    if not len(input_ids):
        raise ValueError("there is no token: give a text of at least one.")
    solver = _configured(model.config.solver, model.config, budget)
    with evaluating(model), unconverged_on_purpose(), recorded_residuals(model, solver) as residuals:
        model.base_model(input_ids[None].to(model.device), use_cache=False)
    return _stacked([residual[0] for residual in residuals], budget, dim=0)


def evaluations_to_tolerance(trajectories: np.ndarray, tolerance: float) -> np.ndarray:
    """Return for every token the first evaluation of f from which its own residual stays within the tolerance.

    If a residual falls below the tolerance and rises again, only the last crossing within the budget counts. A solve
    with this tolerance stops a position when its residual and the residuals of all positions before it are within the
    tolerance. The solve of a text ends when all positions have stopped. So its `num_evaluations` is near the largest
    of these counts, not near their mean.

    Args:
        trajectories: `(evaluations, tokens)`, from `token_trajectories`.
        tolerance: tolerance of the relative residual.

    Returns:
        Float64 `(tokens,)`: whole numbers from 1 on. Infinity if the residual is above the tolerance at the end of the
        budget.
    """
    above = ~(trajectories <= tolerance)  # NaN counts as above
    evaluations = len(above) - np.argmax(above[::-1], axis=0) + 1.0
    evaluations[above[-1]] = np.inf
    return np.where(above.any(0), evaluations, 1.0)


@contextmanager
def recorded_residuals(model: DEQPreTrainedModel, solver: FixedPointSolver) -> Iterator[list[Tensor]]:
    """Within this context the model solves with `solver`, without gradients, and records the residuals.

    Args:
        model: a deep equilibrium model.
        solver: replaces the configured solver.

    Yields:
        A list. Each call of f appends one tensor `(batch, sequence)`: the relative residual, at every position, of the
        state that f was called with. The largest value in a row of the last tensor is the residual that the solve
        reports.
    """
    residuals = []

    def solve(f, z0, dial, rows):
        def recorded(z):
            f_z = f(z)
            residuals.append(own_residuals(z, f_z)[..., 0])
            return f_z

        with torch.no_grad():
            return equilibrium(recorded, z0, solver, texts=rows.texts), None

    with solved_by(model, solve):
        yield residuals


@torch.no_grad()
def captured_map(model: DEQPreTrainedModel, input_ids: Tensor) -> tuple[SequenceMap, Tensor]:
    """Return the map f of a model for these tokens, and the state from which its solve starts.

    Args:
        model: a deep equilibrium model, with or without its language modelling head.
        input_ids: `(batch, sequence)`, without padding.

    Returns:
        f, which maps a state `(batch, sequence, features)` to a state of the same shape, and the first state.
    """
    captured = []

    def solve(f, z0, dial, rows):
        captured.append((f, z0))
        return equilibrium(f, z0, PicardSolver(0.0, 1)), None

    with evaluating(model), unconverged_on_purpose(), solved_by(model, solve):
        model.base_model(input_ids.to(model.device), use_cache=False)
    return captured[0]


class Divergence(NamedTuple):
    """How much a loose solve changes the predictions.

    Attributes:
        nats: Kullback-Leibler divergence KL(p || q), float64 `(batch, sequence)`: p is the prediction at the
            equilibrium, q is the prediction of the loose solve.
        num_evaluations, converged: report of the loose solve, `(batch,)`.
    """

    nats: Tensor
    num_evaluations: Tensor
    converged: Tensor


@torch.no_grad()
def divergences(model: DEQForCausalLM, input_ids: Tensor, tolerances: Sequence[float]) -> dict[float, Divergence]:
    """Compare predictions at several tolerances with the predictions at the equilibrium, at every position.

    The equilibrium is computed in double precision, to a residual of 1e-7.

    Args:
        model: a deep equilibrium language model.
        input_ids: `(batch, sequence)`, without padding.
        tolerances: tolerances of the relative residual.

    Returns:
        The `Divergence` for each tolerance.

    Raises:
        ValueError: if the equilibrium of a row is not found within 1,000 evaluations.
    """
    has_doubles = widest_dtype(model.device) == torch.float64
    with evaluating(model), unconverged_on_purpose():
        exactly = deepcopy(model).to(model.device if has_doubles else "cpu", torch.float64)
        dial = dict(solver_tolerance=1e-7, solver_max_evaluations=1_000)
        exact = exactly(input_ids.to(exactly.device), use_cache=False, **dial)
        if not exact.converged.all():
            raise ValueError(f"the equilibrium is not found in rows {(~exact.converged).nonzero().flatten().tolist()}.")
        truth, measured = exact.logits.log_softmax(-1), {}
        for tolerance in tolerances:
            loose = model(input_ids.to(model.device), use_cache=False, solver_tolerance=tolerance)
            ours = loose.logits.to(exactly.device).double().log_softmax(-1)
            nats = F.kl_div(ours, truth, reduction="none", log_target=True).sum(-1)
            measured[tolerance] = Divergence(nats, loose.num_evaluations, loose.converged)
    return measured


def spectral_radii(model: DEQPreTrainedModel, input_ids: Tensor, steps: int = 50) -> np.ndarray:
    """Return the spectral radius of the Jacobian of f at the equilibrium, for each row.

    Args:
        model: a deep equilibrium model, with or without its language modelling head. It solves as configured.
        input_ids: `(batch, sequence)`, without padding.
        steps: number of vector-Jacobian products of the estimate, see `jacobian.spectral_radius`.

    Returns:
        Float64 `(batch,)`. Below 1, plain iteration converges if it starts near the equilibrium.
    """
    solve, radii = model.base_model.layers[0].solve, []

    def measured(f, z0, dial, rows):
        solution, jacobian_loss = solve(f, z0, dial, rows)
        radii.append(spectral_radius(f, solution.value, steps))
        return solution, jacobian_loss

    with evaluating(model), torch.no_grad(), same_random_numbers(model), solved_by(model, measured):
        model.base_model(input_ids.to(model.device), use_cache=False)
    return radii[0].cpu().double().numpy()


@contextmanager
def solved_by(model: DEQPreTrainedModel, solve: Callable) -> Iterator[None]:
    """Within this context `solve(f, z0, dial, rows)` replaces the model's own `solve`."""
    (layer,) = model.base_model.layers
    before = vars(layer).get("solve")
    layer.solve = solve  # an attribute of the instance hides the method of the class
    try:
        yield
    finally:
        del layer.solve
        if before is not None:
            layer.solve = before


def _configured(name: str, config, budget: int, damping: float | None = None) -> FixedPointSolver:
    """Return a solver with the model's settings. Its tolerance is zero, so it continues until its budget is spent."""
    undamped = {} if damping is None else {"damping": damping}
    return make_solver(config, name, tolerance=0.0, max_evaluations=budget, **undamped)


def _stacked(residuals: list[Tensor], budget: int, dim: int) -> np.ndarray:
    """Return as many residuals as the budget, stacked in the dimension `dim`."""
    # After its budget, a solver may evaluate f once more at its best iterate. After an early end, nothing moves.
    kept = residuals[:budget] + residuals[-1:] * (budget - len(residuals))
    return torch.stack(kept, dim).cpu().double().numpy()


@contextmanager
def unconverged_on_purpose() -> Iterator[None]:
    """Within this context, solves do not warn if they end early. The next solve outside may still warn as usual."""
    warned = set(FixedPointSolver._warned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            yield
        finally:
            FixedPointSolver._warned.intersection_update(warned)


@contextmanager
def same_random_numbers(model: torch.nn.Module) -> Iterator[None]:
    """Within this context random numbers are the same every time. The random state outside does not change."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
