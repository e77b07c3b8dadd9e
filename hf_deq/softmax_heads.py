"""Output layers: states to distributions over a vocabulary.

nn.Linear               a full softmax; gives logits
AdaptiveSoftmax         frequent ids first, rare ones by way of their cluster; log-probabilities (`adaptive.py`)
MixtureOfSoftmaxes      several softmaxes, mixed per position; log-probabilities
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init


class LogProbabilityHead(nn.Module):
    """An output layer that gives log-probabilities, in single precision at least.

    `head(states)` maps `(..., features)` to `(..., vocab_size)`; `head(states, targets)` gives the negative
    log-likelihood in nats `(tokens,)` of target ids `(tokens,)`, given states `(tokens, features)`.
    Parameters with a row per id can be tied to the token embeddings. Subclasses set `vocab_size`.
    """

    vocab_size: int

    def forward(self, states: Tensor, targets: Tensor | None = None) -> Tensor:
        """As above.

        Raises:
            ValueError: a target is not an id of the vocabulary.
        """
        if targets is None:
            return self._all(states)
        # A clustered vocabulary would count an id beyond it to some cluster.
        check_ids("labels", targets, self.vocab_size, " (or be -100)")
        return self._negative_log_likelihood(states, targets)

    def initialize(self, std: float) -> None:
        """Fill in whatever parameter was not loaded; rows of ids get that standard deviation."""
        raise TypeError(f"{type(self).__name__} must define initialize.")

    def _all(self, states: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _all.")

    def _negative_log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(self._all(states), targets, reduction="none")


class MixtureOfSoftmaxes(LogProbabilityHead):
    """log(sum_j prior_j softmax(W tanh(L_j s)) + 1e-8): a softmax of higher rank (Yang et al. 2018).

    The small constant is the reference implementation's; probabilities sum to 1 + 1e-8 vocab_size.

    Args:
        features: size of the states.
        vocab_size: number of ids.
        num_experts: softmaxes that are mixed.
        latent_size: size of the state that each of them sees; columns of the weight.
    """

    def __init__(self, features: int, vocab_size: int, num_experts: int, latent_size: int):
        super().__init__()
        self.num_experts, self.vocab_size = num_experts, vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, latent_size))
        self.bias = nn.Parameter(torch.empty(vocab_size))
        self.prior = nn.Linear(features, num_experts)
        self.latent = nn.Linear(features, num_experts * latent_size)

    def initialize(self, std: float) -> None:
        """The weight of that standard deviation, biases of zero; the linear maps are initialised on their own."""
        init.normal_(self.weight, std=std)
        init.zeros_(self.bias)

    def _all(self, states: Tensor) -> Tensor:
        log_prior = log_softmax(self.prior(states))
        latent = self.latent(states).tanh().unflatten(-1, (self.num_experts, -1))
        each = log_softmax(F.linear(latent, self.weight, self.bias))
        mixed = torch.logsumexp(log_prior[..., None] + each, -2)
        return torch.logaddexp(mixed, mixed.new_tensor(math.log(1e-8)))


def check_ids(name: str, ids: Tensor, vocab_size: int, exception: str = "") -> None:
    """Refuse ids that are not of the vocabulary; `exception` says in the message what else is allowed.

    Raises:
        ValueError: there are some.
    """
    if torch.compiler.is_compiling() or not ids.numel():
        return
    smallest, largest = ids.aminmax()
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"{name} must lie in [0, vocab_size={vocab_size}){exception}, got {int(smallest)} to {int(largest)}. "
            "Do the tokenizer and the model belong together?"
        )


def log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in single precision at least."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
