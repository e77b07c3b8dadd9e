"""The benchmarks at their smallest size: their rows, and what has no noise."""

import json
import subprocess
import sys

import pytest
from command_line import ROOT, TINY, script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, corpus = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("text") / "text.txt"
    corpus.write_text("\n\n".join(f"sentence number {n} is about the number {n}." for n in range(300)))
    finished = script("train.py", "--corpus", corpus, "--output_dir", folder, *TINY)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return folder, finished.stdout


@pytest.mark.slow
def test_the_generation_benchmark_shows_a_constant_cache(tmp_path):
    """In a process of its own, since it starts others."""
    flags = ["--lengths", "10", "40", "--vocab_size", "50", "--output", str(tmp_path / "b.json")]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_generation.py"), *flags]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = json.loads((tmp_path / "b.json").read_text())
    cache = {(row["model"], row["tokens"]): row["cache (KB)"] for row in rows}
    assert cache["deq_trellisnet", 10] == cache["deq_trellisnet", 40]
    assert cache["deq_transformer", 40] == 4 * cache["deq_transformer", 10]


def test_the_generation_benchmark_compares_ways_of_decoding(trained, tmp_path):
    flags = ["--model", trained[0], "--draft_tolerances", 0.2, "--new_tokens", 8, "--turns", 1]
    finished = script("benchmark_generation.py", *flags, "--output", tmp_path / "b.json")
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = {(row["text"], row["way"]): row for row in json.loads((tmp_path / "b.json").read_text())}
    assert len(rows) == 6
    for text in ("greedy", "sampled"):
        plain, drafted = rows[text, "plain"], rows[text, "drafted at 0.2"]
        assert plain["speed"] == 1 and plain["of the draft"] == 0
        assert drafted["of the draft"] > 0 and 0 <= drafted["accepted"] <= 1
        assert drafted["evaluations"] < plain["evaluations"]


def test_the_generation_benchmark_compares_with_gpt2(trained, tmp_path):
    flags = ["--model", trained[0], "--gpt2_layers", 2, "--new_tokens", 4, "--turns", 1]
    finished = script("benchmark_generation.py", *flags, "--output", tmp_path / "b.json")
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = {row["way"]: row["speed"] for row in json.loads((tmp_path / "b.json").read_text())}
    assert list(rows) == ["GPT-2, 2 layers", "tolerance 0.001", "tolerance 0.01"] and rows["GPT-2, 2 layers"] == 1


def test_the_solver_benchmark_counts_what_has_no_noise(trained, tmp_path):
    flags = ["--models", trained[0], "--states", "2x8", "1x1", "--tolerances", 1e-2, "--seconds", 0.01]
    finished = script("benchmark_solvers.py", *flags, "--output", tmp_path / "b.json")
    assert finished.returncode == 0 and "worst residual" in finished.stdout, finished.stderr[-2000:]
    rows = [row for row in json.loads((tmp_path / "b.json").read_text()) if "torchdeq" not in row["solver"]]
    assert [(row["state"], row["solver"]) for row in rows] == [
        (state, solver) for state in ("2x8", "1x1") for solver in ("anderson", "broyden", "picard")
    ]
    assert all(row["worst residual"] <= 1e-2 and row["operations"] <= 90 and row["ratio"] == 1 for row in rows)


def test_tolerances_are_measured_against_the_equilibrium(trained, tmp_path):
    flags = ["--models", trained[0], "--lengths", 8, "--windows", 3, "--tolerances", 0.3, 1e-4]
    finished = script("measure_tolerances.py", *flags, "--output", tmp_path / "t.json")
    assert finished.returncode == 0, finished.stderr[-2000:]
    loose, tight = json.loads((tmp_path / "t.json").read_text())
    assert loose["evaluations"] < tight["evaluations"] and tight["not converged"] == 0
    assert loose["worst"] > loose["mean"] > tight["mean"] and tight["worst, flagged"] == tight["worst"] < 1e-4


@pytest.mark.slow
def test_a_new_and_a_hard_f_are_solved_too(tmp_path):
    flags = ["--models", "fresh", "hard", "--states", "1x64", "--tolerances", 1e-3, "--solvers", "anderson"]
    finished = script("benchmark_solvers.py", *flags, "--seconds", 0.01, "--output", tmp_path / "b.json")
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = [row for row in json.loads((tmp_path / "b.json").read_text()) if row["solver"] == "anderson"]
    fresh, hard = (row["evaluations"] for row in rows)
    assert fresh < 20 < 25 < hard


def test_the_training_benchmark_compares_every_gradient(trained, tmp_path, monkeypatch):
    flags = ["--model", trained[0], "--rows", 2, "--length", 16, "--seconds", 0.01, "--gpt2_layers", 2]
    finished = script("benchmark_training.py", *flags, "--output", tmp_path / "b.json")
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = {row["gradient"]: row for row in json.loads((tmp_path / "b.json").read_text())}
    saved = {name: row["saved MB"] for name, row in rows.items()}
    assert saved["unrolled, 16 steps"] > 1.8 * saved["unrolled, 8 steps"] > 5 * saved["implicit"]
    assert saved["reversible, 4 steps"] == saved["reversible, 8 steps"] < saved["implicit"]
    assert rows["unrolled, 16 steps"]["peak MB"] > rows["implicit"]["peak MB"] > 0
    errors = {name: row["error"] for name, row in rows.items() if row["error"] is not None}
    assert errors["implicit"] < 0.1
    assert errors["Neumann, 4 products"] < errors["Neumann, 2 products"] < errors["Neumann, 1 products"]
    assert rows["GPT-2, 2 layers"]["error"] is None


def test_without_torchdeq_its_rows_are_left_out_with_a_line(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    flags = ["--models", trained[0], "--states", "1x4", "--tolerances", 1e-2, "--solvers", "anderson"]
    finished = script("benchmark_solvers.py", *flags, "--seconds", 0.01, "--output", tmp_path / "b.json")
    assert finished.returncode == 0 and "torchdeq is not installed, its rows are left out" in finished.stdout
    assert [row["solver"] for row in json.loads((tmp_path / "b.json").read_text())] == ["anderson"]


@pytest.mark.slow
def test_the_precision_of_the_reversible_gradient_is_measured(trained, tmp_path):
    flags = ["--model", trained[0], "--rows", 1, "--length", 8, "--precision", True]
    finished = script("benchmark_training.py", *flags, "--output", tmp_path / "b.json")
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = {(row["steps"], row["beta"]): row["error, float32"] for row in json.loads((tmp_path / "b.json").read_text())}
    assert rows[8, 0.5] < 1e-5 and (32, 0.5) in rows
    assert (16, 0.9) not in rows  # more than can be undone


def test_the_serving_benchmark_compares_with_explicit_models(trained, tmp_path):
    flags = ["--models", trained[0], "--contexts", 8, "--batches", 2, "--explicit_layers", 2, "--new_tokens", 2]
    finished = script("benchmark_serving.py", *flags, "--turns", 1, "--output", tmp_path / "b.json")
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = {(row["model"], row["way"]): row for row in json.loads((tmp_path / "b.json").read_text())}
    name = trained[0].name
    assert list(rows) == [
        ("GPT-2, 2 layers", "cached"),
        (name, "cached"),
        ("Llama, 2 layers", "cached"),
        (name, "re-solved"),
    ]
    assert rows["Llama, 2 layers", "cached"]["cache KB"] == 2 * rows[name, "cached"]["cache KB"]  # one layer in f
    assert rows[name, "cached"]["evaluations"] >= 1


def test_growth_is_measured_beside_f_and_goes_into_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- benchmark_growth -->\nold\n<!-- end -->\nafter\n")
    flags = ["--model_types", "deq_transformer", "--lengths", 8, 16, "--widths", 32, 64, "--batches", 1, 2]
    flags += ["--seconds", 0.01, "--figure", tmp_path / "g.png", "--page", page, "--output", tmp_path / "b.json"]
    finished = script("benchmark_growth.py", *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [(row["grows"], row["size"]) for row in rows[:3]] == [
        ("lengths", 8),
        ("lengths", 16),
        ("lengths", "exponent"),
    ]
    memory = {row["grows"]: row["memory"] for row in rows if row["size"] == "exponent"}
    assert all(0.5 < exponent < 1.3 for exponent in memory.values())  # a bounded history: linear in every size
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmark_growth -->\n| model |") and "old" not in text
    assert text.endswith("<!-- end -->\nafter\n") and "exponent" in text and "hf_deq" in text
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("no place")
    finished = script("benchmark_growth.py", *flags)
    assert finished.returncode != 0 and "has no place for this table" in finished.stderr
