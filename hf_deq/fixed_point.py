"""Fixed points of a sequence map: Picard, Anderson and Broyden iterations, forward only.

A solver finds z with f(z) = z for a map f of states `(batch, sequence, features)`:

    solution = AndersonSolver(tolerance=1e-3)(f, z0)

Reading order: what comes back (`FixedPointSolution`), the solvers (one loop, three ways to make the next iterate, which
are in `iterations.py`), and what a solve records of its iterates (`_Record`). Nothing here builds an autograd graph;
`equilibrium.py` does.

**Scope.** Anderson and Broyden combine past iterates with weights made of inner products. The literature sums them
over the whole sequence. Then later tokens change the answer for earlier ones until convergence. Here, by default
(`scope="causal"`), the weights of position t use positions <= t only: the position itself, and the sum over its
prefix. So does the decision to stop. A causal f then has a causal solution at any tolerance and any budget.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .iterations import AndersonIteration, BroydenIteration, Iteration, PicardIteration
from .packed_texts import Texts
from .position_algebra import SCOPES, Positions, norm, own_residuals, relative_residual

SequenceMap = Callable[[Tensor], Tensor]

# Reading the stopping decision back from an accelerator waits for it, so it is done only now and then.
EVALUATIONS_BETWEEN_SYNCHRONISATIONS = 4


class ConvergenceWarning(UserWarning):
    """A solve ended before it reached its tolerance. Emitted once per solver and scope."""


@dataclass(frozen=True)
class FixedPointSolution:
    """What a solve found. Reports have one entry for each text: `(batch,)`, or `(texts,)` for packed rows.

    Attributes:
        value: the state `(batch, sequence, features)`. Where the tolerance was missed, it is the iterate with the
            smallest residual of all (judged per position, over its prefix, where the scope is causal).
        image: f(value).
        residual: relative residual `||image - value|| / ||image||` of the text's worst position, float64. Infinite
            where f was never finite.
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
    """The loop that all solvers share; subclasses say how the next iterate is made.

    Args:
        tolerance: a position is solved when its own relative residual `||f(z) - z|| / ||f(z)||` is at most this
            and all positions that it depends on are solved. It then keeps its state. The tolerance is raised to the
            rounding step of the dtype that f computes in (the state's, or autocast's), because below it the residual
            of a position need not fall: 8e-3 in bfloat16, 1e-3 in float16. A state so small that its square
            underflows (1e-19 in single precision) counts as zero, and so as solved.
        max_evaluations: budget of calls of f, at least 1. A text that ends with an earlier state than its last
            (best, not converged) takes one more call, to know f there.
        damping: fraction of the proposed step that is taken, in (0, 1]; 1 is undamped.
        scope: whose residuals may influence position t. `"causal"`: positions <= t of its text;
            `"anticausal"`: positions >= t, for the transposed map of a backward solve;
            `"sequence"`: the whole text, as in the literature. Sequence-wide solves are **not**
            causal before convergence.

    Raises:
        ValueError: a field is out of its range.
    """

    tolerance: float = 1e-3
    max_evaluations: int = 30
    damping: float = 1.0
    scope: str = "causal"

    def __post_init__(self):
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be zero or positive, and finite; got {self.tolerance}.")
        if not self.max_evaluations >= 1:
            raise ValueError(f"max_evaluations must be at least 1, got {self.max_evaluations}.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}; 1 takes the full step.")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}.")

    @torch.no_grad()
    def __call__(self, f: SequenceMap, z0: Tensor, texts: Texts | None = None) -> FixedPointSolution:
        """Solve z = f(z) from `z0`.

        Args:
            f: maps a state `(batch, sequence, features)` to one of the same shape. It may not
                change its argument in place.
            z0: the first iterate; left unchanged.
            texts: the texts of packed rows, each of which is solved as if it were alone; `None` where
                every row is one text.

        Raises:
            ValueError: `z0` is not a floating point tensor of three dimensions, or f changes its shape.
        """
        if z0.dim() != 3 or not z0.is_floating_point():
            raise ValueError(
                "z0 must be a floating point state (batch, sequence, features), "
                f"got shape {tuple(z0.shape)} of {z0.dtype}."
            )
        device, tolerance = z0.device.type, self.attainable_tolerance(z0)
        positions = Positions(z0.shape[1], self.scope, texts)
        record, iteration = _Record(z0, tolerance, positions), self._iteration(z0, positions)
        # Rounded weights would not be optimal ones.
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        z, f_z = z0, _image(f, z0)
        for evaluation in range(1, self.max_evaluations + 1):
            with exact:
                record.observe(z, f_z, iteration.observe(z, f_z))
                if evaluation == self.max_evaluations or (_may_look(evaluation, z) and record.finished()):
                    break
                del z, f_z  # the iteration has what it needs of them
                z = record.keep_stopped(iteration.propose(record.own))
            f_z = _image(f, z)
        solution = record.solution(f, z, f_z)
        if torch.is_autocast_enabled(device):
            # Some torch versions would reuse the casts cached here, without gradients, in the caller's graph.
            torch.clear_autocast_cache()
        self._warn_unless_converged(solution, tolerance)
        return solution

    def attainable_tolerance(self, state: Tensor) -> float:
        """The tolerance, or what rounding leaves of it in the dtype that f computes in."""
        device = state.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype
        return max(self.tolerance, torch.finfo(dtype).eps)

    def _iteration(self, z0: Tensor, positions: Positions) -> Iteration:
        """What makes the next iterate of a solve that starts at z0."""
        raise TypeError("FixedPointSolver is abstract; use PicardSolver, AndersonSolver or BroydenSolver.")

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


def _image(f: SequenceMap, z: Tensor) -> Tensor:
    """f(z), whose shape is that of z."""
    f_z = f(z)
    if f_z.shape != z.shape:
        raise ValueError(f"f maps a state of shape {tuple(z.shape)} to {tuple(f_z.shape)}; it must keep the shape.")
    return f_z


def _may_look(evaluation: int, z: Tensor) -> bool:
    """Whether to read back, after so many evaluations, if the solve has finished."""
    if torch.compiler.is_compiling():
        return False
    return z.device.type == "cpu" or evaluation % EVALUATIONS_BETWEEN_SYNCHRONISATIONS == 0


@dataclass(frozen=True)
class PicardSolver(FixedPointSolver):
    """Damped fixed-point iteration z <- z + damping (f(z) - z). Causal whatever the scope.

    The scope only says which residuals decide when a position stops.
    """

    def _iteration(self, z0, positions):
        return PicardIteration(self.damping)


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
        if not self.history >= 1:
            raise ValueError(f"history must be at least 1, got {self.history}.")


@dataclass(frozen=True)
class AndersonSolver(_RememberingSolver):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011): mix the last images of f.

    z <- sum_i a_i (f(z_i) - (1 - damping) r_i) with residuals r_i = f(z_i) - z_i and weights that
    minimise ||sum_i a_i r_i|| under sum_i a_i = 1, for every position in its own inner product.

    `history` (default 5, at least 1) is the number of iterates mixed.
    """

    def _iteration(self, z0, positions):
        return AndersonIteration(z0, positions, self.history, self.damping)


@dataclass(frozen=True)
class BroydenSolver(_RememberingSolver):
    """Broyden's good method on f(z) - z = 0, limited memory, no line search (Broyden 1965).

    The inverse Jacobian starts at minus identity, so the first step is f(z0). Its low-rank
    update is evaluated in the compact form of Byrd, Nocedal & Schnabel (1994, theorem 6.2), which
    needs inner products of steps only; every position takes them over its own prefix.

    `history` (default 5, at least 1) is the number of steps the update remembers.
    """

    def _iteration(self, z0, positions):
        return BroydenIteration(z0, positions, self.history, self.damping)


SOLVERS = {"anderson": AndersonSolver, "broyden": BroydenSolver, "picard": PicardSolver}


class _Record:
    """What a solve knows of every position: whether it still moves, and its best iterate.

    A position moves until it is solved or has failed. From then on it keeps its best iterate. For a solved position
    this is the last one, so the residual that was measured is the one of the returned state.

    Attributes, all `(batch, sequence, 1)`:
        own: the relative residual of each position by itself.
        worst: the largest of the positions that count for a position. At most the tolerance means solved, not a number
            means failed.
    """

    def __init__(self, z0: Tensor, tolerance: float, positions: Positions):
        shape = (*z0.shape[:2], 1)
        # A little less than the tolerance, since residuals may be in single precision and are reported in double.
        self.tolerance, self.threshold = tolerance, tolerance * (1 - 2**-22)
        self.positions = positions
        self.best = z0.clone()
        self.lowest_worst = torch.full(shape, float("inf"), device=z0.device)
        self.moving = torch.ones(shape, dtype=torch.bool, device=z0.device)
        self.moved = []

    def observe(self, z: Tensor, f_z: Tensor, residual_norm: Tensor) -> None:
        """Take note of an iterate, its image, and the norm of their difference."""
        self.own = relative_residual(residual_norm, norm(f_z))
        self.worst = self.positions.worst(self.own)
        torch.where(self.worst <= self.lowest_worst, z, self.best, out=self.best)
        self.lowest_worst = torch.fmin(self.worst, self.lowest_worst)
        self.moved.append(self.moving)
        self.moving = self.moving & (self.worst > self.threshold)

    def keep_stopped(self, proposal: Tensor) -> Tensor:
        """The proposal, overwritten by their best iterate where positions have stopped."""
        return torch.where(self.moving, proposal, self.best, out=proposal)

    def finished(self) -> bool:
        return not bool(self.moving.any())

    def solution(self, f: SequenceMap, z: Tensor, f_z: Tensor) -> FixedPointSolution:
        """The best state of all, f there, and the report. Where all is solved, that is the last state."""
        own, num_evaluations = self.own, torch.stack(self.moved).sum(0)
        if torch.compiler.is_compiling() or not bool((self.worst <= self.threshold).all()):
            at_best = (self.worst == self.lowest_worst) | ~self.moved[-1]
            # Where the best state is not the last one, f is not known. One more call of f tells.
            unknown = self.positions.worst((~at_best).float()) > 0
            if torch.compiler.is_compiling() or bool(unknown.any()):
                f_z = torch.where(unknown, f(self.best), f_z)
                num_evaluations = num_evaluations + unknown
            z, own = self.best, own_residuals(self.best, f_z)
        residual, num_evaluations = self.positions.residuals(own), self.positions.at_ends(num_evaluations)
        return FixedPointSolution(z, f_z, residual, num_evaluations, residual <= self.tolerance)
