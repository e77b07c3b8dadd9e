"""Solvers: they solve, causally, row by row, and they never lose what they had."""

import warnings

import pytest
import torch
from conftest import CausalMap

from hf_deq import AndersonSolver, BroydenSolver, ConvergenceWarning, PicardSolver, fixed_point
from hf_deq.evaluation.operation_counts import CountOperations, LiveBytes
from hf_deq.packed_texts import Texts
from hf_deq.position_algebra import Scopes

SOLVERS = [PicardSolver, AndersonSolver, BroydenSolver]
SCOPES = ["causal", "sequence"]

pytestmark = pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")


def relative_residuals(f, z):
    """Of every position, `(batch, sequence)`."""
    return torch.linalg.vector_norm(f(z) - z, dim=-1) / torch.linalg.vector_norm(f(z), dim=-1)


def relative_residual(f, z):
    """Of every row's worst position, `(batch,)`."""
    return relative_residuals(f, z).amax(1)


def problem(causal_map, batch=3, length=9, scale=1.0):
    x = scale * torch.randn(batch, length, 6, dtype=torch.float64)
    return (lambda z: causal_map(z, x)), x, torch.zeros_like(x)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_solves_to_tolerance_and_reports_the_residual_of_what_it_returns(causal_map, solver_class, scope, damping):
    f, _, z0 = problem(causal_map)
    solver = solver_class(tolerance=1e-11, max_evaluations=150, scope=scope, damping=damping)
    states = []
    solution = solver(lambda z: states.append(z.clone()) or f(z), z0)
    torch.testing.assert_close(states[1], z0 + damping * (f(z0) - z0))
    assert solution.converged.all()
    assert relative_residual(f, solution.value).max() < 1e-11
    torch.testing.assert_close(solution.residual, relative_residual(f, solution.value), rtol=1e-3, atol=1e-15)
    assert not solution.value.requires_grad


@pytest.mark.parametrize("solver_class", [AndersonSolver, BroydenSolver])
@pytest.mark.parametrize("scope", SCOPES)
def test_acceleration_accelerates(solver_class, scope):
    matrix = torch.diag(torch.linspace(-0.95, 0.95, 8, dtype=torch.float64))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    arguments = dict(tolerance=1e-8, max_evaluations=1000, scope=scope)
    plain = PicardSolver(**arguments)(lambda z: z @ matrix + x, torch.zeros_like(x))
    fast = solver_class(**arguments)(lambda z: z @ matrix + x, torch.zeros_like(x))
    exact = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - matrix, x, left=False)
    assert fast.converged.all()
    assert (fast.num_evaluations * 4 < plain.num_evaluations).all()
    torch.testing.assert_close(fast.value, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("budget", [1, 2, 4, 8, 30])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-12])
@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_causal_scope_is_strictly_causal(solver_class, budget, tolerance, strength):
    """Also where residuals rise on the way: then the best iterate is not the last one."""
    causal_map = CausalMap(strength=strength)
    f, x, z0 = problem(causal_map, scale=2.0)
    for position in (1, 4, 8):
        changed = x.clone()
        changed[:, position] += 3 * torch.randn_like(x[:, position])
        solver = solver_class(tolerance=tolerance, max_evaluations=budget)
        before, after = solver(f, z0).value, solver(lambda z, y=changed: causal_map(z, y), z0).value
        assert (before - after)[:, :position].abs().max() <= 1e-12


@pytest.mark.parametrize("solver_class", [AndersonSolver, BroydenSolver])
def test_sequence_scope_leaks_before_convergence(causal_map, solver_class):
    """The reason for the causal scope; if this fails, the test above proves nothing."""
    f, x, z0 = problem(causal_map, scale=2.0)
    changed = x.clone()
    changed[:, 5] += 3
    solver = solver_class(tolerance=1e-12, max_evaluations=5, scope="sequence")
    before, after = solver(f, z0).value, solver(lambda z: causal_map(z, changed), z0).value
    assert (before - after)[:, :5].abs().max() > 1e-5


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_anticausal_scope_mirrors_causal(causal_map, solver_class):
    f, _, z0 = problem(causal_map)
    forward = solver_class(tolerance=1e-9, max_evaluations=7)(f, z0)
    mirrored = solver_class(tolerance=1e-9, max_evaluations=7, scope="anticausal")(lambda z: f(z.flip(1)).flip(1), z0)
    torch.testing.assert_close(mirrored.value.flip(1), forward.value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_rows_are_independent_and_stop_on_their_own(causal_map, solver_class, scope):
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    x[0] = 10  # saturated, hence quickly solved
    solver = solver_class(tolerance=1e-8, max_evaluations=60, scope=scope)
    together = solver(lambda z: causal_map(z, x), torch.zeros_like(x))
    for row in range(3):
        alone = solver(lambda z, y=x[row : row + 1]: causal_map(z, y), torch.zeros_like(x[:1]))
        torch.testing.assert_close(together.value[row : row + 1], alone.value, rtol=0, atol=1e-12)
        assert together.num_evaluations[row] == alone.num_evaluations
    assert together.num_evaluations[0] < together.num_evaluations[1]


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_a_stopped_row_keeps_its_value_whatever_the_budget(causal_map, solver_class, monkeypatch):
    """As on an accelerator, where the solver does not look in every evaluation whether all rows have stopped."""
    monkeypatch.setattr(fixed_point, "_may_look", lambda evaluation, z: False)
    f, _, z0 = problem(causal_map)
    short = solver_class(tolerance=1e-4, max_evaluations=40)(f, z0)
    assert short.converged.all()
    longer = solver_class(tolerance=1e-4, max_evaluations=400)(f, z0)
    assert torch.equal(short.value, longer.value) and torch.equal(short.num_evaluations, longer.num_evaluations)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_best_iterate_is_returned_when_the_iteration_diverges(solver_class, scope):
    def f(z):
        calls.append(z)
        return image(z)

    def image(z):
        return 1 + 3 * torch.sin(7 * z)

    calls = []
    z0 = torch.full((1, 1, 4), 0.3, dtype=torch.float64)
    solution = solver_class(tolerance=1e-9, max_evaluations=6, scope=scope)(f, z0)
    residuals = [((image(z) - z).norm() / image(z).norm()).item() for z in calls[:6]]
    best = residuals.index(min(residuals))
    assert not solution.converged.any()
    assert torch.equal(solution.value, calls[best]) and torch.equal(solution.image, image(calls[best]))
    assert solution.residual.item() == pytest.approx(min(residuals))
    assert solution.num_evaluations.item() == len(calls) == (6 if best == 5 else 7)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", [1, 3, 10, 30])
def test_report_is_true_of_the_returned_state_also_without_convergence(solver_class, scope, budget):
    """Where positions keep different iterates, the mixture is measured, not patched together."""
    own, past = torch.randn(2, 6, 6, dtype=torch.float64)
    x = torch.randn(4, 9, 6, dtype=torch.float64)

    def f(z):
        return torch.tanh(2 * z @ own + 2 * z.cumsum(1) @ past) + x

    solution = solver_class(tolerance=1e-9, max_evaluations=budget, scope=scope)(f, torch.zeros_like(x))
    assert not solution.converged.all()
    torch.testing.assert_close(solution.image, f(solution.value), rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.residual, relative_residual(f, solution.value), rtol=1e-9, atol=0)


def test_a_start_that_f_maps_to_zero_is_no_accident():
    solution = PicardSolver()(lambda z: 0 * z, torch.ones(1, 2, 3))
    assert solution.converged.all() and (solution.value == 0).all() and solution.residual == 0


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("first_bad_call", [1, 3])
def test_a_row_that_turns_non_finite_keeps_its_best_and_leaves_others_alone(
    causal_map, solver_class, scope, poison, first_bad_call
):
    healthy, _, z0 = problem(causal_map)
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        f_z = healthy(z)
        if calls >= first_bad_call:
            f_z[1, 4:] = poison
        return f_z

    solver = solver_class(tolerance=1e-9, max_evaluations=80, scope=scope)
    solution, reference = solver(f, z0), solver(healthy, z0)
    assert solution.converged.tolist() == [True, False, True]
    torch.testing.assert_close(solution.value[::2], reference.value[::2], rtol=0, atol=1e-12)
    assert solution.value.isfinite().all()
    assert solution.num_evaluations[1] == first_bad_call or scope == "causal"
    if scope == "causal":  # positions before the accident go on
        torch.testing.assert_close(solution.value[1, :4], reference.value[1, :4], rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver_class", [AndersonSolver, BroydenSolver])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_state_does_not_matter(causal_map, solver_class, scale):
    """Backward solves have an arbitrary scale; an absolute regularisation would break them."""
    matrix = 0.9 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    solver = solver_class(tolerance=1e-8, max_evaluations=100)
    unit = solver(lambda z: z @ matrix + x, torch.zeros_like(x))
    scaled = solver(lambda z: z @ matrix + scale * x, torch.zeros_like(x))
    assert scaled.converged.all()
    assert (scaled.num_evaluations - unit.num_evaluations).abs().max() <= 2
    torch.testing.assert_close(scaled.value / scale, unit.value, rtol=1e-5, atol=1e-6)


def test_zero_rows_count_as_solved_at_once():
    """Padding: f keeps it at zero."""
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    x[0] = 0
    solution = AndersonSolver()(lambda z: 0.5 * z + x, torch.zeros_like(x))
    assert solution.num_evaluations[0] == 1 and solution.residual[0] == 0 and solution.converged.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tolerance_below_round_off_is_clamped(dtype):
    x = torch.randn(2, 8, 16).to(dtype)
    solver = AndersonSolver(tolerance=0.0, max_evaluations=50)
    solution = solver(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x))
    assert solution.converged.all() and solution.value.dtype == dtype
    clamped = AndersonSolver(tolerance=torch.finfo(dtype).eps, max_evaluations=50)
    expected = clamped(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x)).num_evaluations
    assert torch.equal(solution.num_evaluations, expected)


def test_tolerance_follows_autocast():
    linear, x = torch.nn.Linear(16, 16), torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        solution = AndersonSolver(tolerance=1e-6)(
            lambda z: torch.tanh(0.3 * linear(z) + x).float(), torch.zeros_like(x)
        )
    assert solution.converged.all() and solution.value.dtype == torch.float32


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_image_is_f_of_the_value(causal_map, solver_class):
    f, _, z0 = problem(causal_map)
    once = solver_class(max_evaluations=1)(f, z0)
    assert torch.equal(once.value, z0) and torch.equal(once.image, f(z0))
    solution = solver_class(tolerance=1e-6, max_evaluations=60)(f, z0)
    torch.testing.assert_close(solution.image, f(solution.value), rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_z0_is_left_alone(causal_map, solver_class):
    f, x, _ = problem(causal_map)
    z0 = x.clone()
    solver_class(max_evaluations=5)(f, z0)
    assert torch.equal(z0, x)


@pytest.mark.filterwarnings("default::hf_deq.ConvergenceWarning")
def test_non_convergence_warns_once_and_says_what_to_do():
    z0 = torch.zeros(2, 3, 4)
    with pytest.warns(
        ConvergenceWarning, match=r"2 of 2 sequences.*after 3 evaluations.*tolerance is 1.0e-03.*Raise max_"
    ):
        PicardSolver(max_evaluations=3)(lambda z: z + 1, z0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PicardSolver(max_evaluations=3)(lambda z: z + 1, z0)


def test_evaluations_are_counted_until_the_last_position_of_a_text_stops():
    """Also if that is not the position at the end of the text, which may fail at once."""

    def f(z: torch.Tensor) -> torch.Tensor:
        image = 0.5 * z + 1
        image[:, -1] = float("nan")
        return image

    calls = []
    solution = PicardSolver(tolerance=1e-3)(lambda z: (calls.append(z), f(z))[1], torch.zeros(1, 3, 2))
    assert solution.num_evaluations.tolist() == [len(calls)] and len(calls) > 5


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tolerance": -1e-3}, "tolerance must be zero or positive"),
        ({"tolerance": float("nan")}, "tolerance must be zero or positive"),
        ({"tolerance": float("inf")}, "and finite; got inf"),
        ({"max_evaluations": float("nan")}, "max_evaluations must be a whole number of at least 1"),
        ({"history": float("nan")}, "history must be a whole number of at least 1"),
        ({"max_evaluations": 0}, "max_evaluations must be a whole number of at least 1"),
        ({"damping": 0.0}, r"damping must lie in \(0, 1\]"),
        ({"damping": 1.5}, r"damping must lie in \(0, 1\]"),
        ({"max_evaluations": 2.5}, "max_evaluations must be a whole number of at least 1, got 2.5"),
        ({"history": 0}, "history must be a whole number of at least 1"),
        ({"scope": "prefix"}, "scope must be one of"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AndersonSolver(**fields)


def test_bad_states_are_refused():
    with pytest.raises(ValueError, match=r"\(batch, sequence, features\).*\(2, 3\)"):
        PicardSolver()(lambda z: z, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="floating point"):
        PicardSolver()(lambda z: z, torch.zeros(2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"at least one of each.*\(0, 3, 4\)"):
        AndersonSolver()(lambda z: z, torch.zeros(0, 3, 4))
    with pytest.raises(ValueError, match="must keep the shape"):
        PicardSolver()(lambda z: z[:, :1], torch.zeros(2, 3, 4))


# Converged means converged, at every position.


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", [*SCOPES, "anticausal"])
@pytest.mark.parametrize("tolerance", [3e-1, 1e-2, 1e-5])
def test_converged_means_that_the_worst_position_is_at_the_tolerance(causal_map, solver_class, scope, tolerance):
    """Also where later positions carry far smaller states, and far larger ones, than their prefix."""
    x = torch.randn(3, 40, 6, dtype=torch.float64) * torch.logspace(-4, 4, 40, dtype=torch.float64)[:, None]
    solution = solver_class(tolerance=tolerance, max_evaluations=300, scope=scope)(
        lambda z: causal_map(z, 0) + x, torch.zeros_like(x)
    )
    residual = torch.linalg.vector_norm(solution.image - solution.value, dim=-1)
    own = residual / torch.linalg.vector_norm(solution.image, dim=-1)
    assert solution.converged.all() and own.max() <= tolerance
    torch.testing.assert_close(solution.residual, own.amax(1), rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_never_flagged_converged_above_its_tolerance(solver_class, dtype):
    own = torch.randn(16, 16) / 6
    for scale in (1.0, 30.0, 1e4):
        x = (scale * torch.randn(64, 12, 16)).to(dtype)
        solver = solver_class(tolerance=1e-3, max_evaluations=20)
        solution = solver(lambda z, x=x: (z.float() @ own).to(dtype) + x, torch.zeros_like(x))
        reached = solution.residual <= solver.attainable_tolerance(x)
        assert torch.equal(solution.converged, reached)
        residual = (solution.image.double() - solution.value.double()).norm(dim=-1) / solution.image.double().norm(
            dim=-1
        )
        assert (residual.amax(1)[reached] <= 1.01 * solver.attainable_tolerance(x)).all()


def test_what_float16_cannot_hold_is_flagged():
    x = torch.full((2, 3, 4), 1e4, dtype=torch.float16)
    x[1] = 1.0
    for solver_class in SOLVERS:
        solution = solver_class(tolerance=1e-2, max_evaluations=60)(lambda z: 0.9 * z + x, torch.zeros_like(x))
        assert solution.converged.tolist() == [False, True], solver_class  # the first row's fixed point is 1e5
        assert solution.value.isfinite().all()


# Packed rows: several texts in one.


def packed(lengths, features=6, batch=2):
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(batch, -1)
    return Texts(numbers), torch.randn(batch, sum(lengths), features, dtype=torch.float64)


def apart(tensor, lengths):
    """The texts of `(batch, sequence, ...)`, row after row."""
    return [piece[None] for row in tensor for piece in row.split(lengths)]


def map_of_texts(causal_map, x, lengths):
    """f of packed rows whose texts know nothing of each other."""
    return lambda z: torch.cat(
        [causal_map(part, of) for part, of in zip(z.split(lengths, 1), x.split(lengths, 1), strict=True)], 1
    )


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", [*SCOPES, "anticausal"])
@pytest.mark.parametrize("budget", [1, 2, 5, 80])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-9])
def test_each_packed_text_is_solved_as_if_alone(causal_map, solver_class, scope, budget, tolerance):
    lengths = [3, 1, 9, 4]
    texts, x = packed(lengths)
    x[:, 4:13] *= 10  # saturated, hence quickly solved
    solver = solver_class(tolerance=tolerance, max_evaluations=budget, scope=scope)
    together = solver(map_of_texts(causal_map, x, lengths), torch.zeros_like(x), texts)
    alone = [solver(lambda z, y=y: causal_map(z, y), torch.zeros_like(y)) for y in apart(x, lengths)]
    for ours, theirs in zip(apart(together.value, lengths), alone, strict=True):
        torch.testing.assert_close(ours, theirs.value, rtol=0, atol=1e-10)
    for ours, theirs in zip(apart(together.image, lengths), alone, strict=True):
        torch.testing.assert_close(ours, theirs.image, rtol=0, atol=1e-10)
    assert together.num_evaluations.tolist() == [one.num_evaluations.item() for one in alone]
    assert together.converged.tolist() == [one.converged.item() for one in alone]
    residuals = torch.cat([one.residual for one in alone])
    torch.testing.assert_close(together.residual, residuals, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", [*SCOPES, "anticausal"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300])
def test_no_packed_text_is_touched_by_another(causal_map, solver_class, scope, poison):
    lengths = [5, 4, 6]
    texts, x = packed(lengths)
    changed = x.clone()
    changed[:, 5:9] = poison
    solver = solver_class(tolerance=1e-3, max_evaluations=6, scope=scope)
    before = solver(map_of_texts(causal_map, x, lengths), torch.zeros_like(x), texts)
    after = solver(lambda z: map_of_texts(causal_map, x, lengths)(z) + (changed - x), torch.zeros_like(x), texts)
    for first, second in ((before.value, after.value), (before.image, after.image)):
        for text in (slice(0, 5), slice(9, 15)):
            assert (first - second)[:, text].abs().max() <= 1e-12
    assert not after.converged[[1, 4]].any()


def test_texts_of_one_position_each_are_so_many_rows(causal_map):
    x = torch.randn(7, 1, 6, dtype=torch.float64)
    rows = AndersonSolver(1e-9)(lambda z: causal_map(z, x), torch.zeros_like(x))
    f = map_of_texts(causal_map, x.view(1, 7, 6), [1] * 7)
    row = AndersonSolver(1e-9)(f, torch.zeros(1, 7, 6, dtype=torch.float64), Texts(torch.arange(7)[None]))
    torch.testing.assert_close(row.value[0], rows.value[:, 0], rtol=0, atol=1e-10)
    assert torch.equal(row.num_evaluations, rows.num_evaluations)


def test_a_number_that_comes_back_is_that_of_another_text():
    texts = Texts(torch.tensor([[0, 0, 0, 1, 0, 0, 0]]))
    ones = torch.ones(1, 7, 1, dtype=torch.float64)
    assert Scopes(7, "causal", texts).total(ones)[0, :, 0].tolist() == [1, 2, 3, 1, 1, 2, 3]
    assert Scopes(7, "anticausal", texts).total(ones)[0, :, 0].tolist() == [3, 2, 1, 1, 3, 2, 1]
    assert Scopes(7, "sequence", texts).total(ones)[0, :, 0].tolist() == [3, 3, 3, 1, 3, 3, 3]


@pytest.mark.parametrize("solver_class", SOLVERS)
def test_an_image_may_have_any_strides(causal_map, solver_class):
    """As convolutions over the sequence leave them."""
    f, _, z0 = problem(causal_map)
    solver = solver_class(tolerance=1e-8, max_evaluations=60)
    strided = solver(lambda z: f(z).mT.contiguous().mT, z0)
    torch.testing.assert_close(strided.value, solver(f, z0).value, rtol=0, atol=1e-12)


# What a solve costs, counted: without noise.

# Operations outside of f per evaluation, views counted: at one position, and at several.
OPERATIONS = {AndersonSolver: (60, 75), BroydenSolver: (75, 90), PicardSolver: (25, 25)}


@pytest.mark.parametrize("solver_class", SOLVERS)
@pytest.mark.parametrize("scope", ["causal", "anticausal"])
@pytest.mark.parametrize("length", [1, 16])
def test_few_operations(solver_class, scope, length):
    own, x = torch.randn(64, 64) / 13, torch.randn(1, length, 64)
    with CountOperations() as count:
        solution = solver_class(tolerance=1e-4, scope=scope)(
            count.uncounted(lambda z: torch.tanh(z @ own + x)), torch.zeros_like(x)
        )
    evaluations = solution.num_evaluations.item()
    assert 6 <= evaluations <= 20 and solution.converged.all()
    assert count.total / evaluations <= OPERATIONS[solver_class][length > 1]


@pytest.mark.parametrize("solver_class, states", [(PicardSolver, 5), (AndersonSolver, 12), (BroydenSolver, 16)])
@pytest.mark.parametrize("budget", [12, 40])
def test_memory_of_a_solve_is_bounded(solver_class, states, budget):
    """In states, at a history of 5, beside what f takes; what is kept of each position is less than one more."""
    own, x = torch.randn(256, 256) / 18, torch.randn(4, 16, 256)
    z0, tolerance = torch.zeros_like(x), 1e-4 if budget == 40 else 2e-2
    with LiveBytes() as live:
        f = live.uncounted(lambda z: torch.tanh(z @ own + x))
        solution = solver_class(tolerance=tolerance, max_evaluations=budget)(f, z0)
    assert solution.converged.all()
    assert live.most <= (states + 1) * x.nbytes
