"""Output layers: they map states to distributions over a vocabulary.

nn.Linear               a full softmax; returns logits
AdaptiveSoftmax         frequent ids directly, rare ids through their cluster; log-probabilities (`adaptive.py`)
MixtureOfSoftmaxes      several softmaxes, mixed at each position; log-probabilities
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init


class LogProbabilityHead(nn.Module):
    """An output layer that returns log-probabilities, in single precision or wider.

    `head(states)` maps `(..., features)` to `(..., vocab_size)`. `head(states, targets)` returns the negative
    log-likelihood in nats `(tokens,)` of target ids `(tokens,)`, given states `(tokens, features)`.
    Parameters with one row per id can be tied to the token embeddings. Subclasses set `vocab_size`.
    """

    vocab_size: int

    def forward(self, states: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return log-probabilities, or the negative log-likelihood of `targets`; see the class for shapes.

        Raises:
            ValueError: if a target is not an id of the vocabulary.
        """
        if targets is None:
            return self._all(states)
        # Without this check, an adaptive softmax would accept an id beyond the vocabulary.
        check_ids("labels", targets, self.vocab_size, " (or be -100)")
        return self._negative_log_likelihood(states, targets)

    def initialize(self, std: float) -> None:
        """Initialise the parameters that were not loaded. Rows of ids get the standard deviation `std`."""
        raise TypeError(f"{type(self).__name__} must define initialize.")

    def _all(self, states: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _all.")

    def _negative_log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(self._all(states), targets, reduction="none")


class MixtureOfSoftmaxes(LogProbabilityHead):
    """log(sum_j prior_j softmax(W tanh(L_j s)) + 1e-8): a softmax of higher rank (Yang et al. 2018).

    The constant 1e-8 comes from the reference implementation. The probabilities sum to 1 + 1e-8 vocab_size.

    Args:
        features: size of the states.
        vocab_size: number of ids.
        num_experts: number of softmaxes that are mixed.
        latent_size: size of the latent state of each softmax, and number of columns of the weight.
    """

    def __init__(self, features: int, vocab_size: int, num_experts: int, latent_size: int):
        super().__init__()
        self.num_experts, self.vocab_size = num_experts, vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, latent_size))
        self.bias = nn.Parameter(torch.empty(vocab_size))
        self.prior = nn.Linear(features, num_experts)
        self.latent = nn.Linear(features, num_experts * latent_size)

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, num_experts={self.num_experts}"

    def initialize(self, std: float) -> None:
        """Initialise the weight with standard deviation `std` and the bias with zero.

        The linear maps are initialised separately, like any other `nn.Linear`.
        """
        init.normal_(self.weight, std=std)
        init.zeros_(self.bias)

    def _all(self, states: Tensor) -> Tensor:
        log_prior = log_softmax(self.prior(states))
        latent = self.latent(states).tanh().unflatten(-1, (self.num_experts, -1))
        each = log_softmax(F.linear(latent, self.weight, self.bias))
        mixed = torch.logsumexp(log_prior[..., None] + each, -2)
        return torch.logaddexp(mixed, mixed.new_tensor(math.log(1e-8)))


def check_ids(name: str, ids: Tensor, vocab_size: int, exception: str = "") -> None:
    """Refuse ids outside of the vocabulary. `exception` tells in the message what else is allowed.

    Raises:
        ValueError: if there are such ids.
    """
    if torch.compiler.is_compiling() or not ids.numel():
        return
    if bool(((ids < 0) | (ids >= vocab_size)).any()):  # one question, because an accelerator waits for each
        raise ValueError(
            f"{name} must lie in [0, vocab_size={vocab_size}){exception}, got {int(ids.min())} to {int(ids.max())}. "
            "Do the tokenizer and the model belong together?"
        )


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log-softmax over the last dimension, in single precision or wider."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
