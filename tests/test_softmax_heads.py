"""Output layers give distributions, and their losses are those of the distributions."""

import math

import pytest
import torch

from hf_deq.adaptive import AdaptiveSoftmax
from hf_deq.softmax_heads import MixtureOfSoftmaxes


def filled(head):
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head.double()


HEADS = {
    "one cut": lambda: filled(AdaptiveSoftmax(6, 20, [7])),
    "three cuts": lambda: filled(AdaptiveSoftmax(6, 20, [4, 5, 13])),
    "projected": lambda: filled(AdaptiveSoftmax(6, 20, [], embedding_size=4)),
    "one projected table": lambda: filled(AdaptiveSoftmax(6, 20, [7, 12], embedding_size=4)),
    "shrinking tables": lambda: filled(AdaptiveSoftmax(6, 20, [7, 12], embedding_size=8, div_val=2)),
    "mixture": lambda: filled(MixtureOfSoftmaxes(6, 20, num_experts=3, latent_size=4)),
}
heads = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())


@heads
def test_log_probabilities_sum_to_one(make):
    total = make()(torch.randn(2, 5, 6, dtype=torch.float64)).exp().sum(-1)
    # The mixture's floor of 1e-8 adds up to 20 of it.
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2.1e-7)


@heads
def test_likelihoods_and_their_gradients_are_those_of_the_distribution(make):
    head, states, targets = make(), torch.randn(50, 6, dtype=torch.float64), torch.arange(50) % 20
    gradients = []
    for nats in (
        lambda: head(states, targets),
        lambda: -head(states).gather(-1, targets[:, None])[:, 0],
    ):
        head.zero_grad()
        values = nats()
        values.sum().backward()
        gradients.append([values, *(parameter.grad.clone() for parameter in head.parameters())])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_a_split_softmax_goes_by_way_of_the_cluster():
    """Three clusters of ids 0-3, 4 and 5-9; cluster 1 is the last entry of the head, cluster 2 the one before."""
    head, state = filled(AdaptiveSoftmax(6, 10, [4, 5])), torch.randn(6, dtype=torch.float64)
    entries = torch.cat([head.weight[:4] @ state + head.bias[:4], head.cluster_weight @ state + head.cluster_bias])
    entries = entries.log_softmax(0)
    rare = (head.weight[5:] @ state + head.bias[5:]).log_softmax(0)
    expected = torch.cat([entries[:4], entries[5:6], entries[4] + rare])
    torch.testing.assert_close(head(state), expected, rtol=0, atol=1e-12)


def test_a_loss_computes_the_rare_ids_only_where_they_are_targets(monkeypatch):
    head, rows = filled(AdaptiveSoftmax(6, 20, [4, 10])), []
    within = AdaptiveSoftmax._within
    monkeypatch.setattr(AdaptiveSoftmax, "_within", lambda self, c, s: rows.append((c, len(s))) or within(self, c, s))
    head(torch.randn(8, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 12, 5, 19]))
    assert rows == [(1, 1), (2, 2)]


@heads
@pytest.mark.parametrize("target", [-1, 20, 700])
def test_targets_beyond_the_vocabulary_are_refused(make, target):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, vocab_size=20\) .*tokenizer and the model"):
        make()(torch.randn(2, 6, dtype=torch.float64), torch.tensor([3, target]))


def test_a_mixture_is_the_mean_of_its_softmaxes():
    head, state = filled(MixtureOfSoftmaxes(6, 20, num_experts=3, latent_size=4)), torch.randn(6, dtype=torch.float64)
    prior = (head.prior.weight @ state + head.prior.bias).softmax(0)
    latent = (head.latent.weight @ state + head.latent.bias).tanh().view(3, 4)
    mixed = sum(p * (head.weight @ one + head.bias).softmax(0) for p, one in zip(prior, latent, strict=True))
    torch.testing.assert_close(head(state), (mixed + 1e-8).log(), rtol=0, atol=1e-12)


def test_a_mixture_stays_finite_where_probabilities_vanish():
    head = filled(MixtureOfSoftmaxes(6, 20, num_experts=2, latent_size=4)).float()
    with torch.no_grad():
        head.bias[0] = 1000.0
    assert head(torch.randn(6))[1:].allclose(torch.tensor(math.log(1e-8)))


@heads
def test_losses_are_in_single_precision_at_least(make):
    head, states, targets = make(), torch.randn(50, 6, dtype=torch.float64), torch.arange(50) % 20
    low = head.to(torch.bfloat16)
    nats = low(states.bfloat16(), targets)
    assert nats.dtype == torch.float32
    assert (low(states.bfloat16()).double().exp().sum(-1) - 1).abs().max() < 1e-5  # rounded, it would be 4e-3
    exact = head.double()(states.bfloat16().double(), targets)
    torch.testing.assert_close(nats.double(), exact, rtol=0.01, atol=0.1)
