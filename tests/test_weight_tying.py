"""What is fixed over a solve: dropout masks and normalised weights."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import TRANSFORMER, TRELLISNET, random_ids

from hf_deq import weight_tying
from hf_deq.weight_tying import (
    CausalConvolution,
    VariationalDropout,
    WeightNormLinear,
    draw_dropout_mask,
    keeping_weights,
)


@pytest.mark.parametrize("kernel, dilation", [(2, 1), (3, 2), (4, 3)])
@pytest.mark.parametrize("weight_norm", [True, False])
def test_a_causal_convolution_is_torchs_own_with_padding_in_front(kernel, dilation, weight_norm):
    convolution = CausalConvolution(3, 5, kernel, dilation, weight_norm).double()
    for parameter in convolution.parameters():
        torch.nn.init.normal_(parameter)
    x, past = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, convolution.reach, 3, dtype=torch.float64)
    weight = convolution.weight if not weight_norm else torch._weight_norm(convolution.direction, convolution.magnitude)
    padded = torch.cat([past, x], 1).transpose(1, 2)
    expected = torch.nn.functional.conv1d(padded, weight, convolution.bias, dilation=dilation).transpose(1, 2)
    ours = convolution(x, past)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_weights_are_dropped_in_training_only():
    convolution = CausalConvolution(30, 40, 2)
    convolution.initialize()
    past, unit = torch.zeros(30, 1, 30), torch.eye(30)[:, None]  # the answer to a unit vector is a column of the weight

    def weights(dropout):
        return convolution(
            unit, past, weight_mask=draw_dropout_mask(convolution._taps.flatten(1), dropout, convolution.training)
        )[:, 0]

    convolution.eval()
    whole = weights(0.4)
    assert (whole != 0).all()
    convolution.train()
    dropped = weights(0.4)
    assert 0.3 < (dropped == 0).float().mean() < 0.5
    torch.testing.assert_close(dropped[dropped != 0], whole[dropped != 0] / 0.6)


def test_dropout_masks_keep_the_mean_and_do_nothing_outside_of_training():
    like = torch.ones(100, 100)
    assert draw_dropout_mask(like, 0.3, training=False) is None and draw_dropout_mask(like, 0.0, training=True) is None
    assert abs(draw_dropout_mask(like, 0.3, training=True).mean() - 1) < 0.03


def test_variational_dropout_drops_a_feature_of_a_row_everywhere():
    dropped = VariationalDropout(0.5).train()(torch.ones(4, 9, 50)) == 0
    assert torch.equal(dropped.all(1), dropped.any(1)) and 0.3 < dropped.float().mean() < 0.7
    assert not torch.equal(dropped[0, 0], dropped[1, 0])


def test_a_normalised_linear_map_is_torchs_own_and_computes_its_weight_once(monkeypatch):
    linear = WeightNormLinear(5, 3).double()
    linear.initialize(std=0.7)
    torch.nn.init.normal_(linear.magnitude)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, torch._weight_norm(linear.direction, linear.magnitude), linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-12)
    computed = []
    plain = weight_tying.normalised_weight
    monkeypatch.setattr(weight_tying, "normalised_weight", lambda *args: computed.append(1) or plain(*args))
    with keeping_weights():
        with torch.no_grad():
            values = [linear(x) for _ in range(5)]
        with_graph = [linear(x) for _ in range(2)]
    assert len(computed) == 2 and all(torch.equal(value, with_graph[0]) for value in values)
    with_graph[1].sum().backward()
    assert linear.magnitude.grad.abs().min() > 0 and linear.direction.grad.isfinite().all()
    with torch.no_grad():
        linear.magnitude.mul_(2)
        assert not torch.equal(linear(x), values[0])  # nothing is kept after the solve


def test_weights_are_let_go_when_a_solve_fails():
    linear = WeightNormLinear(5, 3)
    linear.initialize(std=0.7)
    x = torch.randn(4, 5)
    with pytest.raises(RuntimeError), keeping_weights():
        before = linear(x)
        raise RuntimeError
    with torch.no_grad():
        linear.magnitude.mul_(2)
    assert not torch.equal(linear(x), before)


def test_a_model_is_differentiated_in_several_threads():
    """What a solve keeps is that solve's: no thread sees the graph of another."""
    model = TRANSFORMER.model(**TRANSFORMER.variants["paper"], solver_tolerance=1e-4)
    parameters = tuple(model.parameters())

    def gradients(seed):
        ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(seed))
        return torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, parameters)

    expected = [gradients(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for ours, alone in zip(threads.map(gradients, range(4)), expected, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(ours, alone, strict=True))


def test_a_reversible_model_normalises_its_weights_once_if_nothing_is_differentiated(monkeypatch):
    model, computed = TRELLISNET.model(gradient="reversible"), []
    plain = weight_tying.normalised_weight
    monkeypatch.setattr(weight_tying, "normalised_weight", lambda *args: computed.append(1) or plain(*args))
    with torch.no_grad():
        assert model(random_ids(2, 5), use_cache=False).num_evaluations.max() > 3
    assert len(computed) == 2  # of the injection and of f
