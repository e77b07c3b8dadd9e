"""The small linear algebra of causal solvers: every position has its own inner products.

Anderson and Broyden weight a few past iterates by inner products. Here every position has its own inner product,
computed from the positions in its *scope*. All small quantities have the shape `(batch, sequence, n)`. They are kept
in double precision where the device has it, because small differences matter.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .packed_texts import Texts

SCOPES = ("causal", "anticausal", "sequence")

# Weight of the prefix relative to the position itself in causal inner products. Measured on 120 windows of 256 tokens,
# twice the training length: a trained transformer layer needs 13.4 evaluations to reach 1e-3 at weight 2, and 13.7 at
# weight 8. A weight of 0 is unsafe: a position that uses only its own few residuals may never converge.
PREFIX_WEIGHT = 2.0

# Added to the diagonal of the Gram matrix, relative to that diagonal.
GRAM_REGULARIZATION = 1e-8


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return double precision, or single precision on MPS, which has no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def norm(state: Tensor) -> Tensor:
    """Return the norm over features, `(batch, sequence, 1)`, in single precision or wider."""
    return torch.linalg.vector_norm(state, dim=-1, keepdim=True, dtype=torch.promote_types(state.dtype, torch.float32))


def relative_residual(residual_norm: Tensor, image_norm: Tensor) -> Tensor:
    """Return ||f(z) - z|| / ||f(z)||. Zero divided by zero (as on padding) gives zero, which counts as solved."""
    return residual_norm / image_norm.clamp_min(torch.finfo(image_norm.dtype).tiny)


def own_residuals(z: Tensor, f_z: Tensor) -> Tensor:
    """Return the relative residual of each single position, `(batch, sequence, 1)`."""
    return relative_residual(norm(f_z - z), norm(f_z))


class Scopes:
    """The scopes of all positions: the positions that influence each of them in a solve.

    Args:
        length: number of positions in a row.
        scope: within its text, the positions up to each position (`"causal"`), the positions from it on
            (`"anticausal"`), or all positions (`"sequence"`).
        texts: the texts of packed rows; `None` if every row is one text.
    """

    def __init__(self, length: int, scope: str, texts: Texts | None = None):
        self.length, self.scope = length, scope
        self.texts = texts
        self._reading = texts.flip() if texts is not None and scope == "anticausal" else texts

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the scope of each position, `(batch, sequence, n)`, in `widest_dtype`."""
        return self._over_scope(values.to(widest_dtype(values.device)), torch.cumsum, torch.add)

    def worst(self, values: Tensor) -> Tensor:
        """Return the largest value in the scope of each position. Values must not be negative. NaN is passed on."""
        return self._over_scope(values, lambda values, dim: values.cummax(dim).values, torch.maximum)

    def at_ends(self, values: Tensor) -> Tensor:
        """Return for each text the value where the scope is the whole text, `(texts,)` from `(batch, sequence, 1)`."""
        backwards = self.scope == "anticausal"
        if self.texts is None:
            return values[:, 0 if backwards else -1, 0]
        return values.flatten()[self.texts.firsts if backwards else self.texts.lasts]

    def residuals(self, relative: Tensor) -> Tensor:
        """Return the relative residual of the worst position of each text, `(texts,)`; infinite instead of NaN."""
        worst = self.at_ends(self.worst(relative)).to(widest_dtype(relative.device))
        return worst.nan_to_num(nan=float("inf"), posinf=float("inf"))

    def own_and_total(self, products: Tensor) -> list[Tensor]:
        """Return the inner products that `blend` combines: those of the position itself, and the total over its scope.

        The list has one entry if a row has one position, or if the scope is `"sequence"` (only the total).
        """
        if self.length == 1:
            return [products]
        return [self.total(products)] if self.scope == "sequence" else [products, self.total(products)]

    def _over_scope(self, values: Tensor, cumulate: Callable, combine: Callable) -> Tensor:
        if self.length == 1:
            return values
        backwards = self.scope == "anticausal"
        values = values.flip(1) if backwards else values
        running = cumulate(values, 1) if self._reading is None else self._reading.scan(values, combine)
        if self.scope == "sequence":
            return self._everywhere(running)
        return running.flip(1) if backwards else running

    def _everywhere(self, running: Tensor) -> Tensor:
        """Return the value at the last position of each text, repeated for all positions of the text."""
        if self.texts is None:
            return running[:, -1:].expand_as(running)
        lengths = self.texts.lasts - self.texts.firsts + 1
        ends = self.texts.lasts.repeat_interleave(lengths)
        return running.flatten(0, 1)[ends].view_as(running)


class Ring:
    """The last few states of every position, in single precision or wider. Empty slots hold zeros.

    Attributes:
        slots: the states, as writable views `(batch, sequence, features)`.
    """

    def __init__(self, like: Tensor, history: int):
        (batch, length, features), dtype = like.shape, torch.promote_types(like.dtype, torch.float32)
        self._states = torch.zeros(batch * length, history, features, dtype=dtype, device=like.device)
        self._transposed = self._states.transpose(1, 2)
        self.slots = self._states.view(batch, length, history, features).unbind(2)

    def products(self, state: Tensor) -> Tensor:
        """Return the inner products of `state` with all states in the ring, `(batch, sequence, history)`."""
        return torch.bmm(state.reshape(-1, 1, state.shape[2]), self._transposed).view(*state.shape[:2], -1)

    def combine(self, weights: Tensor) -> Tensor:
        """Return sum_i weights_i state_i, `(batch, sequence, features)`; weights are `(batch, sequence, history)`."""
        # Contiguous, because `bmm` would multiply a strided factor row by row.
        rows = weights.to(self._states.dtype).contiguous().view(-1, 1, weights.shape[2])
        return torch.bmm(rows, self._states).view(*weights.shape[:2], -1)


class ProductMatrix:
    """A matrix of inner products for every position, written one row or column at a time. Empty entries are zero.

    Attributes:
        matrix: `(batch, sequence, history, history)`.
    """

    def __init__(self, like: Tensor, history: int, own_sizes: bool = False):
        shape, dtype = (*like.shape[:2], history, history), widest_dtype(like.device)
        self.matrix = torch.zeros(shape, dtype=dtype, device=like.device)
        self._sizes = torch.zeros(shape[:3], dtype=dtype, device=like.device) if own_sizes else None

    # Views are made where they are needed: a compiler of the whole model cannot follow those that are kept.
    @property
    def sizes(self) -> Tensor:
        """Squared norms `(batch, sequence, history)`. `blend` divides the matrix by their sum. They are the diagonal of
        the matrix, or a separate tensor if the diagonal holds other values (`own_sizes`)."""
        return self.matrix.diagonal(dim1=-2, dim2=-1) if self._sizes is None else self._sizes

    def write(self, slot: int, row: Tensor, column: Tensor) -> None:
        """Write a row and a column, each `(batch, sequence, history)`. Where they meet, the column stays."""
        self.matrix.select(2, slot).copy_(row)
        self.matrix.select(3, slot).copy_(column)


def blend(products: list[Tensor], matrices: list[ProductMatrix]) -> Tensor:
    """Return one inner product for every position: its own, plus `PREFIX_WEIGHT` times the total over its scope.

    Each is first divided by the size of its matrix. So neither the length of the prefix nor the size of its residuals
    changes the balance.
    """
    if len(products) == 1:
        return products[0]
    shape = (*products[0].shape[:2], *(1,) * (products[0].dim() - 2))
    own, total = (matrix.sizes.sum(-1).view(shape) for matrix in matrices)
    return torch.addcdiv(products[0] / own, products[1], total, value=PREFIX_WEIGHT)
