"""The Jacobian of f at the equilibrium, without computing the full matrix.

`jacobian_regularization` keeps f contractive during training. `spectral_radius` measures afterwards
how contractive f is (below 1: plain iteration converges locally).
"""

import torch
from torch import Tensor

from .fixed_point import SequenceMap


def jacobian_regularization(
    f_z: Tensor, z: Tensor, generator: torch.Generator | None = None, tokens: Tensor | None = None
) -> Tensor:
    """Return the Hutchinson estimate of ||J||_F^2 / n, J = df/dz, with one Gaussian vector; n is the size of the state.

    Source: Bai, Koltun & Kolter 2021 (arXiv 2106.14342), equation 6. The estimate is differentiable
    with respect to everything that `f_z` depends on, so it can be added to a loss. Then the operations of f must
    be twice differentiable (for attention: the "math" backend of scaled dot product attention).

    Args:
        f_z: f(z), shape `(batch, sequence, features)`, computed from `z` with gradients enabled.
        z: the state, a tensor that requires gradients.
        generator: random generator for the Gaussian vector.
        tokens: which positions are tokens, bool `(batch, sequence, 1)`; `None` if all are. Padding is no part of the
            state, and f must be constant there.

    Returns:
        A scalar. Its expectation is the mean squared row norm of J.

    Raises:
        ValueError: if `f_z` was not computed from `z` with gradients.
    """
    product = None
    if f_z.requires_grad and z.requires_grad:
        noise = torch.randn(f_z.shape, dtype=f_z.dtype, device=f_z.device, generator=generator)
        (product,) = torch.autograd.grad(f_z, z, noise, create_graph=True, allow_unused=True)
    if product is None:
        raise ValueError(
            "jacobian_regularization needs f_z = f(z) computed with gradients from a z that requires them."
        )
    if tokens is None:
        return product.square().mean()
    squares = product.square().masked_fill(~tokens, 0)
    return squares.sum() / (tokens.sum().clamp_min(1) * z.shape[-1])


def spectral_radius(f: SequenceMap, z: Tensor, steps: int = 50) -> Tensor:
    """Estimate the spectral radius of df/dz at `z` for each row, by power iteration.

    Each step is one vector-Jacobian product. The estimate is the geometric mean growth over the second
    half of the steps. It also converges when the dominant eigenvalues are a complex pair. The Jacobian of a
    causal f is block triangular and far from normal: after 50 steps, expect an error of a few per cent in
    either direction.

    Args:
        f: maps a state `(batch, sequence, features)` to a state of the same shape; rows must be independent.
        z: the state at which to estimate, usually an equilibrium.
        steps: number of vector-Jacobian products, at least 2.

    Returns:
        Shape `(batch,)`.

    Raises:
        ValueError: if `steps` is less than 2.
    """
    if steps < 2:
        raise ValueError(f"spectral_radius needs at least 2 steps, got {steps}.")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        f_z = f(z)
    vector = torch.randn_like(f_z)
    log_growth = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
    for step in range(steps):
        vector = vector / torch.linalg.vector_norm(vector, dim=(1, 2), keepdim=True).clamp_min(
            torch.finfo(z.dtype).tiny
        )
        (vector,) = torch.autograd.grad(f_z, z, vector, retain_graph=True, materialize_grads=True)
        if step >= steps // 2:
            log_growth += torch.linalg.vector_norm(vector, dim=(1, 2)).log()
    return (log_growth / (steps - steps // 2)).exp()
