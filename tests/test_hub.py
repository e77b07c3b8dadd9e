"""A finished model as a Hub folder: it loads without the package, its card says what is known, and it is pushed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from families import TRANSFORMER, TRELLISNET, random_ids
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from test_scripts import TINY, script
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import hf_deq
from hf_deq import hub, model_card
from hf_deq.hub import export_hub_folder, find_auto_classes
from hf_deq.model_card import RunRecord, make_card, read_record

ROOT = Path(__file__).parents[1]
EXPORTED = {
    "transformer": (TRANSFORMER, {}),
    "adaptive": (TRANSFORMER, TRANSFORMER.variants["adaptive"]),
    "trellisnet": (TRELLISNET, {}),
    "split": (TRELLISNET, {"cutoffs": [9, 30]}),
}
# What may travel; everything else of the package stays at home.
CODE = {
    *("fixed_point", "position_algebra", "equilibrium", "jacobian", "weight_tying", "cache_deq", "softmax_heads"),
    *("adaptive", "attention_deq", "layer_deq", "classification_deq", "configuration_deq", "modeling_deq"),
    "generation_deq",
    *("configuration_deq_transformer", "modeling_deq_transformer"),
    *("configuration_deq_trellisnet", "modeling_deq_trellisnet"),
}
WITHOUT_THE_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_deq":
            raise ImportError("hf_deq is hidden")

sys.meta_path.insert(0, Hidden())
"""
LOADS = (
    WITHOUT_THE_PACKAGE
    + """
import copy
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file

def load(auto_class, folder):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    return copy.deepcopy(model.eval())  # weights as they lie in the file are not aligned, which changes how sums round

def same(auto_class, folder, expected):
    model = load(auto_class, folder)
    with torch.no_grad():
        outputs = model(expected["ids"])
    value = outputs.last_hidden_state if auto_class == "AutoModel" else outputs.logits
    assert (value == expected[auto_class]).all(), (auto_class, folder)
    if auto_class == "AutoModelForCausalLM":
        generated = model.generate(expected["ids"], max_new_tokens=4, do_sample=False)
        assert (generated == expected["generated"]).all(), folder
    return model

for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    expected = load_file(folder.with_suffix(".safetensors"))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for auto_class in config.auto_map.keys() & expected.keys():
        model = same(auto_class, folder, expected)
        again = Path(sys.argv[2]) / f"{folder.name}-{auto_class}"
        model.save_pretrained(again)
        same(auto_class, again, expected)
        print(folder.name, auto_class)
assert "hf_deq" not in sys.modules
"""
)


def alone(code, tmp_path, *arguments):
    """Run code in a Python of its own, which sees neither the package nor the network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=110, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders of language models and classifiers, and beside each what it should give."""
    root = tmp_path_factory.mktemp("exported")
    for name, (family, fields) in EXPORTED.items():
        model, ids = family.model(**fields), random_ids(2, 7)
        export_hub_folder(model, root / name)
        with torch.no_grad():
            expected = {"ids": ids, "AutoModelForCausalLM": model(ids).logits}
            expected["AutoModel"] = model.model(ids).last_hidden_state
            expected["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False)
        save_file({name: tensor.contiguous() for name, tensor in expected.items()}, root / f"{name}.safetensors")
    for name, family in (("transformer", TRANSFORMER), ("trellisnet", TRELLISNET)):
        model = AutoModelForSequenceClassification.from_config(family.config(num_labels=3)).double().eval()
        export_hub_folder(model, root / f"{name}-classifier")
        with torch.no_grad():
            expected = {"ids": ids, "AutoModelForSequenceClassification": model(ids).logits}
        save_file(expected, root / f"{name}-classifier.safetensors")
    return root


def test_every_auto_class_loads_without_the_package_and_saves_again(exported, tmp_path):
    finished = alone(LOADS, tmp_path, exported, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    auto_classes = ("AutoModel", "AutoModelForCausalLM")
    loaded = {f"{name} {auto_class}" for name in EXPORTED for auto_class in auto_classes}
    loaded |= {f"{name}-classifier AutoModelForSequenceClassification" for name in ("transformer", "trellisnet")}
    assert set(finished.stdout.splitlines()) == loaded


def test_without_trust_the_library_asks_for_it(exported, tmp_path):
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    finished = alone(WITHOUT_THE_PACKAGE + code, tmp_path, exported / "transformer")
    assert finished.returncode != 0
    assert "contains custom code" in finished.stderr and "trust_remote_code=True" in finished.stderr


def test_only_what_the_model_needs_travels(exported):
    for name in EXPORTED:
        travelled = {file.stem for file in (exported / name).glob("*.py")}
        other = "trellisnet" if EXPORTED[name][0] is TRANSFORMER else "transformer"
        assert travelled <= CODE and not any(stem.endswith(other) for stem in travelled)
        for file in (exported / name).glob("*.py"):
            assert file.read_bytes() == (Path(hf_deq.__file__).parent / file.name).read_bytes()
        auto_map = json.loads((exported / name / "config.json").read_text())["auto_map"]
        assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= auto_map.keys()
        assert (exported / name / "generation_config.json").is_file()


def test_the_model_at_hand_stays_as_it_is(tmp_path):
    model = TRANSFORMER.model()
    export_hub_folder(model, tmp_path)
    assert not hasattr(model.config, "auto_map")


def test_models_whose_code_cannot_travel_are_refused(tmp_path, monkeypatch):
    explicit = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_head=2, n_layer=1))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not a model of hf_deq"):
        export_hub_folder(explicit, tmp_path)

    class Mine(TRANSFORMER.model_class):
        pass

    with pytest.raises(ValueError, match="Mine is not a model of hf_deq"):
        find_auto_classes(Mine(TRANSFORMER.config()))
    monkeypatch.setattr(hub, "get_relative_import_files", lambda file: [str(tmp_path / "nested.formula.py")])
    with pytest.raises(ValueError, match=r"nested.formula.py is imported .* import siblings only"):
        export_hub_folder(TRANSFORMER.model(), tmp_path)
    monkeypatch.setattr(model_card, "TEMPLATE", tmp_path / "template.md")
    with pytest.raises(FileNotFoundError, match="from a clone"):
        make_card(TRANSFORMER.model(), "model")
    assert not any(tmp_path.iterdir())


# The card, and the script


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
        "![Perplexity against tolerance and budget](dial.png)\n\n"
        "`python scripts/plot_convergence.py numbers --stride 16 --others other`\n",
        'AutoModelForCausalLM.from_pretrained("user/numbers", trust_remote_code=True)',
        "hf download user/numbers --local-dir numbers\npython scripts/evaluate.py numbers --budgets 1 2",
        "In full: the validation split: ",
        "(`numbers.txt` must be in the working folder.)\n",
        "windows of 16, stride 8; solver anderson, ",
        "| at most 2 evaluations |",
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
    template = (ROOT / "model_cards" / "template.md").read_text()
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
    record = RunRecord(recipe=recipe, results=[dial | row], evaluation={"budgets": [3]})
    card = make_card(model, "user/model", record)
    assert {result.metric_type for result in card.data.eval_results} == {"loss", "recalled"}
    assert "test split of `copy_memory`" in card.text and "--budgets 3" in card.text and "--tolerances" not in card.text
    evaluation = {"corpus": "a/b", "split": "test", "drop_remainder": True}
    record = RunRecord(results=[{"perplexity": 9.0, "num_tokens": 5}], evaluation=evaluation, measured="five tokens")
    card = make_card(model, "user/model", record)
    assert "scripts/evaluate.py model --corpus a/b --split test --drop_remainder true\n" in card.text
    assert "| no solver |" in card.text and "In full: five tokens.\n" in card.text
    assert (card.data.eval_results[0].dataset_type, card.data.eval_results[0].dataset_split) == ("a/b", "test")


def test_results_that_are_not_of_this_run_are_refused(copied):
    file, config = copied / "results.json", hub.read_config(copied)
    results = json.loads(file.read_text())
    results["rows"] = [row | {"num_tokens": 3} for row in results["rows"]]
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="results.json has num_tokens 3, .* another model or text .* Write it anew"):
        read_record(copied, config)
    results["arguments"]["split"] = "test"
    file.write_text(json.dumps(results))
    assert read_record(copied, config).results[0]["num_tokens"] == 3
    for content, message in [
        ("{", "cannot be read: Expecting"),
        (json.dumps(results["rows"]), "it has rows alone, not the arguments that gave them"),  # as it once was
        ("{}", "evaluate.py --output did not write it"),
        (json.dumps(results | {"rows": [{"tokens": 3}]}), "evaluate.py --output did not write it"),
    ]:
        file.write_text(content)
        refused = script("push_to_hub.py", copied, "--repo-id", "user/name").stderr
        assert f"error: {file} cannot be read" in refused and message in refused


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
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
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

    monkeypatch.setattr(hub, "load_model", None)  # nothing is loaded
    assert "Repo id must" in refused(copied, "--repo-id", "a/b/c")
    assert "repo_id must be user/name" in refused(copied, "--repo-id", "name")
    assert "is not a model folder" in refused(tmp_path, "--repo-id", "user/name")
    full = refused(copied, "--repo-id", "user/name", "--dry-run", "--output", dry[0])
    assert "is not empty" in full
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hf auth login" in refused(copied, "--repo-id", "user/name")
    (copied / "results.json").unlink()
    assert f"evaluate.py {copied} --output {copied}/results.json" in refused(copied, "--repo-id", "user/name")
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(copied)
    assert "holds a gpt2 that hf_deq did not save" in refused(copied, "--repo-id", "user/name")
    assert api.calls == []


def test_a_dry_run_without_metrics_warns(copied, tmp_path):
    (copied / "results.json").unlink()
    for name in ("recipe.yaml", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    output = tmp_path / "hub"
    finished = script("push_to_hub.py", copied, "--repo-id", "user/name", "--dry-run", "--output", output)
    assert finished.returncode == 0 and "warning: " in finished.stderr and "evaluate.py" in finished.stderr
    assert "model-index" not in (output / "README.md").read_text() and not (output / "recipe.yaml").exists()
