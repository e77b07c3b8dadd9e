"""A finished model as a Hub folder, which loads without the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import ATTRACTOR, FAMILIES, TRANSFORMER, TRELLISNET, random_ids
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import hf_deq
from hf_deq.hub import code_files, export, export_hub_folder
from hf_deq.hub.export import find_auto_classes

ROOT = Path(__file__).parents[2]
EXPORTED = {
    "transformer": (TRANSFORMER, {}),
    "adaptive": (TRANSFORMER, TRANSFORMER.variants["adaptive"]),
    "trellisnet": (TRELLISNET, {}),
    "split": (TRELLISNET, {"cutoffs": [9, 30]}),
    "attractor": (ATTRACTOR, {}),
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
        by_its_class = Path(sys.argv[2]) / f"{again.name}-by-its-class"
        type(model).from_pretrained(again).save_pretrained(by_its_class)
        load(auto_class, by_its_class)
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
    for name, family in FAMILIES.items():
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
    loaded |= {f"{name}-classifier AutoModelForSequenceClassification" for name in FAMILIES}
    assert set(finished.stdout.splitlines()) == loaded


def test_without_trust_the_library_asks_for_it(exported, tmp_path):
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    finished = alone(WITHOUT_THE_PACKAGE + code, tmp_path, exported / "transformer")
    assert finished.returncode != 0
    assert "contains custom code" in finished.stderr and "trust_remote_code=True" in finished.stderr


def test_the_root_of_the_package_is_what_travels():
    """A reader sees in the tree which code goes to the Hub with a model."""
    travels = {file.stem for family in FAMILIES.values() for file in code_files(family.model())}
    assert {file.stem for file in ROOT.joinpath("hf_deq").glob("*.py")} == travels | {"__init__"}


def test_only_what_the_model_needs_travels(exported):
    root = {file.stem for file in ROOT.joinpath("hf_deq").glob("*.py")}
    for name in EXPORTED:
        travelled = {file.stem for file in (exported / name).glob("*.py")}
        other = "trellisnet" if EXPORTED[name][0] is TRANSFORMER else "transformer"
        assert travelled <= root and not any(stem.endswith(other) for stem in travelled)
        for file in (exported / name).glob("*.py"):
            assert file.read_bytes() == (Path(hf_deq.__file__).parent / file.name).read_bytes()
        auto_map = json.loads((exported / name / "config.json").read_text())["auto_map"]
        assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= auto_map.keys()
        assert (exported / name / "generation_config.json").is_file()


def test_the_model_at_hand_stays_as_it_is(tmp_path):
    model = TRANSFORMER.model()
    export_hub_folder(model, tmp_path)
    assert "auto_map" not in vars(model.config)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_copy_without_the_code_names_no_code(exported, tmp_path, name):
    """The installed package loads a folder with code and saves it again: a model only."""
    AutoModelForCausalLM.from_pretrained(exported / name).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_models_whose_code_cannot_travel_are_refused(tmp_path, monkeypatch):
    explicit = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_head=2, n_layer=1))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not a model of hf_deq"):
        export_hub_folder(explicit, tmp_path)

    class Mine(TRANSFORMER.model_class):
        pass

    with pytest.raises(ValueError, match="Mine is not a model of hf_deq"):
        find_auto_classes(Mine(TRANSFORMER.config()))
    monkeypatch.setattr(export, "get_relative_import_files", lambda file: [str(tmp_path / "nested.formula.py")])
    with pytest.raises(ValueError, match=r"nested.formula.py is imported .* import siblings only"):
        export_hub_folder(TRANSFORMER.model(), tmp_path)
    assert not any(tmp_path.iterdir())
