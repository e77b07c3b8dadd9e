"""What a card says of a model and its run, and the script that puts a model on the Hub."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import ROOT, TINY, script
from families import ATTRACTOR, TRANSFORMER, TRELLISNET
from huggingface_hub import ModelCard
from PIL import Image
from transformers import GPT2Config

from hf_deq import hub
from hf_deq.commands import push
from hf_deq.hub import RunRecord, make_card, read_record


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained and evaluated model, of a corpus in a local file, and a figure of it."""
    folder = tmp_path_factory.mktemp("run")
    corpus = folder / "numbers.txt"
    corpus.write_text("\n\n".join(f"sentence number {n} is about the number {n}" for n in range(200)))
    model = folder / "deq-model"
    flags = ["--tolerances", 1e-2, 1e-3, "--budgets", 1, 2, "--output", model / "results.json"]
    for name, arguments in (
        ("train.py", ["--corpus", corpus, "--output_dir", model, *TINY, "--max_steps", 6, "--shallow_steps", 1]),
        ("evaluate.py", [model, *flags]),
    ):
        finished = script(name, *arguments)
        assert finished.returncode == 0, finished.stderr[-2000:]
    for name in ("dial", "memory"):
        Image.new("L", (1, 1)).save(model / f"{name}.png")
    (model / "dial.json").write_text(json.dumps({"arguments": {"stride": 16, "others": [str(folder / "other")]}}))
    return model


@pytest.fixture
def copied(trained, tmp_path):
    """The same, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "deq-model"))


@pytest.fixture(scope="module")
def dry(trained, tmp_path_factory):
    """What a dry run leaves, and what it prints."""
    output = tmp_path_factory.mktemp("dry") / "hub"
    finished = script("push_to_hub.py", trained, "--repo-id", "user/numbers", "--dry-run", "--output", output)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return output, finished.stdout


def test_a_dry_run_leaves_the_folder_and_lists_it(trained, dry):
    output, printed = dry
    for file in output.iterdir():
        assert re.search(rf"{file.stat().st_size:,}  {file.name}\n", printed)
    names = {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "recipe.yaml",
        "results.json",
        "dial.png",
    }
    assert names <= {file.name for file in output.iterdir()} and "nothing was uploaded" in printed
    for file in output.iterdir():
        if file.suffix not in (".safetensors", ".png"):
            assert str(trained.parent) not in file.read_text()  # no places of this machine


def test_the_metadata_is_what_was_measured(trained, dry):
    data = ModelCard.load(dry[0] / "README.md").data  # parses the model-index with EvalResult
    rows = json.loads((trained / "results.json").read_text())["rows"]
    (row,) = [row for row in rows if row["solver_tolerance"] == 1e-3]
    results = {result.metric_type: result for result in data.eval_results}
    assert results.keys() == {"perplexity", "word_perplexity", "bits_per_byte"}
    for metric, result in results.items():
        assert result.metric_value == pytest.approx(row[metric], rel=1e-6)
        assert (result.dataset_name, result.dataset_split) == ("numbers.txt", "validation")
        assert result.metric_args == {"solver_tolerance": 1e-3}
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.model_name == "numbers" and {"deep-equilibrium-model", "deq_transformer"} <= set(data.tags)
    assert data.language is None and data.datasets is None  # a local file says neither


def test_the_command_of_the_card_gives_its_numbers(trained, dry, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)  # the corpus goes by its name
    command = re.search(r"python scripts/(evaluate.py) numbers (.*)", (dry[0] / "README.md").read_text())
    again = script(command[1], dry[0], *command[2].split(), "--output", tmp_path / "again.json")
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((trained / "results.json").read_text())


def test_the_card_tells_the_run(trained, dry):
    text = (dry[0] / "README.md").read_text()
    cost = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    radius = json.loads((trained / "results.json").read_text())["spectral_radius"]
    for expected in (
        f"Jacobian of f has a spectral radius of {radius:.2f}",
        "![Quality against tolerance and budget](dial.png)\n\n"
        "`python scripts/plot_convergence.py numbers --stride 16 --others other`\n",
        'AutoModelForCausalLM.from_pretrained("user/numbers", trust_remote_code=True)',
        "hf download user/numbers --local-dir numbers\n"
        "python scripts/evaluate.py numbers --tolerances 0.01 0.001 --budgets 1 2",
        "In full: the validation split: ",
        "(`numbers.txt` must be in the working folder.)\n",
        "windows of 16, stride 8; solver anderson, ",
        "| 2 evaluations |",
        "| tolerance 0.001 |",
        "| optimizer steps | 6 |",
        f"| tokens trained on | {cost['num_tokens']:,} |",
        "Convergence at the end of training",
        "max_steps: 6",
        "bai2019deep",
        "| hidden_size | 32 |",
    ):
        assert expected in text
    assert f"{cost['num_parameters']:,} parameters" in text and "output_dir" not in text
    assert "memory.png" not in text  # nobody knows how it was drawn


def test_the_card_asks_for_what_the_package_asks_for():
    needed = re.findall(r'"((?:torch|transformers)>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    template = (ROOT / "hf_deq" / "hub" / "template.md").read_text()
    assert len(needed) == 2 and all(f'"{requirement}"' in template for requirement in needed)


def test_what_is_not_known_is_left_out():
    text = make_card(TRELLISNET.model(), "model").content
    for heading in (
        "## Evaluation",
        "## Training",
        "## Figures",
        "model-index",
        "hf download",
        "None",
        "tokenizer",
        "model_name",
    ):
        assert heading not in text
    assert "## Architecture" in text and "kernel_size" in text and "Solved by default" in text
    unrolled = make_card(TRELLISNET.model(gradient="unrolled"), "model").text
    assert "has no equilibrium to solve for" in unrolled and "Solved by default" not in unrolled


def test_the_row_of_an_unrolled_model_is_that_of_its_own_depth():
    model = TRELLISNET.model(gradient="unrolled", solver_max_evaluations=6)
    rows = [{"solver_max_evaluations": n, "solver_tolerance": 0.0, "perplexity": 10.0 + n} for n in (1, 8, 6)]
    (result,) = make_card(model, "user/model", RunRecord(results=rows)).data.eval_results
    assert result.metric_value == 16.0 and result.metric_args == {"solver_max_evaluations": 6}


@pytest.mark.parametrize(
    "recipe, datasets, language",
    [
        ({"corpus": "Salesforce/wikitext", "corpus_config": "wikitext-103-v1"}, ["Salesforce/wikitext"], "en"),
        ({"corpus": "cpython_docs"}, None, "en"),
        ({"corpus": "ptb", "word_level": True}, None, "en"),
        ({"corpus": "someone/poems"}, ["someone/poems"], None),
    ],
)
def test_corpora_in_the_metadata(recipe, datasets, language):
    data = make_card(TRANSFORMER.model(), "user/model", RunRecord(recipe=recipe)).data
    assert (data.datasets, data.language) == (datasets, language)


def test_results_of_other_tasks_and_without_a_solver():
    model = TRANSFORMER.model()
    row = {"loss": 1e-3, "recalled": 0.5, "num_evaluations": 3.0, "residual": 1e-3, "converged": 1.0}
    dial = {"solver_tolerance": 0.0, "solver_max_evaluations": 3}
    recipe = {"task": "copy_memory", "copy_delay": 9}
    record = RunRecord(
        recipe=recipe, results=[dial | row], evaluation={"budgets": [3]}, dataset="copy_memory", split="test"
    )
    card = make_card(model, "user/model", record)
    assert {result.metric_type for result in card.data.eval_results} == {"loss", "recalled"}
    assert "test split of `copy_memory`" in card.text and "--budgets 3" in card.text and "--tolerances" not in card.text
    evaluation = {"corpus": "a/b", "split": "test", "drop_remainder": True}
    rows = [{"perplexity": 9.0, "num_tokens": 5}]
    record = RunRecord(results=rows, evaluation=evaluation, dataset="a/b", split="test", measured="five tokens")
    card = make_card(model, "user/model", record)
    assert "scripts/evaluate.py model --corpus a/b --split test --drop_remainder true\n" in card.text
    assert "| no solver |" in card.text and "In full: five tokens.\n" in card.text
    assert (card.data.eval_results[0].dataset_type, card.data.eval_results[0].dataset_split) == ("a/b", "test")


def test_a_row_without_a_number_takes_no_column_away():
    """Files of results have null in place of what is not finite, such as the residual of a state that is not solved."""
    usual = {"loss": 1.0, "num_evaluations": 1.0, "residual": 1e-3, "converged": 1.0}
    rows = [
        {"solver_tolerance": 0.0, "solver_max_evaluations": budget} | usual | residual
        for budget, residual in ((0, {"residual": None}), (2, {}))
    ]
    card = make_card(TRANSFORMER.model(), "user/model", RunRecord(recipe={"task": "copy_memory"}, results=rows))
    assert "| residual |" in card.text and "| 1 | - | 1 |" in card.text and "| 1 | 0.001 | 1 |" in card.text


def test_a_result_that_is_not_finite_is_not_in_the_metadata():
    model, setting = TRANSFORMER.model(solver_tolerance=1e-2), {"solver_max_evaluations": None}
    rows = [{"solver_tolerance": 1e-2, "perplexity": None}, {"solver_tolerance": 1e-1, "perplexity": 9.0}]
    card = make_card(model, "user/model", RunRecord(results=[setting | row for row in rows]))
    assert not card.data.eval_results and "| tolerance 0.01 | - |\n| tolerance 0.1 | 9 |" in card.text
    assert "\n\nThe metadata above has no result: none is finite at the setting of the model. This is" in card.text
    model.config.solver_tolerance = 1e-1
    card = make_card(model, "user/model", RunRecord(results=[setting | row for row in rows]))
    assert "\n\nThe metadata above has the row of tolerance 0.1. This is the quality at more" in card.text


def test_the_card_says_which_layers_are_the_head():
    text = make_card(ATTRACTOR.model(), "user/model").text
    for name in ("num_hidden_layers", "num_prelude_layers", "num_key_value_heads", "head_dim"):
        assert f"| {name} | {getattr(ATTRACTOR.model().config, name)} |" in text


@pytest.mark.parametrize("corpus", [["one.txt", "other.txt"], 3, None])
def test_a_recipe_with_several_corpora_is_refused(corpus, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"corpus": corpus}))
    with pytest.raises(ValueError, match="recipe.yaml: corpus must be one name, got "):
        read_record(tmp_path, TRANSFORMER.model().config)


def test_results_that_are_not_of_this_run_are_refused(copied):
    file, config = copied / "results.json", hub.read_config(copied)
    results = json.loads(file.read_text())
    rows = [row | {"perplexity": 2 * row["perplexity"]} for row in results["rows"]]
    file.write_text(json.dumps(results | {"rows": rows}))
    with pytest.raises(ValueError, match="results.json has perplexity .* another model or text .* Write it again"):
        read_record(copied, config)
    results["rows"] = [row | {"num_tokens": 3} for row in results["rows"]]
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="results.json has num_tokens 3, .* another model or text .* Write it again"):
        read_record(copied, config)
    results["arguments"]["split"] = "test"
    file.write_text(json.dumps(results))
    assert read_record(copied, config).results[0]["num_tokens"] == 3
    for content, message in [
        ("{", "cannot be read: Expecting"),
        (json.dumps(results["rows"]), "it has rows but not the arguments that gave them"),  # as it once was
        ("{}", "it was not written by hf-deq evaluate --output"),
        (json.dumps(results | {"rows": [{"tokens": 3}]}), "it was not written by hf-deq evaluate --output"),
        (json.dumps(results | {"rows": [{"perplexity": None, "solver_tolerance": 1e-3}]}), "it was not written by"),
        (json.dumps({name: results[name] for name in results if name != "split"}), "it was not written by"),
    ]:
        file.write_text(content)
        refused = script("push_to_hub.py", copied, "--repo-id", "user/name").stderr
        assert f"error: {file} cannot be read" in refused and message in refused


@pytest.mark.slow
def test_the_card_says_with_which_arguments_it_was_evaluated(copied, tmp_path):
    """Also those that name a place on this machine, of which the name is left, and the command gives the same."""
    corpus = tmp_path / "my other numbers.txt"
    corpus.write_text("\n\n".join(f"sentence number {n} is about something else" for n in range(50)))
    flags = ["--corpus", corpus, "--split", "train", "--length", 8, "--carry_memory", "false", "--batch_size", 4]
    flags += ["--tolerances", 1e-3, "--budgets", 1, "--output", copied / "results.json", "--device", "cpu"]
    finished = script("evaluate.py", copied, *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    given = {"corpus": str(corpus), "split": "train", "length": 8, "batch_size": 4, "carry_memory": False}
    results = json.loads((copied / "results.json").read_text())
    assert results["arguments"] == given | {"budgets": [1], "tolerances": [1e-3]}
    card = make_card(TRANSFORMER.model(), "user/numbers", read_record(copied, hub.read_config(copied))).text
    assert "train split of `my other numbers.txt`" in card and str(tmp_path) not in card
    command = re.search(r"python (scripts/evaluate.py numbers .*)", card)[1]
    words = [str(copied) if word == "numbers" else word for word in shlex.split(command)[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    again = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *words, "--output", "again.json"]
    finished = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == results["rows"]


class FakeApi:
    """What would go over the network."""

    calls: list
    validated: list
    fails = False

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, folder_path, **options):
        if self.fails:
            raise RuntimeError("403 Forbidden")
        self.calls.append(("upload_folder", {file.name for file in Path(folder_path).iterdir()}, options))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", [], raising=False)
    monkeypatch.setattr(FakeApi, "validated", [], raising=False)
    monkeypatch.setattr(push, "HfApi", FakeApi)
    monkeypatch.setattr(push, "get_token", lambda: "a token")
    monkeypatch.setattr(ModelCard, "validate", lambda card: FakeApi.validated.append(card.data.model_name))
    return FakeApi


def test_push_creates_the_repository_and_uploads_the_folder(trained, dry, api):
    finished = script("push_to_hub.py", trained, "--repo-id", "user/numbers", "--private")
    assert finished.returncode == 0, finished.stderr[-2000:]
    (created, repo_id, options), (uploaded, files, upload) = api.calls
    assert (created, repo_id, options) == ("create_repo", "user/numbers", {"private": True, "exist_ok": True})
    assert uploaded == "upload_folder" and upload["repo_id"] == "user/numbers"
    assert files == {file.name for file in dry[0].iterdir()}
    assert api.validated == ["numbers"]
    assert upload["delete_patterns"] == ["*.safetensors*"]
    assert "uploaded to https://huggingface.co/user/numbers" in finished.stdout


def test_a_failed_upload_says_so_in_a_line(trained, api, monkeypatch):
    monkeypatch.setattr(api, "fails", True)
    finished = script("push_to_hub.py", trained, "--repo-id", "user/numbers")
    assert finished.returncode == 1 and "user/numbers was not uploaded: 403 Forbidden" in finished.stderr


def test_bad_input_is_refused_before_any_work(copied, dry, api, monkeypatch, tmp_path):
    def refused(*arguments):
        finished = script("push_to_hub.py", *arguments)
        assert finished.returncode == 1 and finished.stderr.startswith("error: "), finished.stderr
        return finished.stderr

    monkeypatch.setattr(push, "load_model", None)  # nothing is loaded
    assert "Repo id must" in refused(copied, "--repo-id", "a/b/c")
    assert "repo_id must be user/name" in refused(copied, "--repo-id", "name")
    assert "is not a model folder" in refused(tmp_path, "--repo-id", "user/name")
    full = refused(copied, "--repo-id", "user/name", "--dry-run", "--output", dry[0])
    assert "is not empty" in full
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert "hf auth login" in refused(copied, "--repo-id", "user/name")
    (copied / "results.json").unlink()
    assert f"hf-deq evaluate {copied} --output {copied}/results.json" in refused(copied, "--repo-id", "user/name")
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(copied)
    assert "holds a gpt2, a model of Transformers that needs no code of this package" in refused(
        copied, "--repo-id", "user/name"
    )
    assert api.calls == []


def test_a_dry_run_without_metrics_warns(copied, tmp_path):
    (copied / "results.json").unlink()
    for name in ("recipe.yaml", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    output = tmp_path / "hub"
    finished = script("push_to_hub.py", copied, "--repo-id", "user/name", "--dry-run", "--output", output)
    assert finished.returncode == 0 and "warning: " in finished.stderr and "hf-deq evaluate" in finished.stderr
    assert "model-index" not in (output / "README.md").read_text() and not (output / "recipe.yaml").exists()
