"""Fixed points of a sequence map: Picard, Anderson and Broyden iterations, forward only.

A solver finds z with f(z) = z for a map f of states `(batch, sequence, features)`:

    solution = AndersonSolver(tolerance=1e-3)(f, z0)

Reading order: what comes back (`FixedPointSolution`), the solvers (one loop, three ways to
propose the next iterate), what a solve remembers of its iterates (`_Record`), and the small
linear algebra. Nothing here builds an autograd graph; `equilibrium.py` does.

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

SequenceMap = Callable[[Tensor], Tensor]

SCOPES = ("causal", "anticausal", "sequence")

# Weight of the prefix against the position itself in causal inner products: 0 (own history only)
# needs up to twice the evaluations, 1 to 3 does not differ by more than a few per cent.
PREFIX_WEIGHT = 2.0

# Added to the unit diagonal of the normalised Gram matrix, so it is relative to its scale.
GRAM_REGULARIZATION = 1e-8

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
        image: f(value), known without another call.
        residual: relative residual `||f(z) - z|| / ||f(z)||` of `value`, shape `(batch,)`,
            float64; infinite where f was never finite.
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
            counts as solved and is frozen. Raised to half the unit round-off step of the state's
            dtype, below which no residual can fall (4e-3 in bfloat16, 5e-4 in float16).
        max_evaluations: budget of calls of f, at least 1.
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
        record = _Record(z0, self.attainable_tolerance(z0.dtype), self.scope)
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
            z = record.keep_stopped(propose(z, f_z, residual))
        solution = record.solution()
        self._warn_unless_converged(solution, z0.dtype)
        return solution

    def attainable_tolerance(self, dtype: torch.dtype) -> float:
        """The tolerance, or what rounding in `dtype` leaves of it."""
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

    def _warn_unless_converged(self, solution: FixedPointSolution, dtype: torch.dtype) -> None:
        key = (type(self), self.scope)
        if key in self._warned or torch.compiler.is_compiling() or bool(solution.converged.all()):
            return
        self._warned.add(key)
        direction = "backward" if self.scope == "anticausal" else "forward"
        warnings.warn(
            f"{type(self).__name__} ({direction}, scope={self.scope!r}) left {int((~solution.converged).sum())} of "
            f"{len(solution.converged)} sequences at a relative residual of up to {solution.residual.max():.1e} after "
            f"{int(solution.num_evaluations.max())} evaluations; the tolerance is "
            f"{self.attainable_tolerance(dtype):.1e}. The best iterate is returned. Raise max_evaluations, loosen the "
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
class AndersonSolver(FixedPointSolver):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011): mix the last images of f.

    z <- sum_i a_i (f(z_i) - (1 - damping) r_i) with residuals r_i = f(z_i) - z_i and weights that
    minimise ||sum_i a_i r_i|| under sum_i a_i = 1, for every position in its own inner product.

    Args:
        history: how many past iterates are mixed, at least 1; 5 is a good choice and memory
            grows with it, not with `max_evaluations`.
    """

    history: int = 5

    def __post_init__(self):
        super().__post_init__()
        _check_history(self.history)

    def _proposer(self, z0):
        return _AndersonMixing(z0, self)


@dataclass(frozen=True)
class BroydenSolver(FixedPointSolver):
    """Broyden's good method on f(z) - z = 0, limited memory, no line search (Broyden 1965).

    The inverse Jacobian starts at minus identity, so the first step is f(z0). Its low-rank
    update is evaluated in the compact form of Byrd, Nocedal & Schnabel (1994, theorem 6.2), which
    needs inner products of steps only; every position takes them over its own prefix.

    Args:
        history: how many past steps the update remembers, at least 1.
    """

    history: int = 5

    def __post_init__(self):
        super().__post_init__()
        _check_history(self.history)

    def _proposer(self, z0):
        return _BroydenUpdate(z0, self)


SOLVERS = {"anderson": AndersonSolver, "broyden": BroydenSolver, "picard": PicardSolver}


def _check_history(history: int) -> None:
    if history < 1:
        raise ValueError(f"history must be at least 1, got {history}.")


class _Record:
    """What a solve knows of every position: its best iterate and whether it is done.

    A position is *frozen* once the relative residual over its scope is below the tolerance and all
    positions it depends on are frozen; the frozen state stays in the iterate, so the measured
    residual is the one of the returned state. It has *failed* once that residual is not finite.
    """

    def __init__(self, z0: Tensor, tolerance: float, scope: str):
        rows_and_positions = z0.shape[:2]
        self.tolerance, self.scope = tolerance, scope
        self.best, self.best_image = z0, z0
        self.best_relative = _full(z0, rows_and_positions, float("inf"))
        self.best_residual_square = _full(z0, rows_and_positions, float("inf"))
        self.best_image_square = _full(z0, rows_and_positions, 1.0)
        self.frozen = torch.zeros(rows_and_positions, dtype=torch.bool, device=z0.device)
        self.stopped = self.frozen
        self.num_evaluations = torch.zeros(z0.shape[0], dtype=torch.long, device=z0.device)

    def observe(self, z: Tensor, f_z: Tensor, residual: Tensor) -> None:
        """Take note of an iterate, its image and their difference."""
        active = ~self.stopped
        self.num_evaluations += active.any(1)
        residual_square, image_square = _square_norm(residual), _square_norm(f_z)
        relative = _relative(_accumulate(residual_square, self.scope), _accumulate(image_square, self.scope))
        frozen = _all_before(self.frozen | (relative <= self.tolerance), self.scope)
        better = active & ((relative < self.best_relative) | frozen)
        self.best = torch.where(better[..., None], z, self.best)
        self.best_image = torch.where(better[..., None], f_z, self.best_image)
        self.best_relative = torch.where(better, relative, self.best_relative)
        self.best_residual_square = torch.where(better, residual_square, self.best_residual_square)
        self.best_image_square = torch.where(better, image_square, self.best_image_square)
        self.frozen = frozen
        self.stopped = self.stopped | frozen | ~relative.isfinite()

    def keep_stopped(self, proposal: Tensor) -> Tensor:
        """The proposal where positions still move, their best iterate where they have stopped."""
        return torch.where(self.stopped[..., None], self.best, proposal)

    def finished(self) -> bool:
        return bool(self.stopped.all())

    def solution(self) -> FixedPointSolution:
        residual = _relative(self.best_residual_square.sum(1), self.best_image_square.sum(1))
        return FixedPointSolution(self.best, self.best_image, residual, self.num_evaluations, self.frozen.all(1))


class _AndersonMixing:
    """Ring buffers of residuals and images `(batch * sequence, history, features)`, and their Gram matrices."""

    def __init__(self, z0: Tensor, solver: AndersonSolver):
        self.solver, self.shape, self.count = solver, z0.shape, 0
        self.residuals, self.images = _ring(z0, solver.history), _ring(z0, solver.history)
        self.gram = _full(z0, (solver.history, solver.history, *z0.shape[:2]), 0.0)

    def __call__(self, z: Tensor, f_z: Tensor, residual: Tensor) -> Tensor:
        slot, self.count = self.count % self.solver.history, self.count + 1
        used = min(self.count, self.solver.history)
        self.residuals[:, slot], self.images[:, slot] = residual.flatten(0, 1), f_z.flatten(0, 1)
        products = _products(self.residuals[:, slot], self.residuals[:, :used], self.shape)
        self.gram[slot, :used] = self.gram[:used, slot] = products
        weights = self._weights(self.gram[:used, :used])
        mixed = _combine(weights, self.images[:, :used])
        if self.solver.damping < 1:
            mixed -= (1 - self.solver.damping) * _combine(weights, self.residuals[:, :used])
        return mixed.view(self.shape).to(z.dtype)

    def _weights(self, gram: Tensor) -> Tensor:
        """Weights `(used, batch, sequence)` from Gram matrices `(used, used, batch, sequence)`."""
        (gram,) = _blend(gram, (gram,), self.solver.scope)
        scale = _inverse_or_zero(_diagonal(gram).sqrt())
        gram = gram * scale[:, None] * scale
        _diagonal(gram).add_(GRAM_REGULARIZATION)
        weights = _eliminate(gram, scale) * scale
        total = weights.sum(0)
        # No residual left to weigh (padding): keep the newest image, any mixture is the same.
        latest = torch.zeros_like(weights)
        latest[(self.count - 1) % self.solver.history] = 1
        return torch.where(total == 0, latest, weights * _inverse_or_zero(total))


class _BroydenUpdate:
    """Ring buffers of steps s and of the changes d of f along them, and their inner products.

    With K = triu(S'S) - S'D (steps in order of time) the proposal is z + r + D K^-1 S'r, which is
    the compact inverse update for an initial inverse Jacobian of -1, since the change of
    f(z) - z along s is d - s.
    """

    def __init__(self, z0: Tensor, solver: BroydenSolver):
        self.solver, self.shape, self.count = solver, z0.shape, 0
        self.steps, self.changes = _ring(z0, solver.history), _ring(z0, solver.history)
        self.step_step = _full(z0, (solver.history, solver.history, *z0.shape[:2]), 0.0)
        self.step_change = torch.zeros_like(self.step_step)
        self.previous = None

    def __call__(self, z: Tensor, f_z: Tensor, residual: Tensor) -> Tensor:
        if self.previous is not None:
            self._remember(z - self.previous[0], f_z - self.previous[1])
        self.previous = z, f_z
        direction = residual
        if self.count:
            direction = direction + self._correction(residual).view(self.shape).to(z.dtype)
        return torch.add(z, direction, alpha=self.solver.damping)

    def _remember(self, step: Tensor, change: Tensor) -> None:
        slot, self.count = self.count % self.solver.history, self.count + 1
        used = min(self.count, self.solver.history)
        self.steps[:, slot], self.changes[:, slot] = step.flatten(0, 1), change.flatten(0, 1)
        steps, changes = self.steps[:, :used], self.changes[:, :used]
        products = _products(self.steps[:, slot], steps, self.shape)
        self.step_step[slot, :used] = self.step_step[:used, slot] = products
        self.step_change[slot, :used] = _products(self.steps[:, slot], changes, self.shape)
        self.step_change[:used, slot] = _products(self.changes[:, slot], steps, self.shape)

    def _correction(self, residual: Tensor) -> Tensor:
        used = min(self.count, self.solver.history)
        residual = residual.flatten(0, 1).to(self.steps.dtype)
        step_residual = _products(residual, self.steps[:, :used], self.shape)
        in_time = torch.tensor(
            [i % self.solver.history for i in range(self.count - used, self.count)], device=residual.device
        )
        weights = torch.empty_like(step_residual)
        weights[in_time] = self._weights(
            self.step_step[in_time][:, in_time], self.step_change[in_time][:, in_time], step_residual[in_time]
        )
        return _combine(weights, self.changes[:, :used])

    def _weights(self, step_step: Tensor, step_change: Tensor, step_residual: Tensor) -> Tensor:
        """Weights `(used, batch, sequence)` of the changes, everything in order of time."""
        quantities = (step_step, step_change, step_residual)
        step_step, step_change, step_residual = _blend(step_step, quantities, self.solver.scope)
        scale = _inverse_or_zero(_diagonal(step_step).sqrt())
        order = torch.ones(step_step.shape[:2], dtype=step_step.dtype, device=step_step.device).triu()
        kernel = (step_step * order[:, :, None, None] - step_change) * scale[:, None] * scale
        return _eliminate(kernel, step_residual * scale) * scale


# Small linear algebra: history indices lead, `(batch, sequence)` trail, so that every step below
# is one vectorised operation over all positions.


def _full(like: Tensor, shape: tuple, value: float) -> Tensor:
    """Bookkeeping is in double precision (where the device has it): it is small, and differences are smaller."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.full(shape, value, dtype=dtype, device=like.device)


def _ring(z0: Tensor, history: int) -> Tensor:
    dtype = torch.promote_types(z0.dtype, torch.float32)
    return torch.empty(z0.shape[0] * z0.shape[1], history, z0.shape[2], dtype=dtype, device=z0.device)


def _products(vector: Tensor, ring: Tensor, shape: tuple) -> Tensor:
    """Inner products over features of `(rows, features)` with `(rows, used, features)`: `(used, batch, sequence)`."""
    products = torch.bmm(vector[:, None], ring.transpose(1, 2))[:, 0]
    return products.t().reshape(-1, *shape[:2]).to(torch.float32 if vector.device.type == "mps" else torch.float64)


def _combine(weights: Tensor, ring: Tensor) -> Tensor:
    """sum_i weights_i ring_i, shape `(rows, features)`."""
    return torch.bmm(weights.flatten(1).t()[:, None].to(ring.dtype), ring)[:, 0]


def _accumulate(values: Tensor, scope: str) -> Tensor:
    """Sum over the positions that count for each position, along the last dimension."""
    if scope == "causal":
        return values.cumsum(-1)
    if scope == "anticausal":
        return values.flip(-1).cumsum(-1).flip(-1)
    return values.sum(-1, keepdim=True).expand_as(values)


def _all_before(flags: Tensor, scope: str) -> Tensor:
    """Whether the flag holds at every position that counts for each position."""
    return _accumulate((~flags).int(), scope) == 0


def _blend(gram: Tensor, quantities: tuple[Tensor, ...], scope: str) -> list[Tensor]:
    """Bring inner products of every position into the one inner product its scope asks for.

    Both parts of the causal one are divided by the trace of the Gram matrix that they give, so
    neither the length of the prefix nor the size of its residuals tips the balance.
    """
    if scope == "sequence":
        return [_accumulate(quantity, scope) for quantity in quantities]
    trace = _diagonal(gram).sum(0)
    own = _inverse_or_zero(trace)
    prefix = PREFIX_WEIGHT * _inverse_or_zero(_accumulate(trace, scope))
    return [own * quantity + prefix * _accumulate(quantity, scope) for quantity in quantities]


def _eliminate(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve the n x n systems `(n, n, ...)` x = `(n, ...)` by Gauss-Jordan elimination without pivoting.

    A vanishing pivot gives its unknown the value zero. For Anderson's regularised Gram matrix
    that never happens; for Broyden the pivots are the denominators of the successive rank-one
    updates, and the update is skipped.
    """
    system = torch.cat([matrix, right[:, None]], 1)
    for i in range(len(right)):
        pivot = system[i, i].clone()
        row = system[i] * torch.where(pivot.abs() > 1e-12, 1 / pivot, 0)
        factors = system[:, i].clone()
        factors[i] = 0
        system -= factors[:, None] * row
        system[i] = row
    return system[:, -1]


def _diagonal(matrix: Tensor) -> Tensor:
    """A view `(n, ...)` on the diagonal of `(n, n, ...)`."""
    return matrix.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def _inverse_or_zero(values: Tensor) -> Tensor:
    return torch.where(values == 0, 0, 1 / values)


def _square_norm(state: Tensor) -> Tensor:
    """Squared norm over features, `(batch, sequence)`, in double precision."""
    norm = torch.linalg.vector_norm(state, dim=-1, dtype=torch.promote_types(state.dtype, torch.float32))
    return norm.to(torch.float32 if state.device.type == "mps" else torch.float64).square()


def _relative(residual_square: Tensor, image_square: Tensor) -> Tensor:
    """||f(z) - z|| / ||f(z)||; nothing to solve (0 / 0, as on padding) counts as solved."""
    return torch.where(residual_square == 0, 0, (residual_square / image_square).sqrt())
