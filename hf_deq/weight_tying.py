"""What stays the same in all evaluations of a solve: dropout masks, and weights that are computed from parameters.

A weight-tied f is evaluated many times. A mask that is drawn anew would move the fixed point, and a weight that is
normalised anew would cost time in every evaluation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .packed_texts import Texts, within_text


def draw_dropout_mask(
    like: Tensor, probability: float, training: bool, shape: tuple[int, ...] | None = None
) -> Tensor | None:
    """Draw one dropout mask for a whole solve; `None` if dropout is off.

    A new mask in every evaluation would move the fixed point while it is being solved (variational dropout over depth;
    Gal & Ghahramani 2016, Bai et al. 2019 appendix A).

    Args:
        like: the mask has its shape, dtype and device.
        probability: of an entry to be dropped. The others are scaled up, so that expectations stay the same.
        training: whether dropout is on.
        shape: of the mask, if not that of `like`.
    """
    if not training or probability == 0:
        return None
    empty = torch.empty_like(like, requires_grad=False) if shape is None else like.new_empty(shape)
    keep = empty.bernoulli_(1 - probability)
    return keep.div_(1 - probability)


def apply_mask(state: Tensor, mask: Tensor | None) -> Tensor:
    """Return `state * mask`, or `state` if there is no mask."""
    return state if mask is None else state * mask


class VariationalDropout(nn.Module):
    """Dropout with one mask for all positions of a sequence (Gal & Ghahramani 2016).

    Args:
        probability: of a feature to be dropped, in the whole row.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def extra_repr(self) -> str:
        return f"probability={self.probability}"

    def forward(self, states: Tensor) -> Tensor:
        """Map states `(batch, sequence, features)` to states of the same shape."""
        return apply_mask(states, draw_dropout_mask(states[:, :1], self.probability, self.training))


# Weights that were computed within `keeping_weights`. Solves may run in several threads, so no module holds them.
_kept_weights: ContextVar[dict | None] = ContextVar("_kept_weights", default=None)


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Within this context `kept` computes the weight of a module once without gradients, and once with them."""
    before = _kept_weights.get()
    token = _kept_weights.set({} if before is None else before)
    try:
        yield
    finally:
        _kept_weights.reset(token)


def kept(module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """Return the weight of a module: the one that `keeping_weights` holds, or else a new one."""
    weights = _kept_weights.get()
    if weights is None:
        return compute()
    key = module, torch.is_grad_enabled()  # the solver's weight has no graph, but the gradient needs a graph
    if key not in weights:
        weights[key] = compute()
    return weights[key]


def normalised_weight(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Return W[o] = g[o] v[o] / ||v[o]|| for a direction v of shape `(out, ...)` (Salimans & Kingma 2016)."""
    return direction * (magnitude / _lengths(direction))


def _lengths(direction: Tensor) -> Tensor:
    """Norm of the weights of every output, with as many dimensions as `direction`."""
    return torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.dim())), keepdim=True)


class WeightNormLinear(nn.Module):
    """A linear map with the weight W[o] = g[o] v[o] / ||v[o]|| (Salimans & Kingma 2016).

    Attributes:
        magnitude: g, `(out, 1)`.
        direction: v, `(out, in)`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.magnitude = nn.Parameter(torch.empty(out_features, 1))
        self.direction = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def extra_repr(self) -> str:
        out_features, in_features = self.direction.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"

    def initialize(self, std: float) -> None:
        """Set the parameters that were not loaded, so that W has this standard deviation."""
        init.normal_(self.direction, std=std)
        init.copy_(self.magnitude, _lengths(self.direction))
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        return F.linear(x, kept(self, lambda: normalised_weight(self.magnitude, self.direction)), self.bias)


class CausalConvolution(nn.Module):
    """A causal convolution over the positions of `(batch, sequence, features)`.

    y_t = bias + sum_q W[:, :, q] x_{t - (kernel_size - 1 - q) dilation}

    Args:
        in_features, out_features: sizes of x and y.
        kernel_size, dilation: number of taps, and positions between them.
        weight_norm: hold W as magnitude and direction, W[o] = g[o] v[o] / ||v[o]||. The parameters are `magnitude`
            `(out, 1, 1)` and `direction` `(out, in, kernel)` then, because Transformers renames parameters that are
            called weight_g and weight_v when it loads them.
        gain: standard deviation of the initial weights, relative to (in_features * kernel_size) ** -0.5.
    """

    def __init__(self, in_features, out_features, kernel_size, dilation=1, weight_norm=True, gain=1.0):
        super().__init__()
        self.kernel_size, self.dilation = kernel_size, dilation
        self.weight_norm, self.initializer_gain = weight_norm, gain
        shape = (out_features, in_features, kernel_size)
        if weight_norm:
            self.magnitude = nn.Parameter(torch.empty(out_features, 1, 1))
            self.direction = nn.Parameter(torch.empty(shape))
        else:
            self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_features))

    def extra_repr(self) -> str:
        out_features, in_features, kernel_size = self._taps.shape
        return (
            f"in_features={in_features}, out_features={out_features}, kernel_size={kernel_size}, "
            f"dilation={self.dilation}, weight_norm={self.weight_norm}"
        )

    @property
    def reach(self) -> int:
        """Number of positions before the first one that the first output reads."""
        return (self.kernel_size - 1) * self.dilation

    @property
    def _taps(self) -> Tensor:
        """The parameter with one entry for each tap, `(out, in, kernel)`."""
        return self.direction if self.weight_norm else self.weight

    def initialize(self) -> None:
        """Set the parameters that were not loaded. g starts as the length of v."""
        init.normal_(self._taps, std=self.initializer_gain * self._taps[0].numel() ** -0.5)
        if self.weight_norm:
            init.copy_(self.magnitude, _lengths(self._taps))
        init.zeros_(self.bias)

    def forward(self, x: Tensor, past: Tensor, texts: Texts | None = None, weight_mask: Tensor | None = None) -> Tensor:
        """Convolve `(batch, sequence, in)` to `(batch, sequence, out)`.

        Args:
            past: what stands before x, `(batch, reach, in)`.
            texts: the texts of packed rows. No text reads from another one.
            weight_mask: a dropout mask `(out, kernel * in)`, the same in all evaluations of a solve.
        """
        distances = [tap * self.dilation for tap in reversed(range(self.kernel_size))]
        taps = [_shifted(x, past, distance, texts) for distance in distances]
        return F.linear(torch.cat(taps, -1), kept(self, lambda: self._matrix(weight_mask)), self.bias)

    def _matrix(self, weight_mask: Tensor | None) -> Tensor:
        """W as a matrix `(out, kernel * in)`."""
        weight = normalised_weight(self.magnitude, self.direction) if self.weight_norm else self.weight
        return apply_mask(weight.transpose(1, 2).flatten(1), weight_mask)


def _shifted(x: Tensor, past: Tensor, distance: int, texts: Texts | None) -> Tensor:
    """What stands `distance` positions before each position, `(batch, sequence, in)`; zero if it is another text."""
    if distance == 0:
        return x
    length = x.shape[1]
    before = torch.cat(
        [past[:, past.shape[1] - distance :], within_text(x[:, : max(length - distance, 0)], distance, texts)], 1
    )
    return before[:, :length]
