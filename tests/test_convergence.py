"""What the figures measure, and that the script draws them."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from families import TRANSFORMER, TRELLISNET, random_ids
from test_scripts import TINY, script

from hf_deq import ConvergenceWarning, PicardSolver
from hf_deq.convergence import (
    activations_by_depth,
    evaluations_over_training,
    held_out_windows,
    recorded_residuals,
    residual_trajectories,
    saved_activation_bytes,
)
from hf_deq.fixed_point import SOLVERS

FAMILIES = pytest.mark.parametrize("family", [TRANSFORMER, TRELLISNET], ids=["transformer", "trellisnet"])


@FAMILIES
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_a_trajectory_ends_at_the_residual_that_the_solver_reports(family, solver):
    model, ids = family.model(solver=solver), random_ids(3, 6)
    for budget in (1, 2, 5, 8):
        trajectory = residual_trajectories(model, ids, [solver], budget)[solver]
        assert trajectory.shape == (3, budget) and trajectory.dtype == np.float64
        with torch.no_grad():
            solved = model(ids, use_cache=False, solver_tolerance=0.0, solver_max_evaluations=budget)
        at_the_end = (solved.num_evaluations == budget).numpy()  # where no better iterate came before
        reported = solved.residual.numpy()
        np.testing.assert_allclose(trajectory[at_the_end, -1], reported[at_the_end], rtol=1e-9)
        assert at_the_end.any()


@FAMILIES
@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_call_recorded_is_the_state_returned(family, name):
    """Also where that state is not the last iterate and takes one more call."""
    model, ids = family.model(), random_ids(3, 6)
    with torch.no_grad(), recorded_residuals(model, SOLVERS[name](tolerance=1e-6, max_evaluations=100)) as residuals:
        solved = model(ids, use_cache=False)
    torch.testing.assert_close(residuals[-1], solved.residual, rtol=1e-9, atol=0)
    assert len(residuals) == solved.num_evaluations.max()
    assert solved.converged.all() and (residuals[0] == 1).all()  # from the zero state


@FAMILIES
def test_plain_iteration_is_the_unrolled_stack(family):
    """At any damping of the configured solver, and for a model trained by either gradient."""
    ids = random_ids(2, 6)
    plain = residual_trajectories(family.model(solver_damping=0.5), ids, ["picard"], 4)["picard"]
    twin = family.model(gradient="unrolled", use_cache=False)
    np.testing.assert_array_equal(plain, residual_trajectories(twin, ids, ["picard"], 4)["picard"])
    with torch.no_grad():
        np.testing.assert_allclose(plain[:, -1], twin(ids, unroll_steps=4).residual.numpy(), rtol=1e-9)


def test_a_solve_that_ends_at_rounding_stays_there():
    model = TRANSFORMER.model().float()
    trajectory = residual_trajectories(model, random_ids(2, 6), ["anderson"], 200)["anderson"]
    assert trajectory.shape == (2, 200)
    assert (trajectory[:, -1] < 1e-6).all() and (trajectory[:, -1] == trajectory[:, -2]).all()


@FAMILIES
def test_measuring_leaves_no_trace(family):
    model = family.model(**dict.fromkeys(family.dropouts, 0.3), solver_tolerance=1e-3).train()
    ids, layer = random_ids(2, 6), model.model.layers[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes, random_state = dict(vars(layer)), torch.get_rng_state()
    residual_trajectories(model, ids, list(SOLVERS), 3)
    activations_by_depth(model, ids, [1, 2])
    assert vars(layer).keys() == attributes.keys() and model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.warns(ConvergenceWarning):  # the first one of this solver is still to come
        model(ids, use_cache=False, solver_tolerance=0.0, solver_max_evaluations=2)


def test_a_solve_that_fails_leaves_no_trace_either():
    model = TRANSFORMER.model()
    with pytest.raises(ValueError, match="ids"), recorded_residuals(model, PicardSolver()):
        model(torch.full((1, 3), 10**6))
    assert "solve" not in vars(model.model.layers[0])


@FAMILIES
def test_implicit_activations_do_not_grow_and_unrolled_ones_do_by_the_step(family):
    sizes = activations_by_depth(family.model(), random_ids(2, 8), [1, 2, 4, 8, 16])
    assert len(set(sizes["implicit"])) == 1
    # The first step, from a state without gradient, may save less; every other one saves the same.
    one, two, four, eight, sixteen = sizes["unrolled"]
    assert one < two < four
    assert sixteen - eight == 2 * (eight - four) == 4 * (four - two)
    assert one <= sizes["implicit"][0] < two  # one application of f


def test_saved_bytes_are_those_of_distinct_tensors_that_are_no_parameters():
    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(10))

        def forward(self, ids, labels, use_cache):
            x = self.weight * 2.0  # saves nothing: a product with a number
            y = x * self.weight  # saves x, 40 bytes, and the weight
            return x * y[:, None]  # saves x again, and y, 40 bytes

    assert saved_activation_bytes(Model(), torch.zeros(1, 1, dtype=torch.long)) == 80


def test_evaluations_over_training_are_read_from_the_log(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 10, "loss": 5.0, "forward_evaluations": 2.0, "residual": 0.3},
        {"step": 10, "validation_perplexity": 90.0},
        {"step": 20, "loss": 4.0, "forward_evaluations": 6.5, "residual": 0.01, "backward_evaluations": 4.0},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = evaluations_over_training(file)
    assert run["step"].tolist() == [10, 20] and run["forward_evaluations"].tolist() == [2.0, 6.5]
    assert math.isnan(run["backward_evaluations"][0]) and run["backward_evaluations"][1] == 4
    file.write_text(json.dumps(lines[1]))
    with pytest.raises(ValueError, match="no line with forward_evaluations"):
        evaluations_over_training(file)
    with pytest.raises(ValueError, match="there is no metrics file"):
        evaluations_over_training(tmp_path / "other.jsonl")


def test_windows_are_spread_over_the_stream():
    assert held_out_windows(torch.arange(10), 3, 4)[:, 0].tolist() == [0, 3, 6]
    assert held_out_windows(torch.arange(10), 1, 10).tolist() == [list(range(10))]
    with pytest.raises(ValueError, match="lower length"):
        held_out_windows(torch.arange(10), 3, 11)
    with pytest.raises(ValueError, match="at least 1"):
        held_out_windows(torch.arange(10), 0, 4)


def test_unknown_solvers_and_empty_budgets_are_refused():
    model, ids = TRANSFORMER.model(), random_ids(1, 3)
    with pytest.raises(ValueError, match=r"solvers must be among .*\['newton'\]"):
        residual_trajectories(model, ids, ["picard", "newton"], 3)
    with pytest.raises(ValueError, match="max_evaluations must be at least 1"):
        residual_trajectories(model, ids, ["picard"], 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny trained folders: an equilibrium and its unrolled twin."""
    parent = tmp_path_factory.mktemp("runs")
    text = parent / "text.txt"
    text.write_text("\n\n".join(f"sentence number {n} is about the number {n}, nothing else" for n in range(100)))
    flags = ["--corpus", text, *TINY, "--max_steps", 6, "--logging_steps", 2, "--sample_tokens", 0]
    extra = {"deq": ["--shallow_steps", 2], "stack": ["--gradient", "unrolled", "--solver_max_evaluations", 3]}
    for name, more in extra.items():
        finished = script("train.py", *flags, *more, "--output_dir", parent / name)
        assert finished.returncode == 0, finished.stderr[-2000:]
    return parent


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib")
    return lambda *arguments: script("plot_convergence.py", *arguments)


def test_the_script_draws_its_figures_and_writes_their_numbers(runs, plot, tmp_path):
    flags = [
        "--windows",
        3,
        "--evaluations",
        7,
        "--depths",
        1,
        4,
        "--budgets",
        2,
        1,
        "--tolerances",
        1e-2,
        "--length",
        16,
    ]
    metrics = [runs / name / "metrics.jsonl" for name in ("deq", "stack")]
    finished = plot(runs / "deq", "--others", runs / "stack", "--metrics", *metrics, "--output", tmp_path, *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    names = ("training", "residuals", "dial", "memory")
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in finished.stdout
    training, residuals, dial, memory = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    assert training[str(metrics[0])]["backward_evaluations"][0] is None  # shallow pretraining
    assert training[str(metrics[1])]["forward_evaluations"] == [3.0, 3.0, 3.0]
    (curves,) = residuals.values()
    assert np.array(list(curves.values())).shape == (4, 3, 7)
    assert any("stack: plain iteration" in name and "3 unrolled steps" in name for name in curves)
    assert [row["num_evaluations"] for row in dial["by budget"]] == [1, 2] and len(dial["by tolerance"]) == 1
    assert memory["saved bytes"]["unrolled"][1] > memory["saved bytes"]["implicit"][1]


def test_the_script_refuses_in_a_line(runs, plot, tmp_path, monkeypatch):
    for arguments, message in [
        ([tmp_path], "error: "),
        (
            [runs / "deq", "--metrics", "missing.jsonl", "--output", tmp_path, "--length", 16],
            "there is no metrics file",
        ),
        ([runs / "deq", "--length", 10**6], "lower length"),
    ]:
        finished = plot(*arguments)
        assert finished.returncode != 0 and message in finished.stderr and "Traceback" not in finished.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    finished = plot(runs / "deq")
    assert finished.returncode != 0 and 'pip install "hf_deq[plot]"' in finished.stderr
