"""The three theorems of Bai, Kolter & Koltun 2019 (arXiv 1909.01377), in double precision."""

import pytest
import torch
from conftest import CausalMap
from families import TRANSFORMER, TRELLISNET, random_ids

from hf_deq import AndersonSolver, ImplicitGradient, equilibrium

SOLVER = AndersonSolver(tolerance=1e-13, max_evaluations=300)
GRADIENT = ImplicitGradient(SOLVER)


def assert_close(ours, expected, tolerance=1e-8):
    """Relative error in norm, tensor by tensor."""
    for a, b in zip(ours, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b) + 1e-14


def weigh(value):
    """A loss whose gradient differs at every entry."""
    return (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum() + value.pow(3).sum()


def dense_gradients(f, z, loss, inputs):
    """Theorem 1 with matrices: dL/dz (I - J)^-1 df/dinputs at the equilibrium z, J written out."""
    z = z.detach().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(f, z.detach()).view(z.numel(), z.numel())
    (grad,) = torch.autograd.grad(loss(z), z)
    w = torch.linalg.solve((torch.eye(z.numel(), dtype=z.dtype) - jacobian).T, grad.flatten())
    return torch.autograd.grad(f(z.detach()), inputs, w.view_as(z))


def test_theorem_1_holds_for_a_causal_map(causal_map):
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *causal_map.parameters())

    def f(z):
        return causal_map(z, x)

    value = equilibrium(f, torch.zeros_like(x), SOLVER, GRADIENT).value
    assert_close(torch.autograd.grad(weigh(value), inputs), dense_gradients(f, value, weigh, inputs))


@pytest.mark.parametrize(
    "family, fields",
    [
        (TRANSFORMER, {}),
        (TRANSFORMER, {"norm_position": "pre", "position_embedding_type": "relative"}),
        (TRANSFORMER, {"num_hidden_layers": 2}),
        (TRELLISNET, {"intermediate_size": 4}),
        (TRELLISNET, {"intermediate_size": 4, "cell_scan": False}),
    ],
    ids=["transformer", "transformer-pre-relative", "transformer-two-layers", "trellisnet", "trellisnet-no-scan"],
)
def test_theorem_1_holds_for_every_parameter_inside_of_f(family, fields, monkeypatch):
    """Inside a whole model: the model's f is taken where its container solves."""
    tight = {"solver_tolerance": 1e-13, "solver_max_evaluations": 300}
    model = family.model(**fields, **tight, backward_tolerance=1e-13, backward_max_evaluations=300)
    layer, seen = model.model.layers[0], []
    original = layer.solve
    monkeypatch.setattr(layer, "solve", lambda f, *others: seen.append((f, original(f, *others))) or seen[-1][1])
    model(random_ids(1, 3), use_cache=False)
    f, (solution, _) = seen[0]
    assert solution.value.numel() <= 128
    inputs = [p for p in layer.parameters() if p.requires_grad]
    ours = torch.autograd.grad(weigh(solution.value), inputs, retain_graph=True, materialize_grads=True)
    expected = dense_gradients(f, solution.value, weigh, inputs)
    assert all(grad.norm() > 0 for grad in ours)
    assert_close(ours, expected)


@pytest.mark.parametrize("features", [(6, 6), (6, 4)])
def test_theorem_2_two_stacked_equilibria_are_one(features):
    """z1 = f1(z1, x), z2 = f2(z2, z1) against z = [f1(z1, x) | f2(z2, z1)]: values and gradients alike."""
    wide, narrow = features
    first, second = CausalMap(wide), CausalMap(narrow)
    bridge = torch.randn(wide, narrow, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, wide, dtype=torch.float64, requires_grad=True)
    inputs = (x, bridge, *first.parameters(), *second.parameters())
    start = torch.zeros(2, 5, wide + narrow, dtype=torch.float64)

    z1 = equilibrium(lambda z: first(z, x), start[..., :wide], SOLVER, GRADIENT).value
    z2 = equilibrium(lambda z: second(z, z1 @ bridge), start[..., wide:], SOLVER, GRADIENT).value

    def both(z):
        z1, z2 = z.split(features, -1)
        return torch.cat([first(z1, x), second(z2, z1 @ bridge)], -1)

    single = equilibrium(both, start, SOLVER, GRADIENT).value
    assert_close(single.split(features, -1), (z1, z2))
    for loss in (weigh, lambda z: weigh(z[..., wide:])):  # of the whole state; of the upper equilibrium alone
        ours = torch.autograd.grad(loss(single), inputs, retain_graph=True)
        assert_close(ours, torch.autograd.grad(loss(torch.cat([z1, z2], -1)), inputs, retain_graph=True))


def test_theorem_3_a_stack_of_layers_is_one_weight_tied_layer():
    """L explicit layers as one layer of width L d: block i applies layer i to block i - 1, block 1 sees the input.

    Its weights move every block one place up, so L applications from zero carry the input through all layers; the
    Jacobian is nilpotent, so what they arrive at is the fixed point, from any start.
    """
    depth, width = 5, 4
    weights = [torch.randn(width, width, dtype=torch.float64, requires_grad=True) for _ in range(depth)]
    biases = [torch.randn(width, dtype=torch.float64, requires_grad=True) for _ in range(depth)]
    x = torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True)
    inputs = (x, *weights, *biases)

    explicit = x
    for weight, bias in zip(weights, biases, strict=True):
        explicit = torch.tanh(explicit @ weight + bias)

    tied = torch.zeros(depth, width, depth, width, dtype=torch.float64)
    for block in range(1, depth):
        tied[block - 1, :, block] = weights[block]
    tied = tied.view(depth * width, depth * width)
    injection = torch.cat([x @ weights[0], x.new_zeros(2, 3, (depth - 1) * width)], -1) + torch.cat(biases)

    def f(z):
        return torch.tanh(z @ tied + injection)

    z = torch.zeros_like(injection)
    for _ in range(depth):
        z = f(z)
    assert torch.equal(f(z)[..., -width:], z[..., -width:])
    assert_close([z[..., -width:]], [explicit], 1e-14)

    for start in (torch.zeros_like(injection), torch.randn_like(injection)):
        value = equilibrium(f, start, SOLVER, GRADIENT).value[..., -width:]
        assert_close([value], [explicit])
        ours = torch.autograd.grad(weigh(value), inputs, retain_graph=True)
        assert_close(ours, torch.autograd.grad(weigh(explicit), inputs, retain_graph=True))
