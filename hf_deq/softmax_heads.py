"""Output layers: states to distributions over a vocabulary.

    nn.Linear               a full softmax; gives logits
    SplitSoftmax            frequent ids first, rare ones by way of their cluster; log-probabilities
    MixtureOfSoftmaxes      several softmaxes, mixed per position; log-probabilities

Each holds a `weight` with a row per id, which can be tied to the token embeddings, and a `bias`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LogProbabilityHead(nn.Module):
    """An output layer that gives log-probabilities, in single precision at least.

    `head(states)` maps `(..., features)` to `(..., vocab_size)`; `head(states, targets)` gives the negative
    log-likelihood in nats `(tokens,)` of target ids `(tokens,)`, given states `(tokens, features)`.

    Args:
        features: columns of the weight.
        vocab_size: rows of the weight.
    """

    def __init__(self, features: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, features))
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def forward(self, states: Tensor, targets: Tensor | None = None) -> Tensor:
        """As above."""
        return self._all(states) if targets is None else self._negative_log_likelihood(states, targets)

    def _all(self, states: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _all.")

    def _negative_log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(self._all(states), targets, reduction="none")


class SplitSoftmax(LogProbabilityHead):
    """Adaptive softmax without projections (Grave et al. 2017): log P(id) = log P(its cluster) + log P(id | cluster).

    The head is a softmax over the ids of the first cluster and one entry for each of the others. The
    last of those entries is cluster 1, the one before it cluster 2, and so on, as in Transformer-XL. A loss never
    computes more than the head and, for the tokens of each other cluster, that cluster.

    Args:
        features: size of the states.
        vocab_size: number of ids.
        cutoffs: first id of each cluster but the first.
    """

    def __init__(self, features: int, vocab_size: int, cutoffs: list[int]):
        super().__init__(features, vocab_size)
        self.ends = [*cutoffs, vocab_size]
        self.cluster_weight = nn.Parameter(torch.empty(len(cutoffs), features))
        self.cluster_bias = nn.Parameter(torch.empty(len(cutoffs)))

    def _all(self, states: Tensor) -> Tensor:
        head = self._head(states)
        parts = [head[..., : self.ends[0]]]
        for cluster in range(1, len(self.ends)):
            parts.append(head[..., -cluster, None] + self._within(cluster, states))
        return torch.cat(parts, -1)

    def _negative_log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        head = self._head(states)
        cluster_of = torch.bucketize(targets, torch.tensor(self.ends, device=targets.device), right=True)
        entry = torch.where(cluster_of == 0, targets, head.shape[-1] - cluster_of)
        log_probability = head.gather(-1, entry[:, None])[:, 0]
        for cluster in range(1, len(self.ends)):
            (members,) = (cluster_of == cluster).nonzero(as_tuple=True)
            local = targets[members] - self.ends[cluster - 1]
            within = self._within(cluster, states[members]).gather(-1, local[:, None])[:, 0]
            log_probability = log_probability.index_add(0, members, within)
        return -log_probability

    def _head(self, states: Tensor) -> Tensor:
        first = self.ends[0]
        weight = torch.cat([self.weight[:first], self.cluster_weight])
        bias = torch.cat([self.bias[:first], self.cluster_bias])
        return _log_softmax(F.linear(states, weight, bias))

    def _within(self, cluster: int, states: Tensor) -> Tensor:
        ids = slice(self.ends[cluster - 1], self.ends[cluster])
        return _log_softmax(F.linear(states, self.weight[ids], self.bias[ids]))


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
        super().__init__(latent_size, vocab_size)
        self.num_experts = num_experts
        self.prior = nn.Linear(features, num_experts)
        self.latent = nn.Linear(features, num_experts * latent_size)

    def _all(self, states: Tensor) -> Tensor:
        log_prior = _log_softmax(self.prior(states))
        latent = self.latent(states).tanh().unflatten(-1, (self.num_experts, -1))
        each = _log_softmax(F.linear(latent, self.weight, self.bias))
        mixed = torch.logsumexp(log_prior[..., None] + each, -2)
        return torch.logaddexp(mixed, mixed.new_tensor(math.log(1e-8)))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
