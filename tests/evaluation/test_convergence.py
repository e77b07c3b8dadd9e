"""What the figures measure, and that the script draws them."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from command_line import TINY, script
from datasets import Dataset, DatasetDict
from families import TRANSFORMER, TRELLISNET, every_family, random_ids

from hf_deq import AndersonSolver, ConvergenceWarning, PicardSolver, evaluation
from hf_deq.data.words import train_word_tokenizer
from hf_deq.evaluation.activations import activations_by_depth, saved_activation_bytes
from hf_deq.evaluation.convergence import (
    captured_map,
    divergences,
    evaluations_to_tolerance,
    held_out_windows,
    recorded_residuals,
    residual_trajectories,
    spectral_radii,
    token_trajectories,
)
from hf_deq.fixed_point import SOLVERS
from hf_deq.training import evaluations_over_training


@every_family
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


@every_family
@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_call_recorded_is_the_state_returned(family, name):
    """Also where that state is not the last iterate and takes one more call."""
    model, ids = family.model(), random_ids(3, 6)
    with torch.no_grad(), recorded_residuals(model, SOLVERS[name](tolerance=1e-6, max_evaluations=100)) as residuals:
        solved = model(ids, use_cache=False)
    torch.testing.assert_close(residuals[-1].amax(1), solved.residual, rtol=1e-9, atol=0)
    assert len(residuals) == solved.num_evaluations.max()
    assert solved.converged.all() and (residuals[0] == 1).all() == family.starts_at_zero


@every_family
def test_the_captured_map_is_the_models_own(family):
    model, ids = family.model(), random_ids(2, 6)
    f, start = captured_map(model, ids)
    with torch.no_grad():
        solved = AndersonSolver(tolerance=1e-12, max_evaluations=200)(f, start)
        output = model(ids, output_hidden_states=True, use_cache=False)
    assert (start == 0).all() == family.starts_at_zero and solved.converged.all()
    state = solved.image
    if family is TRELLISNET:  # its output is a part of the state
        state = state[..., model.config.intermediate_size :][..., : model.config.hidden_size]
    torch.testing.assert_close(model.model.norm(state), output.hidden_states[-1], rtol=0, atol=1e-8)


@every_family
def test_divergences_are_those_of_the_predictions(family):
    """From the equilibrium, position by position; smaller at a tighter tolerance, and nothing at a tight one."""
    model, ids = family.model().float(), random_ids(3, 8)
    measured = divergences(model, ids, [0.5, 1e-2, 1e-6])
    with torch.no_grad():
        exact = model(ids, use_cache=False, solver_tolerance=1e-6).logits.softmax(-1)
        loose = model(ids, use_cache=False, solver_tolerance=0.5)
    by_hand = (exact * (exact.log() - loose.logits.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(measured[0.5].nats.float(), by_hand, rtol=1e-2, atol=1e-5)
    assert torch.equal(measured[0.5].num_evaluations, loose.num_evaluations) and measured[0.5].converged.all()
    assert measured[0.5].nats.max() > 10 * measured[1e-2].nats.max() and measured[1e-6].nats.max() < 1e-9
    with pytest.raises(ValueError, match=r"equilibrium is not found in rows \[0, 1, 2\]"):
        divergences(family.model(solver="picard", solver_damping=1e-3), ids, [0.5])


@every_family
def test_spectral_radii_are_those_of_the_dense_jacobian(family):
    model, ids = family.model(), random_ids(2, 3)
    states = torch.get_rng_state()
    radii = spectral_radii(model, ids, steps=600)
    assert torch.equal(torch.get_rng_state(), states) and radii.shape == (2,)
    for row, radius in zip(ids, radii, strict=True):
        jacobians = []
        solve = model.model.layers[0].solve

        def dense(f, z0, dial, rows, solve=solve, jacobians=jacobians):
            solution, _ = solve(f, z0, dial, rows)
            jacobians.append(torch.autograd.functional.jacobian(f, solution.value).reshape(2 * (z0.numel(),)))
            return solution, None

        model.model.layers[0].solve = dense
        with torch.no_grad():
            model(row[None], use_cache=False)
        del model.model.layers[0].solve
        assert radius == pytest.approx(torch.linalg.eigvals(jacobians[0]).abs().max().item(), rel=0.02)


@every_family
def test_plain_iteration_is_the_unrolled_stack(family):
    """At any damping of the configured solver, and for a model trained by either gradient."""
    ids = random_ids(2, 6)
    plain = residual_trajectories(family.model(solver_damping=0.5), ids, ["picard"], 4)["picard"]
    twin = family.model(gradient="unrolled", use_cache=False)
    np.testing.assert_array_equal(plain, residual_trajectories(twin, ids, ["picard"], 4)["picard"])
    with torch.no_grad():
        np.testing.assert_allclose(plain[:, -1], twin(ids, unroll_steps=4).residual.numpy(), rtol=1e-9)


@every_family
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_a_tokens_trajectory_is_that_of_its_state_and_of_its_prefix(family, solver):
    """Checked against f itself, by a text of one token, whose residual the solver reports, and by texts cut short."""
    model, ids = family.model(solver=solver), random_ids(1, 7)[0]
    residuals = token_trajectories(model, ids, 6)
    assert (
        residuals.shape == (6, 7)
        and residuals.dtype == np.float64
        and (residuals[0] == 1).all() == family.starts_at_zero
    )
    for length in (1, 4):
        np.testing.assert_allclose(token_trajectories(model, ids[:length], 6), residuals[:, :length], rtol=1e-7)
    rows = residual_trajectories(model, ids[None, :1], [solver], 6)[solver]
    if solver != "picard":  # which is plain there, and here damped as configured
        np.testing.assert_allclose(residuals[:, :1].T, rows, rtol=1e-7)
    (layer,), seen = model.model.layers, []

    def solve(f, z0, dial, rows):
        def spied(z):
            f_z = f(z)
            seen.append((f_z - z).norm(dim=-1)[0] / f_z.norm(dim=-1)[0])
            return f_z

        return type(layer).solve(layer, spied, z0, dial, rows)

    layer.solve = solve
    with torch.no_grad():
        model(ids[None], use_cache=False, solver_tolerance=0.0, solver_max_evaluations=6)
    np.testing.assert_allclose(torch.stack(seen[:6]).numpy(), residuals, rtol=1e-9)


def test_evaluations_to_tolerance_are_those_from_which_on_it_is_kept():
    above, below = 1.0, 0.001
    columns = {
        1: [below, below, below, below],  # at the tolerance counts
        3: [above, above, below, below],
        4: [above, below, above, below],  # rises again
        math.inf: [above, below, below, above],
    }
    trajectories = np.array(list(columns.values())).T
    assert evaluations_to_tolerance(trajectories, 0.001).tolist() == list(columns)
    unsolved = np.array([[above, np.nan], [below, np.nan]])
    assert evaluations_to_tolerance(unsolved, 0.001).tolist() == [2, math.inf]


@every_family
def test_a_solve_at_the_tolerance_takes_about_as_many_as_its_slowest_token(family):
    model, ids = family.model(solver_tolerance=1e-4, solver_max_evaluations=100), random_ids(1, 20)
    slowest = evaluations_to_tolerance(token_trajectories(model, ids[0], 100), 1e-4).max()
    with torch.no_grad():
        taken = int(model(ids, use_cache=False).num_evaluations)
    assert abs(taken - slowest) <= 3


def test_token_trajectories_refuse_what_has_none():
    with pytest.raises(ValueError, match="solves nothing"):
        token_trajectories(TRANSFORMER.model(gradient="unrolled"), random_ids(1, 3)[0], 3)
    with pytest.raises(ValueError, match="no token"):
        token_trajectories(TRANSFORMER.model(), torch.empty(0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="max_evaluations must be a whole number of at least 1"):
        token_trajectories(TRANSFORMER.model(), random_ids(1, 3)[0], 0)


def test_a_solve_that_ends_at_rounding_stays_there():
    model = TRANSFORMER.model().float()
    trajectory = residual_trajectories(model, random_ids(2, 6), ["anderson"], 200)["anderson"]
    assert trajectory.shape == (2, 200)
    assert (trajectory[:, -1] < 1e-6).all() and (trajectory[:, -1] == trajectory[:, -2]).all()


@every_family
def test_measuring_leaves_no_trace(family):
    model = family.model(**dict.fromkeys(family.dropouts, 0.3), solver_tolerance=1e-3).train()
    ids, layer = random_ids(2, 6), model.model.layers[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes, random_state = dict(vars(layer)), torch.get_rng_state()
    residual_trajectories(model, ids, list(SOLVERS), 3)
    token_trajectories(model, ids[0], 3)
    activations_by_depth(model, ids, [1, 2])
    assert vars(layer).keys() == attributes.keys() and model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.warns(ConvergenceWarning):  # the first one of this solver is still to come
        model(ids, use_cache=False, solver_tolerance=1e-9, solver_max_evaluations=2)


def test_a_solve_that_fails_leaves_no_trace_either():
    model = TRANSFORMER.model()
    with pytest.raises(ValueError, match="ids"), recorded_residuals(model, PicardSolver()):
        model(torch.full((1, 3), 10**6))
    assert "solve" not in vars(model.model.layers[0])


@every_family
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
    with pytest.raises(ValueError, match="max_evaluations must be a whole number of at least 1"):
        residual_trajectories(model, ids, ["picard"], 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny trained folders: an equilibrium and its unrolled twin."""
    parent = tmp_path_factory.mktemp("runs")
    text = parent / "text.txt"
    text.write_text("\n\n".join(f"sentence number {n} is about the number {n}, nothing else" for n in range(100)))
    flags = ["--corpus", text, *TINY, "--max_steps", 6, "--logging_steps", 2, "--sample_tokens", 0]
    extra = {
        "deq": ["--shallow_steps", 2],
        "stack": ["--gradient", "unrolled", "--solver_max_evaluations", 3, "--shallow_steps", 0],
    }
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
    namesake = shutil.copytree(runs / "stack", tmp_path / "other" / "deq")
    others = ["--others", runs / "stack", namesake]
    finished = plot(runs / "deq", *others, "--metrics", *metrics, "--output", tmp_path, *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    names = ("training", "residuals", "dial", "memory")
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in finished.stdout
    training, residuals, dial, memory = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    assert training[str(metrics[0])]["backward_evaluations"][0] is None  # shallow pretraining
    assert training[str(metrics[1])]["forward_evaluations"] == [3.0, 3.0, 3.0]
    for figure in (training, residuals, dial, memory):
        assert figure.pop("arguments")["budgets"] == [2, 1]  # what it was drawn by
    (curves,) = residuals.values()
    assert np.array(list(curves.values())).shape == (5, 3, 7)
    assert any("stack: plain iteration" in name and "3 unrolled steps" in name for name in curves)
    assert any(str(namesake) in name for name in curves)
    assert [row["num_evaluations"] for row in dial["by budget"]] == [1, 2] and len(dial["by tolerance"]) == 1
    assert memory["saved bytes"]["unrolled"][1] > memory["saved bytes"]["implicit"][1]


def test_the_script_draws_a_lens_over_a_text(runs, plot, tmp_path):
    text = "sentence number $3$ is about " + 8 * "the number "
    finished = plot(runs / "deq", "--text", text, "--lens", "--evaluations", 6, "--output", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert (tmp_path / "out" / "lens.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "out" / "lens.json").read_text())
    predicted, probability = (np.array(data[f"{name} (evaluations, tokens)"]) for name in ("predicted", "probability"))
    assert predicted.shape == probability.shape == (len(predicted), len(data["tokens"])) and 2 < len(predicted) <= 6
    assert ((probability > 0) & (probability <= 1)).all()
    finished = plot(runs / "deq", "--lens", "--output", tmp_path / "out")
    assert finished.returncode != 0 and "lens draws over a text: give --text" in finished.stderr


def test_the_script_draws_a_text_alone(runs, plot, tmp_path):
    text = "sentence number $3$ is\n\tabout " + 30 * "the number "
    finished = plot(runs / "deq", "--text", text, "--evaluations", 20, "--output", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"text.png", "text.json"}
    assert (tmp_path / "out" / "text.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "out" / "text.json").read_text())
    residuals = np.array(data["residuals (evaluations, tokens)"])
    assert residuals.shape == (20, len(data["tokens"])) and len(data["tokens"]) > 40  # several lines
    spelt = "".join(data["tokens"]).replace("·", " ").replace("↵", "\n").replace("⇥", "\t")
    assert spelt == text
    taken = [math.inf if count is None else count for count in data["evaluations"]]
    assert taken == evaluations_to_tolerance(residuals, data["tolerance"]).tolist() and data["tolerance"] == 1e-3
    finished = plot(runs / "deq", "--text", "too soon", "--evaluations", 1, "--output", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert set(json.loads((tmp_path / "out" / "text.json").read_text())["evaluations"]) == {None}


def test_the_script_draws_a_text_of_words(plot, tmp_path):
    corpus = DatasetDict({"train": Dataset.from_dict({"text": ["the <unk> number is", "a number"]})})
    train_word_tokenizer(corpus).save_pretrained(tmp_path)
    TRELLISNET.model(vocab_size=6).float().save_pretrained(tmp_path)
    finished = plot(tmp_path, "--text", "the <unk> is\na number", "--output", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr[-2000:]
    data = json.loads((tmp_path / "out" / "text.json").read_text())
    assert data["tokens"] == ["the", "<unk>", "is", "<eos>", "a", "number"]
    finished = plot(tmp_path, "--text", "the Number is a gnu", "--output", tmp_path / "other")
    assert "error: the tokenizer does not know 'Number', 'gnu': use other words" in finished.stderr
    assert not (tmp_path / "other").exists()


def test_the_script_refuses_in_a_line(runs, plot, tmp_path, monkeypatch):
    for arguments, message in [
        ([tmp_path], "error: "),
        (
            [runs / "deq", "--metrics", "missing.jsonl", "--output", tmp_path, "--length", 16],
            "there is no metrics file",
        ),
        ([runs / "deq", "--text", " \n"], "error: the text is empty"),
        ([runs / "deq", "--text", "the " * 600], "the model and a figure take 512: shorten it"),
        ([runs / "stack", "--text", "the number"], "solves nothing"),
    ]:
        finished = plot(*arguments)
        assert finished.returncode != 0 and message in finished.stderr and "Traceback" not in finished.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for module in ("hf_deq.evaluation.figures", "hf_deq.commands.plot"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(evaluation, "figures")
    finished = plot(runs / "deq")
    assert finished.returncode != 0 and 'pip install "hf_deq[plot]"' in finished.stderr
