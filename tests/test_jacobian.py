"""Jacobian estimates against the Jacobian itself."""

import pytest
import torch

from hf_deq import jacobian_regularization, spectral_radius


def dense_jacobian(f, z):
    return torch.autograd.functional.jacobian(f, z).view(z.numel(), z.numel())


def test_regularization_estimates_the_mean_squared_row_norm(causal_map):
    x, z = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    z.requires_grad_()
    exact = dense_jacobian(lambda s: causal_map(s, x), z.detach()).square().sum() / z.numel()
    f_z = causal_map(z, x)
    estimates = torch.stack([jacobian_regularization(f_z, z) for _ in range(4000)])
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / 4000**0.5
    assert estimates.std() / 4000**0.5 < 0.03 * exact


def test_regularization_is_differentiable_to_the_parameters(causal_map):
    x, z = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    z.requires_grad_()

    def loss(own):
        f_z = torch.func.functional_call(causal_map, {"own": own}, (z, x))
        return jacobian_regularization(f_z, z, torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(loss, causal_map.own.detach().clone().requires_grad_())


def test_regularization_needs_a_graph(causal_map):
    z = torch.randn(1, 2, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="computed with gradients"):
        jacobian_regularization(causal_map(z, z).detach(), z)


@pytest.mark.parametrize("complex_pair", [False, True])
def test_spectral_radius_row_by_row(complex_pair):
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]]) if complex_pair else torch.tensor([[1.0, 0.3], [0.0, -0.2]])
    gains = torch.tensor([0.4, 1.3]).double()[:, None, None]
    radius = spectral_radius(lambda z: gains * (z @ rotation.double()), torch.zeros(2, 3, 2).double(), steps=60)
    torch.testing.assert_close(radius, gains.flatten(), rtol=1e-3, atol=0)


def test_spectral_radius_of_a_causal_map(causal_map):
    x, z = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    exact = torch.linalg.eigvals(dense_jacobian(lambda s: causal_map(s, x), z)).abs().max()
    torch.testing.assert_close(spectral_radius(lambda s: causal_map(s, x), z, steps=400)[0], exact, rtol=0.03, atol=0)


def test_spectral_radius_needs_steps():
    with pytest.raises(ValueError, match="at least 2 steps"):
        spectral_radius(lambda z: z, torch.zeros(1, 1, 1), steps=1)


def test_a_map_that_ignores_its_state_has_no_jacobian():
    z, value = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="from a z that requires them"):
        jacobian_regularization(2 * value, z)
    assert spectral_radius(lambda z: 2 * value, z).tolist() == [0, 0]
