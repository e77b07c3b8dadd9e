"""Fixed points of a sequence map: Picard, Anderson and Broyden iterations, forward only.

A solver finds z with f(z) = z for a map f of states `(batch, sequence, features)`:

    solution = AndersonSolver(tolerance=1e-3)(f, z0)

Reading order: what comes back (`FixedPointSolution`), the solvers (one loop, three ways to
propose the next iterate), what a solve remembers of its iterates (`_Record`), and the memories
of Anderson and Broyden. Nothing here builds an autograd graph; `equilibrium.py` does.

**Scope.** Anderson and Broyden combine past iterates with weights made of inner products. Summed
over the whole sequence, as usual, these weights let later tokens change the answer for earlier
ones until convergence. Here, by default (`scope="causal"`), the weights of position t are made of
inner products over positions <= t only: the position's own, plus the prefix sum. So is the
decision to stop. A causal f then has a causal solution at any tolerance and any budget.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .position_algebra import (
    GRAM_REGULARIZATION,
    SCOPES,
    accumulate,
    all_in_scope,
    blend,
    bookkeeping,
    combine,
    diagonal,
    eliminate,
    inner_products,
    inverse_or_zero,
    relative_residual,
    ring_buffer,
    square_norm,
)

SequenceMap = Callable[[Tensor], Tensor]

# Reading the stopping decision back from an accelerator waits for it, so do it only now and then.
EVALUATIONS_BETWEEN_SYNCHRONISATIONS = 4


class ConvergenceWarning(UserWarning):
    """A solve ended before it reached its tolerance. Emitted once per solver and scope."""


@dataclass(frozen=True)
class FixedPointSolution:
    """What a solve found, row by row.

    Attributes:
        value: the state `(batch, sequence, features)`; of all iterates seen, the one with the
            smallest residual (judged per position, over its prefix, where the scope is causal).
        image: f(value).
        residual: relative residual `||image - value|| / ||image||`, shape `(batch,)`, float64; infinite
            where f was never finite.
        num_evaluations: calls of f until the row stopped, shape `(batch,)`, int64.
        converged: whether the row reached the tolerance, shape `(batch,)`, bool.
    """

    value: Tensor
    image: Tensor
    residual: Tensor
    num_evaluations: Tensor
    converged: Tensor


@dataclass(frozen=True)
class FixedPointSolver:
    """The loop that all solvers share; subclasses propose the next iterate.

    Args:
        tolerance: relative residual `||f(z) - z|| / ||f(z)||` at which a position (its prefix)
            counts as solved and is frozen. Raised to half the rounding step of the dtype that f
            computes in (the state's, or autocast's), below which no residual can be relied on to
            fall: 4e-3 in bfloat16, 5e-4 in float16.
        max_evaluations: budget of calls of f, at least 1. A row that ends with an earlier state than
            its last (best, not converged) takes one more call, to know f there.
        damping: fraction of the proposed step that is taken, in (0, 1]; 1 is undamped.
        scope: whose residuals may influence position t. `"causal"`: positions <= t of its row;
            `"anticausal"`: positions >= t, for the transposed map of a backward solve;
            `"sequence"`: the whole row, as in the literature. Sequence-wide solves are **not**
            causal before convergence.

    Raises:
        ValueError: a field is out of its range.
    """

    tolerance: float = 1e-3
    max_evaluations: int = 30
    damping: float = 1.0
    scope: str = "causal"

    def __post_init__(self):
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be zero or positive, got {self.tolerance}.")
        if self.max_evaluations < 1:
            raise ValueError(f"max_evaluations must be at least 1, got {self.max_evaluations}.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}; 1 takes the full step.")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}.")

    @torch.no_grad()
    def __call__(self, f: SequenceMap, z0: Tensor) -> FixedPointSolution:
        """Solve z = f(z) from `z0`.

        Args:
            f: maps a state `(batch, sequence, features)` to one of the same shape. It may not
                change its argument in place.
            z0: the first iterate; left unchanged.

        Raises:
            ValueError: `z0` is not a floating point tensor of three dimensions, or f changes its shape.
        """
        if z0.dim() != 3 or not z0.is_floating_point():
            raise ValueError(
                "z0 must be a floating point state (batch, sequence, features), "
                f"got shape {tuple(z0.shape)} of {z0.dtype}."
            )
        tolerance = self.attainable_tolerance(z0)
        record = _Record(z0, tolerance, self.scope)
        propose = self._proposer(z0)
        z = z0
        for evaluation in range(self.max_evaluations):
            f_z = f(z)
            if f_z.shape != z.shape:
                raise ValueError(
                    f"f maps a state of shape {tuple(z.shape)} to {tuple(f_z.shape)}; it must keep the shape."
                )
            residual = f_z - z
            record.observe(z, f_z, residual)
            last = evaluation + 1 == self.max_evaluations
            if last or (self._may_look(evaluation, z) and record.finished()):
                break
            with torch.autocast(z.device.type, enabled=False):  # rounded weights would not be optimal ones
                z = record.keep_stopped(propose(z, f_z, residual))
        solution = record.solution(f, f_z)
        if torch.is_autocast_enabled(z0.device.type):
            # Some torch versions would reuse the casts cached here, without gradients, in the caller's graph.
            torch.clear_autocast_cache()
        self._warn_unless_converged(solution, tolerance)
        return solution

    def attainable_tolerance(self, state: Tensor) -> float:
        """The tolerance, or what rounding leaves of it in the dtype that f computes in."""
        device = state.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype
        return max(self.tolerance, torch.finfo(dtype).eps / 2)

    def _proposer(self, z0: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of (iterate, its image, their difference) that proposes the next iterate."""
        raise TypeError("FixedPointSolver is abstract; use PicardSolver, AndersonSolver or BroydenSolver.")

    @staticmethod
    def _may_look(evaluation: int, z: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return False
        return z.device.type == "cpu" or (evaluation + 1) % EVALUATIONS_BETWEEN_SYNCHRONISATIONS == 0

    _warned: ClassVar[set] = set()

    def _warn_unless_converged(self, solution: FixedPointSolution, tolerance: float) -> None:
        key = (type(self), self.scope)
        if key in self._warned or torch.compiler.is_compiling() or bool(solution.converged.all()):
            return
        self._warned.add(key)
        direction = "backward" if self.scope == "anticausal" else "forward"
        warnings.warn(
            f"{type(self).__name__} ({direction}, scope={self.scope!r}) left {int((~solution.converged).sum())} of "
            f"{len(solution.converged)} sequences at a relative residual of up to {solution.residual.max():.1e} after "
            f"{int(solution.num_evaluations.max())} evaluations; the tolerance is "
            f"{tolerance:.1e}. The best iterate is returned. Raise max_evaluations, loosen the "
            "tolerance, or make f more contractive (Jacobian regularization, damping). Shown once; `converged` and "
            "`residual` tell every time.",
            ConvergenceWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class PicardSolver(FixedPointSolver):
    """Damped fixed-point iteration z <- z + damping (f(z) - z). Causal whatever the scope.

    The scope only says which residuals decide when a position stops.
    """

    def _proposer(self, z0):
        return lambda z, f_z, residual: torch.add(z, residual, alpha=self.damping)


@dataclass(frozen=True)
class _RememberingSolver(FixedPointSolver):
    """A solver that weighs past iterates.

    Args:
        history: how many of them, at least 1; 5 is a good choice. Memory grows with it, not with
            `max_evaluations`.
    """

    history: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"history must be at least 1, got {self.history}.")


@dataclass(frozen=True)
class AndersonSolver(_RememberingSolver):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011): mix the last images of f.

    z <- sum_i a_i (f(z_i) - (1 - damping) r_i) with residuals r_i = f(z_i) - z_i and weights that
    minimise ||sum_i a_i r_i|| under sum_i a_i = 1, for every position in its own inner product.

    `history` (default 5, at least 1) is the number of iterates mixed.

    Args:
        absolute_regularization: replaces the regularization of the weights, which is relative to the residuals'
            size, by one that is not: the authors' lambda, 1e-4 in their code, with a history of 6. For repeating their
            iterates in sequence scope; as residuals shrink it stops the acceleration.
    """

    absolute_regularization: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.absolute_regularization < 0 or (self.absolute_regularization and self.scope != "sequence"):
            raise ValueError(
                f"absolute_regularization must not be negative, and is for scope='sequence' only; got "
                f"{self.absolute_regularization} with scope={self.scope!r}."
            )

    def _proposer(self, z0):
        return _AndersonMixing(z0, self)


@dataclass(frozen=True)
class BroydenSolver(_RememberingSolver):
    """Broyden's good method on f(z) - z = 0, limited memory, no line search (Broyden 1965).

    The inverse Jacobian starts at minus identity, so the first step is f(z0). Its low-rank
    update is evaluated in the compact form of Byrd, Nocedal & Schnabel (1994, theorem 6.2), which
    needs inner products of steps only; every position takes them over its own prefix.

    `history` (default 5, at least 1) is the number of steps the update remembers.
    """

    def _proposer(self, z0):
        return _BroydenUpdate(z0, self)


SOLVERS = {"anderson": AndersonSolver, "broyden": BroydenSolver, "picard": PicardSolver}


class _Record:
    """What a solve knows of every position: its best iterate and whether it is done.

    A position is *frozen* once the relative residual over its scope is below the tolerance and all
    positions it depends on are frozen; the frozen state stays in the iterate, so the measured
    residual is the one of the returned state. It has *failed* once that residual is not finite.
    """

    def __init__(self, z0: Tensor, tolerance: float, scope: str):
        rows_and_positions = z0.shape[:2]
        self.tolerance, self.scope = tolerance, scope
        self.best = z0
        self.best_relative = bookkeeping(z0, rows_and_positions, float("inf"))
        self.frozen = torch.zeros(rows_and_positions, dtype=torch.bool, device=z0.device)
        self.stopped = self.at_best = self.frozen
        self.num_evaluations = torch.zeros(z0.shape[0], dtype=torch.long, device=z0.device)

    def observe(self, z: Tensor, f_z: Tensor, residual: Tensor) -> None:
        """Take note of an iterate, its image and their difference."""
        active = ~self.stopped
        self.num_evaluations += active.any(1)
        residual_square = accumulate(square_norm(residual), self.scope)
        relative = relative_residual(residual_square, accumulate(square_norm(f_z), self.scope))
        frozen = all_in_scope(self.frozen | (relative <= self.tolerance), self.scope)
        better = active & ((relative < self.best_relative) | frozen)
        self.best = torch.where(better[..., None], z, self.best)
        self.best_relative = torch.where(better, relative, self.best_relative)
        self.at_best = better | self.stopped
        self.frozen = frozen
        self.stopped = self.stopped | frozen | ~residual_square.isfinite()

    def keep_stopped(self, proposal: Tensor) -> Tensor:
        """The proposal where positions still move, their best iterate where they have stopped."""
        return torch.where(self.stopped[..., None], self.best, proposal)

    def finished(self) -> bool:
        return bool(self.stopped.all())

    def solution(self, f: SequenceMap, last_image: Tensor) -> FixedPointSolution:
        """The best state and f there, which is `last_image` in rows whose last iterate is their best."""
        known = self.at_best.all(1)
        image = last_image
        if torch.compiler.is_compiling() or not bool(known.all()):
            image = torch.where(known[:, None, None], last_image, f(self.best))
            self.num_evaluations += ~known
        squares = (square_norm(image - self.best).sum(1), square_norm(image).sum(1))
        residual = relative_residual(*squares).nan_to_num(nan=float("inf"))
        return FixedPointSolution(self.best, image, residual, self.num_evaluations, self.frozen.all(1))


class _AndersonMixing:
    """Ring buffers of residuals and images `(batch * sequence, history, features)`, and their Gram matrices.

    Slots not yet used hold zeros, which get the weight zero.
    """

    def __init__(self, z0: Tensor, solver: AndersonSolver):
        self.solver, self.shape, self.count = solver, z0.shape, 0
        self.residuals, self.images = ring_buffer(z0, solver.history), ring_buffer(z0, solver.history)
        self.gram = bookkeeping(z0, (solver.history, solver.history, *z0.shape[:2]), 0.0)

    def __call__(self, z: Tensor, f_z: Tensor, residual: Tensor) -> Tensor:
        slot, self.count = self.count % self.solver.history, self.count + 1
        self.residuals[:, slot], self.images[:, slot] = residual.flatten(0, 1), f_z.flatten(0, 1)
        self.gram[slot] = self.gram[:, slot] = inner_products(residual, self.residuals)
        weights = self._weights(slot)
        mixed = combine(weights, self.images)
        if self.solver.damping < 1:
            mixed -= (1 - self.solver.damping) * combine(weights, self.residuals)
        return mixed.view(self.shape).to(z.dtype)

    def _weights(self, newest: int) -> Tensor:
        """Weights `(history, batch, sequence)` that sum to one."""
        (gram,) = blend(self.gram, (self.gram,), self.solver.scope)
        scale = inverse_or_zero(diagonal(gram).sqrt())
        gram = gram * scale[:, None] * scale
        absolute = self.solver.absolute_regularization
        diagonal(gram).add_(absolute * scale.square() if absolute else GRAM_REGULARIZATION)
        weights = eliminate(gram, scale) * scale
        total = weights.sum(0)
        weights *= inverse_or_zero(total)
        weights[newest] += total == 0  # no residual left to weigh (padding): any mixture is the same
        return weights


class _BroydenUpdate:
    """Ring buffers of steps s and of the changes d of f along them, and their inner products.

    With K = triu(S'S) - S'D (steps in order of time) the proposal is z + r + D K^-1 S'r, which is
    the compact inverse update for an initial inverse Jacobian of -1, since the change of
    f(z) - z along s is d - s. Slots not yet used hold zeros, which elimination skips.
    """

    def __init__(self, z0: Tensor, solver: BroydenSolver):
        self.solver, self.count = solver, 0
        self.steps, self.changes = ring_buffer(z0, solver.history), ring_buffer(z0, solver.history)
        self.step_step = bookkeeping(z0, (solver.history, solver.history, *z0.shape[:2]), 0.0)
        self.step_change = torch.zeros_like(self.step_step)
        self.previous = None

    def __call__(self, z: Tensor, f_z: Tensor, residual: Tensor) -> Tensor:
        direction = residual
        if self.previous is not None:
            self._remember(z - self.previous[0], f_z - self.previous[1])
            direction = residual + combine(self._weights(residual), self.changes).view(z.shape).to(z.dtype)
        self.previous = z, f_z
        return torch.add(z, direction, alpha=self.solver.damping)

    def _remember(self, step: Tensor, change: Tensor) -> None:
        slot, self.count = self.count % self.solver.history, self.count + 1
        self.steps[:, slot], self.changes[:, slot] = step.flatten(0, 1), change.flatten(0, 1)
        self.step_step[slot] = self.step_step[:, slot] = inner_products(step, self.steps)
        self.step_change[slot] = inner_products(step, self.changes)
        self.step_change[:, slot] = inner_products(change, self.steps)

    def _weights(self, residual: Tensor) -> Tensor:
        """Weights `(history, batch, sequence)` of the changes."""
        quantities = (self.step_step, self.step_change, inner_products(residual, self.steps))
        step_step, step_change, step_residual = blend(self.step_step, quantities, self.solver.scope)
        scale = inverse_or_zero(diagonal(step_step).sqrt())
        age = (self.count - 1 - torch.arange(self.solver.history, device=scale.device)) % self.solver.history
        not_newer = age[:, None] >= age
        kernel = (step_step * not_newer[..., None, None] - step_change) * scale[:, None] * scale
        oldest_first = age.argsort(descending=True)
        weights = torch.empty_like(scale)
        weights[oldest_first] = eliminate(kernel[oldest_first][:, oldest_first], (step_residual * scale)[oldest_first])
        return weights * scale
