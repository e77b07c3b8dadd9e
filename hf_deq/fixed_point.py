"""Fixed points of a sequence map: Picard, Anderson and Broyden iterations, forward only.

A solver finds z with f(z) = z for a map f of states `(batch, sequence, features)`:

    solution = AndersonSolver(tolerance=1e-3)(f, z0)

Reading order: the result (`FixedPointSolution`), the solvers, and the record of the iterates of a solve (`_Record`).
All solvers share one loop. They differ in how they compute the next iterate; see `iterations.py`. Nothing here builds
an autograd graph; `equilibrium.py` does.

**Scope.** Anderson and Broyden combine past iterates. The weights come from inner products. The literature sums these
over the whole sequence. Then later tokens change the solution at earlier tokens until convergence. Here, by default
(`scope="causal"`), the weights of position t use positions <= t only: the position itself, and the sum over its
prefix. The decision to stop uses the same positions. So a causal f has a causal solution at any tolerance and budget.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from .iterations import AndersonIteration, BroydenIteration, Iteration, PicardIteration
from .packed_texts import Texts
from .position_algebra import SCOPES, Scopes, norm, own_residuals, relative_residual

SequenceMap = Callable[[Tensor], Tensor]

# On an accelerator, reading the stopping decision waits for the device. So it is read only every few evaluations.
EVALUATIONS_BETWEEN_SYNCHRONISATIONS = 4


class ConvergenceWarning(UserWarning):
    """A solve ended before it reached its tolerance. Emitted once per solver class and scope."""


@dataclass(frozen=True)
class FixedPointSolution:
    """The result of a solver. (`equilibrium` returns the same tensor as `value` and as `image`.)

    The last three fields have one entry for each text: `(batch,)`, or `(texts,)` for packed rows.

    Attributes:
        value: the state `(batch, sequence, features)`. Where the tolerance was missed, it is the iterate with the
            smallest residual. With causal scope, this choice is made per position, by the residuals over its prefix.
        image: f(value).
        residual: relative residual `||image - value|| / ||image||` of the worst position of the text, float64
            (float32 on MPS). Infinite if f was never finite.
        num_evaluations: calls of f until the text stopped, int64.
        converged: whether the residual is at most the tolerance, bool.
    """

    value: Tensor
    image: Tensor
    residual: Tensor
    num_evaluations: Tensor
    converged: Tensor


@dataclass(frozen=True)
class FixedPointSolver:
    """The loop that all solvers share. Subclasses define how the next iterate is computed.

    Args:
        tolerance: a position is solved when its own relative residual `||f(z) - z|| / ||f(z)||` is at most this
            and all positions that it depends on are solved. It then keeps its state. The tolerance is never below the
            rounding step of the dtype that f computes in (that of the state, or of autocast): 8e-3 in bfloat16, 1e-3
            in float16. Below this step the residual of a position may not decrease. A state so small that its square
            underflows (1e-19 in single precision) counts as zero, and so as solved.
        max_evaluations: budget of calls of f, at least 1. If a text does not converge and its best state is not its
            last state, one more call computes f at the best state.
        damping: fraction of the proposed step that is taken, in (0, 1]; 1 is undamped.
        scope: positions whose residuals may influence position t. `"causal"`: positions <= t of its text, for an f
            whose output at t depends on z at positions <= t only;
            `"anticausal"`: positions >= t, for the transposed map of a backward solve;
            `"sequence"`: the whole text, as in the literature, and for an f that looks ahead. Solves in sequence
            scope are **not** causal before convergence.

    Raises:
        ValueError: if a field is out of its range.
    """

    tolerance: float = 1e-3
    max_evaluations: int = 30
    damping: float = 1.0
    scope: str = "causal"

    def __post_init__(self):
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be zero or positive, and finite; got {self.tolerance}.")
        check_count("max_evaluations", self.max_evaluations)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}; 1 takes the full step.")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}.")

    @torch.no_grad()
    def __call__(self, f: SequenceMap, z0: Tensor, texts: Texts | None = None) -> FixedPointSolution:
        """Solve z = f(z) from `z0`.

        Args:
            f: maps a state `(batch, sequence, features)` to a state of the same shape. It must not
                change its argument in place.
            z0: the first iterate; it is not changed.
            texts: the texts of packed rows; each text is solved as if it were alone. `None` if
                every row is one text.

        Raises:
            ValueError: if `z0` is not a floating point tensor of three dimensions, or is empty, or f changes its
                shape.
        """
        check_state(z0)
        device, tolerance = z0.device.type, self.attainable_tolerance(z0)
        scopes = Scopes(z0.shape[1], self.scope, texts)
        record, iteration = _Record(z0, tolerance, scopes), self._iteration(z0, scopes)
        # Autocast would round the weights, and rounded weights are not optimal.
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        z, f_z = z0, image_of(f, z0)
        for evaluation in range(1, self.max_evaluations + 1):
            with exact:
                record.observe(z, f_z, iteration.observe(z, f_z))
                if evaluation == self.max_evaluations or (_may_look(evaluation, z) and record.finished()):
                    break
                del z, f_z  # the iteration keeps what it needs of both
                z = record.keep_stopped(iteration.propose(record.own))
            f_z = image_of(f, z)
        solution = record.solution(f, z, f_z)
        if torch.is_autocast_enabled(device):
            # The casts cached here have no gradients. Some torch versions would reuse them in the caller's graph.
            torch.clear_autocast_cache()
        if not record.all_solved:  # known already; asking the solution would wait for an accelerator again
            self._warn_unless_converged(solution, tolerance)
        return solution

    def attainable_tolerance(self, state: Tensor) -> float:
        """Return the tolerance, but at least the rounding step of the dtype that f computes in."""
        device = state.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype
        return max(self.tolerance, torch.finfo(dtype).eps)

    def _iteration(self, z0: Tensor, scopes: Scopes) -> Iteration:
        """Return the iteration for a solve that starts at z0."""
        raise TypeError("FixedPointSolver is abstract; use PicardSolver, AndersonSolver or BroydenSolver.")

    _warned: ClassVar[set] = set()

    def _warn_unless_converged(self, solution: FixedPointSolution, tolerance: float) -> None:
        key = (type(self), self.scope)
        if self.tolerance == 0:  # asks for the whole budget, and not for convergence
            return
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
            "`residual` report every solve.",
            ConvergenceWarning,
            stacklevel=4,
        )


def check_count(name: str, value: int) -> None:
    """Refuse what is not a number of steps.

    Raises:
        ValueError: if the value is not a whole number of at least 1. The message has the name.
    """
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def check_state(z0: Tensor) -> None:
    """Refuse what no solver can start from.

    Raises:
        ValueError: if `z0` is not a floating point tensor of three dimensions, or is empty.
    """
    if z0.dim() != 3 or not z0.is_floating_point() or 0 in z0.shape:
        raise ValueError(
            "z0 must be a floating point state (batch, sequence, features) with at least one of each, got shape "
            f"{tuple(z0.shape)} of {z0.dtype}."
        )


def image_of(f: SequenceMap, z: Tensor) -> Tensor:
    """Return f(z).

    Raises:
        ValueError: if f changes the shape.
    """
    f_z = f(z)
    if f_z.shape != z.shape:
        raise ValueError(f"f maps a state of shape {tuple(z.shape)} to {tuple(f_z.shape)}; it must keep the shape.")
    return f_z


def _may_look(evaluation: int, z: Tensor) -> bool:
    """Return whether the solver checks after this evaluation if all positions have stopped."""
    if torch.compiler.is_compiling():
        return False
    return z.device.type == "cpu" or evaluation % EVALUATIONS_BETWEEN_SYNCHRONISATIONS == 0


@dataclass(frozen=True)
class PicardSolver(FixedPointSolver):
    """Damped fixed-point iteration z <- z + damping (f(z) - z). Its steps are causal in every scope.

    The scope only defines which residuals decide when a position stops.
    """

    def _iteration(self, z0, scopes):
        return PicardIteration(self.damping)


@dataclass(frozen=True)
class _RememberingSolver(FixedPointSolver):
    """A solver that combines past iterates.

    Args:
        history: number of past iterates, at least 1; 5 is a good choice. Memory grows with `history`, not with
            `max_evaluations`.
    """

    history: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_count("history", self.history)


@dataclass(frozen=True)
class AndersonSolver(_RememberingSolver):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011): mix the last images of f.

    z <- sum_i a_i (f(z_i) - (1 - damping) r_i) with residuals r_i = f(z_i) - z_i and weights that
    minimise ||sum_i a_i r_i|| under sum_i a_i = 1. Every position has its own weights and inner product.

    `history` (default 5, at least 1) is the number of iterates that are mixed.
    """

    def _iteration(self, z0, scopes):
        return AndersonIteration(z0, scopes, self.history, self.damping)


@dataclass(frozen=True)
class BroydenSolver(_RememberingSolver):
    """Broyden's good method on f(z) - z = 0, limited memory, no line search (Broyden 1965).

    The inverse Jacobian starts at minus identity, so the first step leads to f(z0). Its low-rank
    update is evaluated in the compact form of Byrd, Nocedal & Schnabel (1994, theorem 6.2). This form
    needs only inner products with steps. Every position computes them over its own scope.

    `history` (default 5, at least 1) is the number of steps that the update remembers.
    """

    def _iteration(self, z0, scopes):
        return BroydenIteration(z0, scopes, self.history, self.damping)


SOLVERS: dict[str, type[FixedPointSolver]] = {
    "anderson": AndersonSolver,
    "broyden": BroydenSolver,
    "picard": PicardSolver,
}


class _Record:
    """What a solve records for every position: whether it still moves, and its best iterate.

    A position moves until it is solved or has failed. From then on it keeps its best iterate. For a solved position
    the best iterate is the last one, so the measured residual belongs to the returned state.

    Attributes, all `(batch, sequence, 1)`:
        own: the relative residual of each single position.
        worst: the largest relative residual in the scope of each position. If it is at most the tolerance, the
            position is solved. If it is not a number, the position has failed.
        lowest_worst: the smallest `worst` so far, which is that of the best iterate.
        moving: which positions have neither solved nor failed.
        moved: for each evaluation so far, which positions were moving when it began.
    """

    def __init__(self, z0: Tensor, tolerance: float, scopes: Scopes):
        shape = (*z0.shape[:2], 1)
        # A little below the tolerance: residuals may be computed in single precision, but are reported in double.
        self.tolerance, self.threshold = tolerance, tolerance * (1 - 2**-22)
        self.scopes = scopes
        self.best = z0.clone()
        self.lowest_worst = torch.full(shape, float("inf"), device=z0.device)
        self.moving = torch.ones(shape, dtype=torch.bool, device=z0.device)
        self.moved: list[Tensor] = []

    def observe(self, z: Tensor, f_z: Tensor, residual_norm: Tensor) -> None:
        """Record an iterate, its image, and the norm of their difference."""
        self.own = relative_residual(residual_norm, norm(f_z))
        self.worst = self.scopes.worst(self.own)
        torch.where(self.worst <= self.lowest_worst, z, self.best, out=self.best)
        self.lowest_worst = torch.fmin(self.worst, self.lowest_worst)
        self.moved.append(self.moving)
        self.moving = self.moving & (self.worst > self.threshold)

    def keep_stopped(self, proposal: Tensor) -> Tensor:
        """Return the proposal. Positions that have stopped get their best iterate instead (in place)."""
        return torch.where(self.moving, proposal, self.best, out=proposal)

    def finished(self) -> bool:
        return not bool(self.moving.any())

    def solution(self, f: SequenceMap, z: Tensor, f_z: Tensor) -> FixedPointSolution:
        """Return the best state, f at this state, and the report. If all positions are solved, it is the last state."""
        own, num_evaluations = self.own, torch.stack(self.moved).sum(0)
        self.all_solved = not torch.compiler.is_compiling() and bool((self.worst <= self.threshold).all())
        if not self.all_solved:
            # A position that had stopped before the last evaluation was at its best state in it.
            at_best = (self.worst == self.lowest_worst) | ~self.moved[-1]
            # Where the best state is not the last one, f at the best state is unknown. One more call computes it.
            unknown = self.scopes.worst((~at_best).float()) > 0
            if torch.compiler.is_compiling() or bool(unknown.any()):
                f_z = torch.where(unknown, f(self.best), f_z)
                num_evaluations = num_evaluations + unknown
            num_evaluations = self.scopes.worst(num_evaluations)  # a position that failed has stopped before others
            z, own = self.best, own_residuals(self.best, f_z)
        residual, num_evaluations = self.scopes.residuals(own), self.scopes.at_ends(num_evaluations)
        return FixedPointSolution(z, f_z, residual, num_evaluations, residual <= self.tolerance)
