"""A sweep: every round starts from the best of the rounds before, and what is finished is not run again."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import yaml
from command_line import ROOT, script
from families import TRELLISNET, random_ids

from hf_deq.training import Diverged
from hf_deq.training.log import replace_lines


def load(name):
    """A script as a module. Not through sys.path: there, scripts/evaluate.py would hide the library of this name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plans = load("sweep_plan")
sweeps = load("sweep")

PLAN = {
    "score": "validation_loss",
    "common": {"weight_decay": 0.3},
    "tuning": {"max_steps": 5},
    "final": {"max_steps": 20},
    "seeds": [0, 1],
    "models": {
        "one": {
            "common": {"model_type": "gpt2", "resid_pdrop": 0.1},
            "tuning": {"warmup_steps": 1},
            "final": {"warmup_steps": 2},
            "rounds": [[{"learning_rate": rate} for rate in (1e-3, 3e-3, 9e-3)], [{"resid_pdrop": 0.0}]],
        },
        "two": {"common": {"model_type": "llama"}, "rounds": [[{"learning_rate": 1e-3}]]},
    },
}


def loss(flags: dict) -> float:
    """Best at a rate of 3e-3, and without dropout."""
    return abs(flags["learning_rate"] - 3e-3) + flags.get("resid_pdrop", 0)


class Recorder:
    """Stands in for the worker: knows the loss at once, and remembers what it was asked for."""

    def __init__(self, stop_after: int = 10**9):
        self.asked, self.stop_after = [], stop_after
        self.stopping = self

    def is_set(self) -> bool:
        return len(self.asked) >= self.stop_after

    def stop(self, *signal_and_frame):
        raise AssertionError("nobody sent a signal")

    def run(self, run):
        self.asked.append(run)
        return {"result": {"validation_loss": loss(run.flags), "seconds": 60.0}, "validations": []}


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(PLAN))
    return file


def run(plan, worker, workers: int = 1):
    sweep = plans.Sweep(plan)
    sweeps.run_all(sweep, worker, workers)
    return sweep


@pytest.mark.parametrize("workers", [1, 3])
def test_rounds_build_on_the_best_and_final_runs_have_every_seed(plan, workers):
    worker = Recorder()
    sweep = run(plan, worker, workers)
    assert sweep.ready() == []
    of_one = [asked for asked in worker.asked if asked.model == "one"]
    assert sorted(one.flags["learning_rate"] for one in of_one[:3]) == [1e-3, 3e-3, 9e-3]
    tuned = {"weight_decay": 0.3, "model_type": "gpt2", "learning_rate": 3e-3, "resid_pdrop": 0.0}
    assert of_one[3].flags == tuned | {"max_steps": 5, "warmup_steps": 1}
    finals = [tuned | {"max_steps": 20, "warmup_steps": 2, "seed": seed} for seed in (0, 1)]
    assert [one.flags for one in of_one[4:]] == finals
    rounds = [asked.round for asked in worker.asked]
    if workers == 1:
        assert rounds == [1, 1, 1, 1, 2, "final", "final", "final", "final"]  # all short runs come first


def test_a_setting_that_does_not_help_is_not_kept(plan):
    worse = PLAN["models"]["one"] | {"rounds": [[{"learning_rate": 3e-3}], [{"resid_pdrop": 0.5}]]}
    plan.write_text(yaml.safe_dump(PLAN | {"models": {"one": worse}}))
    worker = Recorder()
    run(plan, worker)
    assert [asked.flags["resid_pdrop"] for asked in worker.asked] == [0.1, 0.5, 0.1, 0.1]


@pytest.mark.parametrize("score", [None, float("nan")])
@pytest.mark.parametrize("rates", [(9e-3, 3e-3), (3e-3, 9e-3)])
def test_a_run_that_diverged_is_never_the_best(plan, rates, score):
    one = PLAN["models"]["one"] | {"rounds": [[{"learning_rate": rate} for rate in rates]]}
    plan.write_text(yaml.safe_dump(PLAN | {"models": {"one": one}}))

    class Diverging(Recorder):
        def run(self, run):
            line = super().run(run)
            line["result"]["validation_loss"] = score if run.flags["learning_rate"] == 9e-3 else 5.0
            return line

    worker = Diverging()
    run(plan, worker)
    assert {asked.flags["learning_rate"] for asked in worker.asked if asked.round == "final"} == {3e-3}


def test_a_model_of_which_every_setting_diverges_has_no_further_runs(plan):
    class Diverging(Recorder):
        def run(self, run):
            line = super().run(run)
            return {"result": {"step": 9, "diverged": True}, "validations": []} if run.model == "one" else line

    worker = Diverging()
    sweep = run(plan, worker)
    assert [asked.round for asked in worker.asked if asked.model == "one"] == [1, 1, 1]
    assert [asked.round for asked in worker.asked if asked.model == "two"] == [1, "final", "final"]
    assert sweep.ready() == [] and sweep.stuck() == ["one"] and list(sweep.finals()) == ["two"]
    assert [row["validation_loss"] for row in sweep.table() if row["model"] == "one"] == [None] * 3
    finished = script("sweep.py", plan, "--show")
    assert "one has no final runs: no setting has a finite score" in finished.stdout, finished.stderr[-2000:]


def test_equal_settings_are_trained_once(plan):
    common = PLAN["models"]["two"]["common"] | {"learning_rate": 1e-3}
    two = {"common": common, "rounds": [[{"learning_rate": 1e-3}, {}]]}
    plan.write_text(yaml.safe_dump(PLAN | {"models": {"two": two}}))
    assert [asked.round for asked in plans.Sweep(plan).ready()] == [1]


def test_a_flag_of_the_machine_without_a_value_is_refused(plan):
    finished = script("sweep.py", plan, "--set", "corpus")
    assert finished.returncode == 1 and "--set takes NAME=VALUE" in finished.stderr


def test_final_runs_of_an_earlier_plan_do_not_count(plan):
    """They stay in the file of results, which forgets nothing."""
    sweeps.run_all(plans.Sweep(plan), Recorder(), 2)
    changed = PLAN | {"models": {"two": PLAN["models"]["two"] | {"final": {"learning_rate": 2e-3}}}}
    plan.write_text(yaml.safe_dump(changed))
    before = len(plans.Sweep(plan).results)
    assert plans.Sweep(plan).finals() == {}
    sweeps.run_all(plans.Sweep(plan), Recorder(), 2)
    sweep = plans.Sweep(plan)
    assert [line["flags"]["learning_rate"] for line in sweep.finals()["two"]] == [2e-3, 2e-3]
    assert len(sweep.results) == before + 2


def test_final_runs_that_were_not_evaluated_are_waiting_for_it(plan):
    run(plan, Recorder())
    plan.write_text(yaml.safe_dump(PLAN | {"evaluate": {"split": "test"}}))
    sweep = plans.Sweep(plan)
    assert [(waiting.model, waiting.round) for waiting in sweep.ready()] == [("one", "final"), ("two", "final")] * 2
    assert sweep.finals() == {}


@pytest.mark.parametrize("stop_after", range(1, 9))
def test_a_sweep_that_was_stopped_goes_on(plan, stop_after):
    first, second, whole = Recorder(stop_after), Recorder(), Recorder()
    run(plan, first)
    run(plan, second)
    (other := plan.with_name("other")).mkdir()
    copy = other / "sweep.yaml"
    copy.write_text(plan.read_text())
    run(copy, whole)
    assert first.asked + second.asked == whole.asked and len(first.asked) == stop_after


def test_tables_and_a_figure_are_made_of_the_results(tmp_path):
    """Two models with two seeds each: one is solved, at two budgets and a tolerance; the other has four layers."""
    models = {"solved": {"num_hidden_layers": 3, "num_prelude_layers": 1}, "explicit": {"n_layer": 4}}
    rates = [{"learning_rate": 1e-3}, {"learning_rate": 3e-3}]
    plan = {name: dict(common=common, rounds=[rates]) for name, common in models.items()}
    whole = PLAN | {"models": plan, "score": "validation_perplexity"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(whole))
    assert "has no evaluate: this report needs a test score" in script("report_sweep.py", tmp_path).stderr
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(whole | {"evaluate": {"split": "test"}}))
    dial = [{"solver_max_evaluations": n, "solver_tolerance": 0.0, "num_evaluations": n} for n in (1, 2)]
    dial += [{"solver_max_evaluations": None, "solver_tolerance": 1e-3, "num_evaluations": 5.5}]
    dial += [{"solver_max_evaluations": None, "solver_tolerance": 1e-1, "num_evaluations": 2.5}]
    sweep = plans.Sweep(tmp_path / "sweep.yaml")
    while ready := sweep.ready():
        is_solved, seed = ready[0].model == "solved", ready[0].flags.get("seed", 0)
        solves = {"validation_num_evaluations": 6.25, "validation_converged": 0.5} if is_solved else {}
        cost = {"seconds": 60.0 * (1 + seed), "num_parameters": 10, "num_tokens": 2_000_000, "step": 20}
        rows = [row | {"perplexity": 90.0 - 10 * i + 2 * seed} for i, row in enumerate(dial if is_solved else [{}])]
        results = {"validation_perplexity": 100.0 + 2 * seed} | cost | solves
        line = {"result": results, "evaluation": {"rows": rows}, "training_loss": math.log(80.0)}
        sweep.add(ready[0], line | {"validations": [{"step": 10, "validation_perplexity": 90.0 + 2 * seed}]})
    (tmp_path / "README.md").write_text("<!-- tuning -->\nold\n<!-- end -->\n\n<!-- final -->\n<!-- end -->\n")
    measured = {name: {"step ms": 9000, "saved MB": 1.5, "token ms": None, "nats over 15": 0.25} for name in models}
    (tmp_path / "measurements.json").write_text(json.dumps({"machine": "*CPU, then.*"} | measured))
    finished = script("report_sweep.py", tmp_path)
    assert finished.returncode == 0 and (tmp_path / "pareto.png").is_file(), finished.stderr[-2000:]
    page = (tmp_path / "README.md").read_text()
    assert "| solved | 1 | learning_rate 0.001 | 100 | 50% |" in page and "old" not in page
    assert [line for line in page.splitlines() if line.startswith("*")] == [
        "*CPU, then.*"
    ]  # what was measured, and when
    scores = "| 10 | 2 | 3 | 2 | 80.0 ± 0.0 | 101.0 ± 1.4 | 91.0 (10) |"
    assert f"| solved {scores} 71.0 ± 1.4 | 6.2 | 9,000 | - | 1.5 | - | 0.25 |" in page
    assert f"| explicit {scores} 91.0 ± 1.4 | - | 9,000 | - | 1.5 | - | 0.25 |" in page
    for line in [*sweep.results.values()]:  # one short run and one final run diverge
        if line["model"] == "solved" and (line["flags"]["learning_rate"] == 3e-3 or line["flags"].get("seed") == 1):
            line["result"] = {"step": 9, "diverged": True}
    replace_lines(sweep.results_file, sweep.results.values())
    finished = script("report_sweep.py", tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| solved | 1 | learning_rate 0.003 | diverged |" in page, finished.stderr[-2000:]
    assert "| 1 of 2 | 80.0 | 100.0 | 90.0 (10) | 70.0 |" in page


@pytest.fixture
def reports(monkeypatch):
    """The module of the report. It finds the modules of its folder as a script does, but no longer than this."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return load("report_sweep")


def test_a_number_that_is_not_finite_is_null_in_the_file_of_a_table(reports, tmp_path):
    reports.report("any", [{"one": math.nan, "two": 2.0}], reports.ReportArguments(str(tmp_path / "rows.json")))
    assert (tmp_path / "rows.json").read_text().split() == ["[", "{", '"one":', "null,", '"two":', "2.0", "}", "]"]


def test_depth_counts_the_layers_that_a_token_passes_through(reports):
    solved = {"flags": {"num_hidden_layers": 3, "num_prelude_layers": 1}, "result": {"validation_num_evaluations": 5}}
    assert [reports.depth(solved, {"num_evaluations": count}) for count in (0.0, 1, 2.5)] == [1, 3, 6]
    assert reports.depth({"flags": {"n_layer": 4}, "result": {}}, {"num_evaluations": 0.0}) == 4


def test_a_learning_curve_has_the_minutes_of_its_steps_or_those_that_a_run_noted(reports):
    """Steps that were measured count. An earlier run noted nothing, and its steps are taken to be of equal length."""
    result = {"step": 20, "seconds": 240.0, "validation_perplexity": 100.0}
    noted, earlier = (
        {"step": 5, "seconds": 180.0, "validation_perplexity": 200.0},
        {"step": 5, "validation_perplexity": 220.0},
    )
    runs = [{"validations": [point], "result": result, "flags": {"shallow_steps": 8}} for point in (noted, earlier)]
    lost = [runs[0], runs[1] | {"validations": [earlier | {"validation_perplexity": None}]}]
    assert reports.learning_curve(lost, {}) == [(4.0, 100.0)]  # a seed without a number leaves no mean
    assert reports.learning_curve(runs[:1], {}) == [(3.0, 200.0), (4.0, 100.0)]
    assert reports.learning_curve(runs[1:], {}) == [(1.0, 220.0), (4.0, 100.0)]
    assert reports.learning_curve(runs, {}) == [(2.0, 210.0), (4.0, 100.0)]
    measured = {"step ms": 30_000, "shallow ms": 12_000}
    assert reports.learning_curve(runs, measured) == [(1.0, 210.0), (8 / 5 + 6, 100.0)]


def test_surprises_are_measured_without_dropout(reports, monkeypatch):
    model, ids = TRELLISNET.model(gradient="unrolled", hidden_dropout=0.5).train(), random_ids(20, 5)
    held_out = SimpleNamespace(windows=lambda count: ids)
    monkeypatch.setattr(reports, "held_out_text", lambda *arguments: held_out)
    monkeypatch.setattr(reports, "SURPRISE", 0.0)
    assert reports.surprises(model, "folder") == pytest.approx(model.eval()(ids, labels=ids).loss.item())
    monkeypatch.setattr(reports, "SURPRISE", 50.0)
    assert reports.surprises(model, "folder") == 0


def test_every_kind_of_step_is_measured(reports, monkeypatch, tmp_path):
    TRELLISNET.model().save_pretrained(tmp_path / "one")
    monkeypatch.setattr(reports, "surprises", lambda model, folder: 0.125)
    flags = dict(batch_size=2, sequence_length=5, train_solver_tolerance=1e-2)
    lines = [{"key": "one", "flags": flags | {"shallow_steps": 3, "shallow_depth": 2}}]
    arguments = reports.ReportSweepArguments(seconds=0.01)
    measured = reports.measure({"shallow": lines, "solved": [{"key": "one", "flags": flags}]}, tmp_path, arguments)
    assert list(measured["shallow"]) == list(reports.MEASURED) and measured["shallow"]["saved MB"] > 0
    assert list(measured["solved"]) == [name for name in reports.MEASURED if name != "shallow ms"]
    assert measured["solved"]["nats over 15"] == 0.12


def test_only_final_runs_that_are_at_hand_are_measured(reports, tmp_path, capsys):
    (tmp_path / "second").mkdir()
    lines = {"kept": [{"key": "first"}, {"key": "second"}], "lost": [{"key": "third"}]}
    assert reports.at_hand(lines, tmp_path) == {"kept": [{"key": "second"}]}
    assert "lost is not in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no final run of this sweep"):
        reports.at_hand({"lost": lines["lost"]}, tmp_path)
    assert reports.at_hand({}, tmp_path) == {}  # no final run has a score yet


def test_measurements_of_an_earlier_version_are_made_again(reports):
    line = {"result": {"step": 9, "seconds": 60.0}, "flags": {"shallow_steps": 3}}
    with pytest.raises(ValueError, match="no shallow ms: measure again with --runs_dir"):
        reports.minutes_until({"step": 9}, line, {"step ms": 5})


def test_state_tracking_is_drawn_by_group_and_model(tmp_path):
    """The table has the largest budget of each run that did not diverge."""
    names = ("s3-deq-trellisnet", "parity-deq-trellisnet", "s3-llama")
    models = {name: dict(common={"word_length": 8}, rounds=[]) for name in names}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(PLAN | {"models": models, "seeds": [0, 1]}))
    sweep = plans.Sweep(tmp_path / "sweep.yaml")
    accuracies = dict(accuracy=1.0, accuracy_2x=0.75, accuracy_4x=0.5, accuracy_8x=0.25)
    dial = [{"solver_max_evaluations": n, "solver_tolerance": 0.0, "num_evaluations": n} for n in (64, 8)]
    loose = {"solver_max_evaluations": None, "solver_tolerance": 0.1, "num_evaluations": 3.0}
    for run in sweep.ready():
        if run.flags["seed"] == 0 and run.model != "s3-deq-trellisnet":
            sweep.add(run, {"result": {"step": 9, "diverged": True}, "validations": []})
            continue
        rows = [accuracies] if run.model == "s3-llama" else [row | accuracies for row in (*dial, loose)]
        result = {"num_parameters": 10, "seconds": 1.0, "validation_loss": 0.1, "guessed_accuracy": 0.5}
        sweep.add(run, {"result": result, "validations": [], "evaluation": {"rows": rows}})
    (page := tmp_path / "page.md").write_text("<!-- state_tracking -->\n<!-- end -->\n")
    finished = script("plot_state_tracking.py", tmp_path, "--figure", tmp_path / "figure.png", "--page", page)
    assert page.read_text().count("| s3 |") == 3 and "CPU" not in page.read_text()  # nothing was measured here
    assert finished.returncode == 0 and (tmp_path / "figure.png").is_file(), finished.stderr[-2000:]
    table = [line.split() for line in finished.stdout.splitlines()]
    assert [row[0] for row in table if row and row[0] in ("parity", "s3")] == ["parity", "s3", "s3", "s3"]
    for seed in "01":
        assert ["s3", "deq-trellisnet", seed, "10", "0", "64", "50%", "100%", "75%", "50%", "25%"] in table
    assert ["s3", "llama", "1", "10", "0", "-", "50%", "100%", "75%", "50%", "25%"] in table


def test_two_sweeps_of_a_folder_do_not_run_side_by_side(plan):
    """Also those of two files: they have one file of results."""
    results = plan.with_name("results.jsonl")
    other = plan.with_name("other.yaml")
    other.write_text(plan.read_text())
    with sweeps.alone_with(results):
        finished = script("sweep.py", other)
        assert finished.returncode == 1 and f"another sweep runs that writes {results}: wait" in finished.stderr
        assert script("sweep.py", other, "--show").returncode == 0


def test_a_sweep_that_is_not_there_makes_no_folder(tmp_path):
    assert script("sweep.py", tmp_path / "typo" / "sweep.yaml").returncode == 1
    assert not (tmp_path / "typo").exists()


def test_a_broken_line_of_results_is_named(plan):
    run(plan, Recorder(stop_after=1))
    with open(plan.with_name("results.jsonl"), "a") as file:
        file.write('{"key": "x", "mod')
    with pytest.raises(ValueError, match="results.jsonl, line 2, is not JSON .*: mend the line, or remove it"):
        plans.Sweep(plan)


def test_a_plan_without_its_names_is_refused(plan):
    plan.write_text(yaml.safe_dump({name: value for name, value in PLAN.items() if name != "seeds"}))
    with pytest.raises(ValueError, match="must have the names .*'seeds'"):
        plans.Sweep(plan)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_runs_are_trained_evaluated_and_written_down(tmp_path, num_processes):
    """The real thing, at its smallest."""
    tiny = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    common = dict(task="copy_memory", copy_delay=1, batch_size=2, warmup_steps=0)
    model = dict(common=dict(model_type="deq_transformer") | tiny, rounds=[[{"learning_rate": 1e-3}]])
    steps = dict(tuning=dict(max_steps=1), final=dict(max_steps=2, eval_steps=1), seeds=[7])
    file = tmp_path / "sweep.yaml"
    evaluate = dict(batch_size=1000, tolerances=0.1, budgets=1)
    file.write_text(yaml.safe_dump(PLAN | steps | dict(common=common, models={"small": model}, evaluate=evaluate)))
    flags = ("--runs_dir", tmp_path / "runs", "--set", "logging_steps=1", "--num_processes", num_processes)
    finished = script("sweep.py", file, *flags)
    assert finished.returncode == 0 and "every run is finished" in finished.stdout, finished.stderr[-2000:]
    short, final = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (short["round"], short["result"]["step"], final["round"], final["result"]["step"]) == (1, 1, "final", 2)
    assert short["result"]["num_processes"] == final["result"]["num_processes"] == num_processes
    assert final["flags"]["seed"] == 7 and "logging_steps" not in final["flags"]
    trained = yaml.safe_load((tmp_path / "runs" / final["key"] / "recipe.yaml").read_text())
    assert trained["shallow_steps"] == 0  # the default recipe has 600: a run has its own flags and no others
    assert [line["step"] for line in final["validations"]] == [1]
    assert len(final["evaluation"]["rows"]) == 2 and final["evaluation"]["rows"][0]["loss"] > 0


def worker_of(folder, calls, status=0):
    """A worker whose scripts do not run: a training leaves a line of metrics, an evaluation its file."""

    class Scripts(sweeps.Worker):
        def call(self, command, folder, num_processes=1):
            calls.append(command[0])
            if command[0] == "evaluate.py":
                return 9 if calls.count("evaluate.py") == 1 else 0
            end = {"validation_loss": 1.0, "num_tokens": 9} if status == 0 else {"diverged": True}
            lines = [{"step": step, "loss": step / 100} for step in range(10, 401, 10)]
            lines += [{"step": 400, "validation_loss": 2.0}, {"step": 400} | end]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return status

    return Scripts(folder, [], {"split": "test"})


def test_a_finished_training_is_not_repeated_for_its_evaluation(tmp_path):
    worker = worker_of(tmp_path, calls := [])
    final = plans.Run("small", "final", {"seed": 1})
    with pytest.raises(OSError, match="an evaluation failed .exit status 9.: read .*evaluate.log"):
        worker.run(final)
    (tmp_path / final.key / "evaluation.json").write_text("{}")
    line = worker.run(final)
    assert calls == ["train.py", "evaluate.py", "evaluate.py"]
    assert line["result"]["validation_loss"] == 1.0 and line["validations"] == [{"step": 400, "validation_loss": 2.0}]
    assert line["training_loss"] == pytest.approx(3.05)  # of steps 210 to 400


def test_a_training_that_leaves_no_report_is_not_taken_for_one_that_diverged(tmp_path):
    worker = worker_of(tmp_path, [])
    call = worker.call
    worker.call = lambda *arguments: call(*arguments) or (folder / "metrics.jsonl").write_text("")
    folder = tmp_path / (short := plans.Run("small", 1, {})).key
    with pytest.raises(OSError, match="did not come to its end .exit status 0.: read .*train.log"):
        worker.run(short)


def test_a_training_that_diverged_is_a_result_and_never_the_best(plan):
    worker = worker_of(plan.parent / "runs", [], status=Diverged.exit_status)
    line = worker.run(plans.Run("small", 1, {"learning_rate": 9.0}))
    assert line["result"] == {"step": 400, "diverged": True} and len(line["validations"]) == 1
    sweep = plans.Sweep(plan)
    first = sweep.ready()[0]
    sweep.add(first, line)
    assert sweep.score(first) == math.inf and sweep.table()[0]["minutes"] is None


@pytest.mark.slow
def test_a_setting_that_diverges_does_not_stop_a_sweep(tmp_path):
    """The real thing: its first steps are not finite, so it logs nothing."""
    tiny = dict(model_type="gpt2", n_embd=8, n_layer=1, n_head=2, n_positions=32)
    common = dict(task="copy_memory", copy_delay=1, batch_size=2, warmup_steps=0)
    model = dict(common=tiny, rounds=[[{"learning_rate": 1e25}, {"learning_rate": 1e-3}]])
    steps = dict(tuning=dict(max_steps=12), final=dict(max_steps=1), seeds=[0])
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(PLAN | steps | dict(common=common, models={"small": model})))
    finished = script("sweep.py", file, "--runs_dir", tmp_path / "runs")
    assert finished.returncode == 0 and "every run is finished" in finished.stdout, finished.stderr[-2000:]
    diverged, good, final = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert diverged["result"]["diverged"] and good["result"]["validation_loss"] > 0
    assert final["flags"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": "validation_los"}, "score: 'validation_los' is not in the results of"),
        (
            {"score": "validation_los", "models": {"two": {"common": {"learning_rate": 1.0}, "rounds": []}}},
            "score: 'validation_los' is not",
        ),
        ({"models": {"two": {"rounds": []}}}, "the model 'two' must have common and rounds"),
        ({"models": {"two": None}}, r"two must be names with values \({} for none\), got None"),
        ({"models": {"two": {"common": {}, "rounds": {}}}}, r"rounds of two must be a list \(\[\] for none\), got {}"),
        ({"models": ["two"]}, "models must be names with values"),
        ({"models": {"two": {"common": {}, "rounds": [{"learning_rate": 1.0}]}}}, "a round of two must be a list"),
        ({"models": {"two": {"common": {}, "rounds": [[]]}}}, "a round of two must have at least one setting"),
        ({"models": {"two": {"common": {}, "rounds": [[1.0]]}}}, "a setting of two must be names with values"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": []}, "seeds must have at least one seed"),
        ({"evaluate": None}, "evaluate must be names with values"),
    ],
)
def test_plans_that_cannot_be_read_are_refused(plan, change, message):
    plan.write_text(yaml.safe_dump(PLAN | change))
    with pytest.raises(ValueError, match=message):
        run(plan, Recorder())


def test_a_run_that_fails_says_where_to_read(tmp_path):
    broken = plans.Run("broken", 1, {"model_type": "gpt3"})
    with pytest.raises(OSError, match="did not come to its end .exit status 1.: read .*train.log"):
        sweeps.Worker(tmp_path, [], None).run(broken)
    log = (tmp_path / broken.key / "train.log").read_text()
    assert "model_type must be one of" in log and "got 'gpt3'" in log
