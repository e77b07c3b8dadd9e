"""Gradients of equilibria: against finite differences, against unrolled iterations, against dense linear algebra."""

import gc
import weakref

import pytest
import torch

from hf_deq import (
    AndersonSolver,
    BroydenSolver,
    ImplicitGradient,
    PhantomGradient,
    PicardSolver,
    ReversibleGradient,
    UnrolledGradient,
    equilibrium,
)
from hf_deq.reversible import most_steps

TIGHT = dict(tolerance=1e-13, max_evaluations=300)


def gradients(value, *inputs):
    weight = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weight).sum() + value.square().sum(), inputs)


@pytest.fixture
def x():
    return torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("solver_class", [PicardSolver, AndersonSolver, BroydenSolver])
@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_implicit_gradient_equals_200_unrolled_steps(causal_map, x, solver_class, scope):
    solver = solver_class(**TIGHT, scope=scope)
    inputs = (x, *causal_map.parameters())
    implicit = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), solver, ImplicitGradient(solver))
    unrolled = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=UnrolledGradient(200))
    for ours, exact in zip(gradients(implicit.value, *inputs), gradients(unrolled.value, *inputs), strict=True):
        assert torch.linalg.vector_norm(ours - exact) <= 1e-6 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("solver_class", [PicardSolver, AndersonSolver, BroydenSolver])
@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_a_gradient_depends_on_no_earlier_loss_however_coarse_the_backward_solve(causal_map, x, solver_class):
    """The backward solve looks the other way: the losses at a position and after it decide its gradient."""
    backward, found = ImplicitGradient(solver_class(tolerance=1e-12, max_evaluations=3)), []
    for factor in (1.0, 5.0):
        solution = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), AndersonSolver(**TIGHT), backward)
        weight = torch.tensor([factor, factor, 1, 1, 1], dtype=x.dtype)[:, None]
        found += torch.autograd.grad((solution.value.square() * weight).sum(), x)
    difference = (found[1] - found[0]).abs()
    assert difference[:, 2:].max() <= 1e-14 and difference[:, :2].min() > 0


def test_implicit_gradient_equals_the_dense_theorem(causal_map, x):
    """Theorem 1 of Bai et al. 2019 with the Jacobian written out: w = (I - J')^-1 g, then through f once."""
    solver = AndersonSolver(**TIGHT)
    solution = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), solver, ImplicitGradient(solver))
    z = solution.value.detach()
    g = 3 * z**2  # of the loss below
    jacobian = torch.autograd.functional.jacobian(lambda s: causal_map(s, x.detach()), z).view(z.numel(), z.numel())
    w = torch.linalg.solve(torch.eye(z.numel(), dtype=z.dtype) - jacobian.t(), g.flatten()).view_as(z)
    expected = torch.autograd.grad(causal_map(z, x), (x, *causal_map.parameters()), w)
    ours = torch.autograd.grad(solution.value.pow(3).sum(), (x, *causal_map.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "gradient",
    [
        ImplicitGradient(AndersonSolver(**TIGHT)),
        UnrolledGradient(4),
        UnrolledGradient(4, activation_checkpointing=True),
        ReversibleGradient(4),
    ],
    ids=["implicit", "unrolled", "unrolled-checkpointed", "reversible"],
)
def test_gradcheck(causal_map, gradient):
    x = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)

    def value(x, own, past):
        def f(z):
            return torch.func.functional_call(causal_map, {"own": own, "past": past}, (z, x))

        return equilibrium(f, torch.zeros_like(x), AndersonSolver(**TIGHT), gradient).value

    own, past = (p.detach().clone().requires_grad_() for p in (causal_map.own, causal_map.past))
    assert torch.autograd.gradcheck(value, (x, own, past), fast_mode=True)


def test_phantom_gradient_is_backpropagation_through_damped_steps(causal_map, x):
    solver, gradient = AndersonSolver(**TIGHT), PhantomGradient(steps=3, damping=0.6)
    inputs = (x, *causal_map.parameters())
    phantom = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), solver, gradient)
    z = solver(lambda z: causal_map(z, x), torch.zeros_like(x)).value
    for _ in range(3):
        z = 0.4 * z + 0.6 * causal_map(z, x)
    for ours, expected in zip(gradients(phantom.value, *inputs), gradients(z, *inputs), strict=True):
        torch.testing.assert_close(ours, expected)


def test_one_undamped_phantom_step_is_jacobian_free_backpropagation(causal_map, x):
    solver = AndersonSolver(**TIGHT)
    jfb = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), solver, PhantomGradient(1, 1.0))
    once = causal_map(solver(lambda z: causal_map(z, x), torch.zeros_like(x)).value, x)
    for ours, expected in zip(gradients(jfb.value, x), gradients(once, x), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("products", [1, 2, 5])
def test_a_neumann_sum_is_a_setting_of_the_backward_solver(causal_map, x, products, recwarn):
    """w = g + J'g + ... of so many products, without a warning: nobody asked for convergence."""
    inputs = (x, *causal_map.parameters())
    solver = PicardSolver(tolerance=0, max_evaluations=products)
    solution = equilibrium(
        lambda z: causal_map(z, x), torch.zeros_like(x), AndersonSolver(**TIGHT), ImplicitGradient(solver)
    )
    recwarn.clear()
    ours = torch.autograd.grad(solution.value.square().sum(), inputs)
    z = solution.value.detach().requires_grad_()
    w = term = 2 * z.detach()
    for _ in range(products):
        (term,) = torch.autograd.grad(causal_map(z, x), z, term)
        w = w + term
    for a, b in zip(ours, torch.autograd.grad(causal_map(z, x), inputs, w), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not recwarn.list


@pytest.mark.parametrize("steps, beta", [(1, 0.5), (2, 0.9), (6, 0.3), (12, 0.5), (12, 0.7)])
def test_reversible_gradient_is_backpropagation_through_its_steps(causal_map, x, steps, beta):
    """Also to the start, and to a tensor with a graph of its own that f closes over; and when backward runs twice."""
    start = torch.randn_like(x).requires_grad_()
    inputs, through = (x, start, *causal_map.parameters()), 2 * x
    solution = equilibrium(lambda z: causal_map(z, through), start, AndersonSolver(), ReversibleGradient(steps, beta))
    y = z = start
    for _ in range(steps):
        y = torch.lerp(y, causal_map(z, 2 * x), beta)
        z = torch.lerp(z, causal_map(y, 2 * x), beta)
    torch.testing.assert_close(solution.value, z, rtol=0, atol=1e-14)
    assert solution.num_evaluations.tolist() == [2 * steps] * 2
    exact = gradients(z, *inputs)
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
    loss = (solution.value * weight).sum() + solution.value.square().sum()
    for retain in (True, False):
        for a, b in zip(torch.autograd.grad(loss, inputs, retain_graph=retain), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_reversible_steps_of_an_f_without_activations(x):
    """Backward asks for no activation of this f, and finds the states nevertheless."""
    gradient = ReversibleGradient(3, 0.5)
    solution = equilibrium(lambda z: 0.5 * z + x if z[0, 0, 0] < 9 else z, torch.zeros_like(x), None, gradient)
    y = z = torch.zeros_like(x)
    for _ in range(3):
        y = torch.lerp(y, 0.5 * z + x, 0.5)
        z = torch.lerp(z, 0.5 * y + x, 0.5)
    for ours, exact in zip(gradients(solution.value, x), gradients(z, x), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"beta": 0.0}, r"beta in \(0, 1\), got 0.0"),
        ({"beta": 1.0}, "got 1.0"),
        ({"beta": float("nan")}, "got nan"),
        ({"steps": float("nan")}, "got nan"),
        ({"steps": 18, "beta": 0.8}, "steps <= 17 with beta=0.8 and states of torch.float64, got 18: rounding errors"),
    ],
)
def test_reversible_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        ReversibleGradient(**fields)


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("widest", [torch.float64, torch.float32])
def test_as_many_reversible_steps_as_are_allowed_can_be_undone(causal_map, x, beta, widest, monkeypatch):
    """Also with states in single precision, which is all that MPS has."""
    monkeypatch.setattr("hf_deq.reversible.widest_dtype", lambda device: widest)
    steps, inputs = most_steps(beta, widest), (x, *causal_map.parameters())
    if widest is torch.float32:
        with pytest.raises(ValueError, match=f"steps <= {steps} .*torch.float32, got {steps + 1}: rounding errors"):
            equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=ReversibleGradient(steps + 1, beta))
    gradient = ReversibleGradient(steps, beta)
    solution = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=gradient)
    y = z = torch.zeros_like(x)
    for _ in range(steps):
        y = torch.lerp(y, causal_map(z, x), beta)
        z = torch.lerp(z, causal_map(y, x), beta)
    for ours, exact in zip(gradients(solution.value, *inputs), gradients(z, *inputs), strict=True):
        assert (ours - exact).norm() <= 1e-3 * exact.norm()


GRADIENTS = [
    *(ImplicitGradient(), PhantomGradient(), ReversibleGradient(3)),
    *(UnrolledGradient(3), UnrolledGradient(3, activation_checkpointing=True)),
]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_bad_states_and_maps_are_refused(x, gradient):
    for z0, message in ((x[0], "floating point state"), (x.long(), "floating point state")):
        with pytest.raises(ValueError, match=message):
            equilibrium(lambda z: z + x, z0, gradient=gradient)
    with pytest.raises(ValueError, match="must keep the shape"):
        equilibrium(lambda z: x[:, :1] * z[:, :1], torch.zeros_like(x), gradient=gradient)


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_poisoned_row_changes_no_value_and_no_gradient_of_another(causal_map, x, gradient):
    def first_row(x):
        value = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=gradient).value[0]
        return value, torch.autograd.grad(value.square().sum(), x)[0][0]

    poisoned = x.detach().clone()
    poisoned[1, 2] = float("nan")
    for ours, exact in zip(first_row(poisoned.requires_grad_()), first_row(x), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_longer_phantom_gradients_approach_the_implicit_one(causal_map, x):
    solver = AndersonSolver(**TIGHT)

    def error(gradient):
        value = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), solver, gradient).value
        return torch.linalg.vector_norm(gradients(value, causal_map.own)[0] - exact)

    exact = torch.zeros(())
    exact = gradients(
        equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), solver, ImplicitGradient(solver)).value,
        causal_map.own,
    )[0]
    errors = [error(PhantomGradient(steps, 1.0)) for steps in (1, 4, 16)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize("gradient", [ImplicitGradient(), PhantomGradient(), UnrolledGradient(5)])
def test_value_is_the_same_with_and_without_gradients(causal_map, x, gradient):
    with torch.no_grad():
        without = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=gradient)
    value = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=gradient)
    assert not without.value.requires_grad and value.value.requires_grad
    if not isinstance(gradient, PhantomGradient):  # its path goes a few steps further
        assert torch.equal(without.value, value.value)


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_value_is_the_same_with_and_without_gradients_when_nothing_converges():
    own, x = torch.randn(6, 6, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)

    def f(z):
        return torch.tanh(3 * z @ own + z.cumsum(1)) + x

    solver = AndersonSolver(tolerance=1e-9, max_evaluations=9)
    with torch.no_grad():
        without = equilibrium(f, torch.zeros_like(x), solver)
    value = equilibrium(f, torch.zeros_like(x), solver)
    assert not without.converged.any()
    torch.testing.assert_close(without.value, value.value.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(without.residual, value.residual, rtol=1e-9, atol=0)


def test_an_f_that_ignores_its_state_has_its_own_gradient():
    x = torch.randn(1, 3, 4, requires_grad=True)
    equilibrium(lambda z: 2 * x, torch.zeros(1, 3, 4)).value.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


def test_every_call_of_f_is_counted_and_the_residual_is_measured_at_the_end(causal_map, x):
    calls = []

    def f(z):
        calls.append((z.detach(), causal_map(z, x)))
        return calls[-1][1]

    for gradient in (ImplicitGradient(), PhantomGradient(3), UnrolledGradient(4), ReversibleGradient(4)):
        calls.clear()
        solution = equilibrium(f, torch.zeros_like(x), AndersonSolver(tolerance=1e-5), gradient)
        assert solution.num_evaluations.max() == len(calls)
        assert (solution.residual < 1e-5).all() == solution.converged.all()
        z, f_z = calls[-1]
        worst = ((f_z - z).norm(dim=-1) / f_z.norm(dim=-1)).amax(1).detach()
        torch.testing.assert_close(solution.residual, worst, rtol=1e-3, atol=0, msg=str(gradient))


def test_activations_of_one_application_whatever_the_depth(causal_map, x):
    """Law 4: what autograd keeps for backward does not grow with the evaluations."""

    def saved(gradient, evaluations):
        sizes = []
        solver = PicardSolver(tolerance=0.0, max_evaluations=evaluations)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), solver, gradient(evaluations))
        return sum(sizes)

    assert saved(lambda n: ImplicitGradient(), 3) == saved(lambda n: ImplicitGradient(), 100)
    assert saved(lambda n: ReversibleGradient(n, 0.1), 3) == saved(lambda n: ReversibleGradient(n, 0.1), 100)
    assert saved(UnrolledGradient, 100) > 20 * saved(UnrolledGradient, 3)


def test_reversible_steps_hold_no_state_until_backward(causal_map, x):
    """Counted in live tensors, since hooks see only what autograd saves."""

    def living(steps):
        gc.collect()
        before = sum(isinstance(one, torch.Tensor) and one.shape == x.shape for one in gc.get_objects())
        solution = equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=ReversibleGradient(steps))
        gc.collect()
        after = sum(isinstance(one, torch.Tensor) and one.shape == x.shape for one in gc.get_objects())
        assert solution.value.requires_grad
        return after - before

    assert living(3) == living(30)


@pytest.mark.parametrize("gradient", [ImplicitGradient(), ReversibleGradient()])
def test_graph_is_freed_with_its_solution(causal_map, x, gradient):
    images = []

    def f(z):
        image = causal_map(z, x)
        images.append(weakref.ref(image))
        return image

    solution = equilibrium(f, torch.zeros_like(x), gradient=gradient)
    solution.value.sum().backward()
    del solution
    gc.collect()
    assert len(images) > 3 and all(image() is None for image in images)


def test_backward_reports_and_gradients_accumulate(causal_map, x):
    reports = []
    gradient = ImplicitGradient(AndersonSolver(**TIGHT), on_backward=reports.append)
    for _ in range(2):
        equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=gradient).value.sum().backward()
    once = causal_map.own.grad / 2
    causal_map.zero_grad()
    equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=gradient).value.sum().backward()
    torch.testing.assert_close(causal_map.own.grad, once)
    assert len(reports) == 3 and reports[0].converged.all() and (reports[0].num_evaluations > 3).all()


@pytest.mark.parametrize(
    "gradient", [ImplicitGradient(), PhantomGradient(), UnrolledGradient(3), ReversibleGradient(3)]
)
def test_autocast_does_not_cut_the_parameters_off(gradient):
    """Casts cached in the solve (without gradients) must not serve the graph that is differentiated."""
    linear = torch.nn.Linear(8, 8)
    x = torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        value = equilibrium(
            lambda z: torch.tanh(0.3 * linear(z) + x).float(), torch.zeros_like(x), gradient=gradient
        ).value
    value.sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "gradient", [ImplicitGradient(), PhantomGradient(), UnrolledGradient(3), ReversibleGradient(3)]
)
def test_an_f_in_lower_precision_than_its_state(gradient):
    """What f returns under autocast, where nothing casts it back."""
    linear, x = torch.nn.Linear(8, 8), torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        solution = equilibrium(
            lambda z: torch.tanh(0.3 * linear(z)) + x.bfloat16(), torch.zeros_like(x), gradient=gradient
        )
    solution.value.float().sum().backward()
    assert linear.weight.grad.isfinite().all()


def test_backward_works_when_only_the_input_needs_gradients():
    matrix = 0.1 * torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    solution = equilibrium(
        lambda z: z @ matrix + x,
        torch.zeros_like(x),
        AndersonSolver(**TIGHT),
        ImplicitGradient(AndersonSolver(**TIGHT)),
    )
    (grad,) = torch.autograd.grad(solution.value.sum(), x)
    expected = torch.linalg.solve(
        torch.eye(4, dtype=torch.float64) - matrix, torch.ones(3, 4, dtype=torch.float64).t()
    ).t()
    torch.testing.assert_close(grad[0], expected)


def test_a_second_derivative_is_refused_or_right(causal_map, x):
    """Of the implicit gradient it would be wrong, since the solve for it has no graph; unrolling has it."""
    solver = AndersonSolver(**TIGHT)

    def gradient(estimator, input):
        value = equilibrium(lambda z: causal_map(z, input), torch.zeros_like(x), solver, estimator).value
        return torch.autograd.grad(value.square().sum(), input, create_graph=True)[0]

    first = gradient(ImplicitGradient(solver), x)
    torch.testing.assert_close(first, gradient(UnrolledGradient(200), x), rtol=1e-6, atol=1e-9)
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated again.*UnrolledGradient\(steps\)"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(gradient(ImplicitGradient(solver), x).square().sum(), causal_map.own)
    small = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    for estimator in (UnrolledGradient(5), ReversibleGradient(3)):
        assert torch.autograd.gradgradcheck(
            lambda x, estimator=estimator: (
                equilibrium(lambda z: causal_map(z, x), torch.zeros_like(x), gradient=estimator).value
            ),
            small,
        )


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_residual_that_is_no_number_is_infinite(x, gradient):
    solution = equilibrium(lambda z: z * x * float("nan"), torch.zeros_like(x), gradient=gradient)
    assert (solution.residual == float("inf")).all() and not solution.converged.any()


@pytest.mark.parametrize("make", [lambda: PhantomGradient(0), lambda: UnrolledGradient(0)])
def test_estimators_need_a_step(make):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        make()


def test_phantom_damping_is_checked():
    with pytest.raises(ValueError, match=r"damping must be in \(0, 1\]"):
        PhantomGradient(damping=0)
