"""How Picard, Anderson and Broyden compute the next iterate from the iterates that they remember.

The loop in `fixed_point.py` lets an iteration observe an iterate z and its image f(z). Then the iteration proposes the
next iterate.

**Safeguard.** An accelerated step can increase the residual. If the residual of a position reaches no new low for a
few evaluations, this position takes the plain Picard step instead. The residual of a position depends on its prefix
only, so the solution stays causal.
"""

import torch
from torch import Tensor

from .position_algebra import GRAM_REGULARIZATION, ProductMatrix, Ring, Scopes, blend, norm

# Chosen by measurements on trained layers and on hard linear maps. Anderson takes the plain step after two or more
# evaluations in a row without a new low. The residuals of Broyden rise and fall. So Broyden takes the plain step after
# three evaluations in a row without a new low, and then after every fourth. Both numbers count the evaluation of the
# low as well.
ANDERSON_PATIENCE = 3
BROYDEN_PATIENCE = 4


class Iteration:
    """What a solver remembers of its iterates, and how it computes the next iterate."""

    def observe(self, z: Tensor, f_z: Tensor) -> Tensor:
        """Record an iterate and its image, and return the norm of their difference, `(batch, sequence, 1)`."""
        raise NotImplementedError

    def propose(self, own: Tensor) -> Tensor:
        """Return the next iterate as a new tensor. `own` is the relative residual of each single position."""
        raise NotImplementedError


class PicardIteration(Iteration):
    """z <- z + damping (f(z) - z)."""

    def __init__(self, damping: float):
        self.damping = damping

    def observe(self, z, f_z):
        self.z, self.f_z = z, f_z
        return norm(f_z - z)

    def propose(self, own):
        return torch.lerp(self.z, self.f_z.to(self.z.dtype), self.damping)


class SafeguardedIteration(Iteration):
    """An iteration that combines past iterates, but takes the plain step where the combination does not help.

    Attributes:
        matrices: matrices of inner products, one for each entry of `Scopes.own_and_total`.
        slot: index of the newest iterate (or step) in the rings. `remembered` is the number of slots in use.
        used: `used[n - 1]` has 1 for the n slots in use, and 0 for the other slots.
        unused: `unused[n - 1]` is a diagonal matrix with 1 where a slot is empty, so that the system can be solved.
    """

    own_sizes = False  # see ProductMatrix

    def __init__(self, z0: Tensor, scopes: Scopes, history: int, damping: float):
        self.scopes, self.history, self.damping, self.dtype = scopes, history, damping, z0.dtype
        self.slot, self.remembered = -1, 0
        count = len(scopes.own_and_total(z0[:, :, :1]))
        self.matrices = [ProductMatrix(z0, history, self.own_sizes) for _ in range(count)]
        self.identity = torch.eye(history, dtype=self.matrices[0].matrix.dtype, device=z0.device)
        used = torch.ones_like(self.identity).tril()
        self.used, self.unused = used.unbind(), torch.diag_embed(1 - used).unbind()
        self.lowest = torch.full((*z0.shape[:2], 1), float("inf"), device=z0.device)
        self.since_lowest = torch.zeros_like(self.lowest)

    def next_slot(self) -> int:
        self.slot, self.remembered = (self.slot + 1) % self.history, min(self.remembered + 1, self.history)
        return self.slot

    def blended_matrix(self) -> Tensor:
        """Return the matrix of inner products of every position, `(batch, sequence, history, history)`."""
        return blend([one.matrix for one in self.matrices], self.matrices)

    def evaluations_since_lowest(self, own: Tensor) -> Tensor:
        """Return the evaluations since each position had its lowest residual, including that evaluation."""
        if self.scopes.scope == "sequence":  # the iterates of the literature, without the safeguard
            return torch.ones_like(own)
        self.since_lowest = torch.where(own < self.lowest, 1, self.since_lowest + 1)
        self.lowest = torch.fmin(own, self.lowest)
        return self.since_lowest

    def rounded(self, state: Tensor) -> Tensor:
        """Return a state in the dtype of f. Values too large for a half precision are clamped, so they stay finite."""
        if state.dtype == self.dtype:
            return state
        largest = torch.finfo(self.dtype).max
        return state.clamp(-largest, largest).to(self.dtype)


class AndersonIteration(SafeguardedIteration):
    """Anderson acceleration: rings of residuals and images, and the Gram matrices of the residuals."""

    def __init__(self, z0, scopes, history, damping):
        super().__init__(z0, scopes, history, damping)
        self.residuals, self.images = Ring(z0, history), Ring(z0, history)

    def observe(self, z, f_z):
        slot = self.next_slot()
        image = self.images.slots[slot].copy_(f_z)
        residual = torch.sub(image, z, out=self.residuals.slots[slot])
        products = self.residuals.products(residual)
        for matrix, values in zip(self.matrices, self.scopes.own_and_total(products), strict=True):
            matrix.write(slot, values, values)
        return products[..., slot : slot + 1].sqrt()

    def propose(self, own):
        gram = self.regularized(self.blended_matrix())
        used, unused = self.used[self.remembered - 1], self.unused[self.remembered - 1]
        weights, _ = torch.linalg.solve_ex(gram + unused, used.expand(gram.shape[:-1]))
        total = weights.sum(-1, keepdim=True)
        helps = self.evaluations_since_lowest(own) < ANDERSON_PATIENCE
        weights = torch.where(helps & (total > 0), weights / total, self.identity[self.slot])
        mixed = self.images.combine(weights)
        if self.damping < 1:
            mixed -= (1 - self.damping) * self.residuals.combine(weights)
        return self.rounded(mixed)

    def regularized(self, gram: Tensor) -> Tensor:
        """Return the Gram matrix `(batch, sequence, history, history)` with its diagonal enlarged by a small factor."""
        return gram.addcmul(gram, self.identity, value=GRAM_REGULARIZATION)


class BroydenIteration(SafeguardedIteration):
    """Broyden's method: rings of steps s and of the changes d of f along them, and matrices of inner products.

    With y = d - s and K = S'Y + the strictly lower triangle of S'S (steps in order of time), the proposal is
    z + r - D K^-1 S'r. This is the compact inverse update for an initial inverse Jacobian of -1. The row of the newest
    step i holds the products s_i'd_j, because s_i's_j + s_i'y_j = s_i'd_j. Its column holds the products s_j'y_i.
    """

    own_sizes = True  # sizes of the steps: the diagonal of K may have any sign

    def __init__(self, z0, scopes, history, damping):
        super().__init__(z0, scopes, history, damping)
        self.steps, self.changes = Ring(z0, history), Ring(z0, history)
        self.previous: tuple[Tensor, Tensor] | None = None

    def observe(self, z, f_z):
        if self.previous is not None:
            self._remember(z, f_z, *self.previous)
        self.previous, self.iterate, self.residual = (z, f_z), z, f_z - z
        return norm(self.residual)

    def _remember(self, z, f_z, z_before, f_z_before):
        slot = self.next_slot()
        step = torch.sub(z, z_before, out=self.steps.slots[slot])
        change = torch.sub(f_z, f_z_before, out=self.changes.slots[slot])
        row, column = self.changes.products(step), self.steps.products(change - step)
        products = torch.cat([row, column, norm(step).square()], -1)
        for matrix, values in zip(self.matrices, self.scopes.own_and_total(products), strict=True):
            row, column, size = values.split([self.history, self.history, 1], -1)
            matrix.write(slot, row, column)
            matrix.sizes[..., slot : slot + 1] = size

    def propose(self, own):
        helps, direction = self.evaluations_since_lowest(own) % BROYDEN_PATIENCE > 0, self.residual
        if self.remembered:
            weights = self._weights()
            is_finite = weights.sum(-1, keepdim=True).abs() < float("inf")
            weights = torch.where(helps & is_finite, weights, 0)
            direction = direction - self.changes.combine(weights)
        return self.rounded(self.iterate + self.damping * direction)

    def _weights(self) -> Tensor:
        """Return the weights `(batch, sequence, history)` of the changes."""
        residual = self.residual.to(self.steps.slots[0].dtype)
        kernel = self.blended_matrix()
        projections = blend(self.scopes.own_and_total(self.steps.products(residual).to(kernel.dtype)), self.matrices)
        return torch.linalg.solve_ex(kernel + self.unused[self.remembered - 1], projections)[0]
