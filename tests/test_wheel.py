"""The built wheel, installed where there is no clone: it trains, evaluates and exports."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from command_line import ROOT, TINY

# One process does all of the work, because every process imports torch and Transformers anew.
WORK = """
import sys
from pathlib import Path
import hf_deq
from hf_deq.commands import main

assert Path(hf_deq.__file__).is_relative_to(sys.argv[1]), hf_deq.__file__
for line in sys.argv[2:]:
    sys.argv = ["hf-deq", *line.split()]
    main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("hf_deq", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", built, source]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=110)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (file,) = built.glob("hf_deq-*.whl")
    return file


def test_the_wheel_holds_all_modules_recipes_and_the_template_and_no_weights(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "hf_deq").rglob("*.py")}
    recipes = {f"hf_deq/{file.relative_to(ROOT).as_posix()}" for file in ROOT.glob("model_cards/*/recipe.yaml")}
    assert modules | recipes | {"hf_deq/hub/template.md", "hf_deq/py.typed"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".png"))]


def test_it_works_without_a_clone(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "text.txt").write_text("\n\n".join(f"sentence number {n} is about the number {n}" for n in range(99)))
    flags = " ".join([*TINY, "--max_steps", "3"])
    lines = [
        f"train --corpus text.txt --output_dir model {flags}",
        "evaluate model --tolerances 0.1 --budgets 1 --output model/results.json",
        "push model --repo-id user/name --dry-run --output folder",
    ]
    finished = subprocess.run(
        [sys.executable, "-c", WORK, str(site), *lines],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| tolerance 0.1 |" in card and (tmp_path / "folder" / "modeling_deq_transformer.py").is_file()
    assert json.loads((tmp_path / "model" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
