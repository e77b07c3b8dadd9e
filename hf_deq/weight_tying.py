"""What tying weights over depth asks for: nothing random and nothing costly inside f.

Dropout masks are drawn, and normalised weights computed, once for all evaluations of a solve.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .packed_texts import Texts, within_text


def draw_dropout_mask(like: Tensor, probability: float, training: bool) -> Tensor | None:
    """One dropout mask for a whole solve, shape of `like`, scaled to keep expectations; `None` when it does nothing.

    A mask drawn anew in every evaluation would move the fixed point while it is being solved
    (variational dropout over depth; Gal & Ghahramani 2016, Bai et al. 2019 appendix A).
    """
    if not training or probability == 0:
        return None
    keep = torch.empty_like(like, requires_grad=False).bernoulli_(1 - probability)
    return keep.div_(1 - probability)


def apply_mask(state: Tensor, mask: Tensor | None) -> Tensor:
    """`state * mask`, or `state` where there is no mask."""
    return state if mask is None else state * mask


class VariationalDropout(nn.Module):
    """Dropout with one mask for all positions of a sequence (Gal & Ghahramani 2016).

    Args:
        probability: of a feature being dropped, for the whole row.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, states: Tensor) -> Tensor:
        """`(batch, sequence, features)` to the same."""
        return apply_mask(states, draw_dropout_mask(states[:, :1], self.probability, self.training))


class WeightNormLinear(nn.Module):
    """A linear map with W[o] = g[o] v[o] / ||v[o]|| (Salimans & Kingma 2016).

    g and v are `magnitude` `(out, 1)` and `direction` `(out, in)`. Within `keeping_weights` W is computed once.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.magnitude = nn.Parameter(torch.empty(out_features, 1))
        self.direction = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def initialize(self, std: float) -> None:
        """Fill in whatever parameter was not loaded, so that W has that standard deviation."""
        init.normal_(self.direction, std=std)
        init.copy_(self.magnitude, _lengths(self.direction))
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return F.linear(x, kept(self, lambda: normalised_weight(self.magnitude, self.direction)), self.bias)


# The weights that were computed within `keeping_weights`. Solves may run in several threads, so no module holds them.
_kept_weights: ContextVar[dict | None] = ContextVar("_kept_weights", default=None)


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Within this context, a solve or a call of generate, normalised weights are computed once (twice with a graph)."""
    before = _kept_weights.get()
    token = _kept_weights.set({} if before is None else before)
    try:
        yield
    finally:
        _kept_weights.reset(token)


def kept(module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """The weight of a module, computed anew or kept by `keeping_weights`."""
    weights = _kept_weights.get()
    if weights is None:
        return compute()
    key = module, torch.is_grad_enabled()  # the solver's weight has no graph, the gradient needs one that has
    if key not in weights:
        weights[key] = compute()
    return weights[key]


def normalised_weight(magnitude: Tensor, direction: Tensor) -> Tensor:
    """W[o] = g[o] v[o] / ||v[o]||, for v of shape `(out, ...)`."""
    return direction * (magnitude / _lengths(direction))


def _lengths(direction: Tensor) -> Tensor:
    """Norm of every output's weights, with as many dimensions."""
    return torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.dim())), keepdim=True)


class CausalConvolution(nn.Module):
    """A causal convolution over the positions of `(batch, sequence, features)`, weights normalised if asked to.

    y_t = bias + sum_q W[:, :, q] x_{t - (kernel_size - 1 - q) dilation}. With weight normalisation
    W[o] = g[o] v[o] / ||v[o]|| (Salimans & Kingma 2016). Calling the module computes W, once for all
    applications within a solve, and returns the convolution as a function:

        convolve = convolution(dropout=0.1)
        y = convolve(x, past)

    Args:
        in_features, out_features: sizes of x and y.
        kernel_size, dilation: taps, and positions between them.
        weight_norm: hold g and v, as `magnitude` `(out, 1, 1)` and `direction` `(out, in, kernel)`, instead of W.
            (Transformers renames parameters called weight_g and weight_v when it loads them.)
        gain: standard deviation of initial weights, relative to (in_features * kernel_size) ** -0.5.
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

    @property
    def reach(self) -> int:
        """Positions before the first that the first output looks at."""
        return (self.kernel_size - 1) * self.dilation

    def initialize(self) -> None:
        """Fill in whatever parameter was not loaded; g starts as the length of v."""
        weight = self.direction if self.weight_norm else self.weight
        init.normal_(weight, std=self.initializer_gain * weight[0].numel() ** -0.5)
        if self.weight_norm:
            init.copy_(self.magnitude, _lengths(weight))
        init.zeros_(self.bias)

    def _matrix(self) -> Tensor:
        """W as a matrix `(out, kernel * in)`."""
        weight = normalised_weight(self.magnitude, self.direction) if self.weight_norm else self.weight
        return weight.transpose(1, 2).flatten(1)

    def forward(self, dropout: float = 0.0) -> Callable[..., Tensor]:
        """The convolution of `(batch, sequence, in)`, with `(batch, reach, in)` before it and the texts of packed rows.

        Args:
            dropout: share of the weights that are dropped, in training.
        """
        matrix, bias = kept(self, self._matrix), self.bias
        matrix = apply_mask(matrix, draw_dropout_mask(matrix, dropout, self.training))

        def convolve(x: Tensor, past: Tensor, texts: Texts | None = None) -> Tensor:
            distances = [tap * self.dilation for tap in reversed(range(self.kernel_size))]
            taps = [_shifted(x, past, distance, texts) for distance in distances]
            return F.linear(torch.cat(taps, -1), matrix, bias)

        return convolve


def _shifted(x: Tensor, past: Tensor, distance: int, texts: Texts | None) -> Tensor:
    """What lies `distance` before each position, `(batch, sequence, in)`; zero where that is another text."""
    if distance == 0:
        return x
    length = x.shape[1]
    before = torch.cat(
        [past[:, past.shape[1] - distance :], within_text(x[:, : max(length - distance, 0)], distance, texts)], 1
    )
    return before[:, :length]
