"""The documentation: snippets run as printed, command lines parse, links lead somewhere, and the site builds.

A page's snippets share a namespace and a folder with what a reader would have by then: a trained `deq-model`,
`my_text.txt`, and checkpoints of the authors' code.
"""

import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser
from transformers.cli.transformers import app as transformers_cli

from hf_deq.commands import COMMANDS
from hf_deq.fixed_point import SOLVERS
from hf_deq.hub.conversion import FAMILIES
from hf_deq.tasks import LanguageModelingArguments
from hf_deq.training import RunArguments, loop, train

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block: its code, the name it is to be saved under (or none), and the line before its first one."""

    code: str
    title: str
    line: int


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    return [
        Block(code, "".join(re.findall(r'title="(.*?)"', info)), text[:start].count("\n") + 1)
        for found, info, code, start in ((*match.groups(), match.start()) for match in FENCED.finditer(text))
        if found == language
    ]


def with_blocks(language: str):
    """A parameter `page` for every page that has such blocks."""
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


# Snippets


@pytest.fixture(scope="session")
def belongings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    text = folder / "my_text.txt"
    text.write_text("\n\n".join(f"The iterator {n} has a number, and its number is {n}: no more." for n in range(200)))
    how = RunArguments(output_dir=str(folder / "deq-model"), max_steps=3, num_threads=1)
    model = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=300, memory_length=8)
    train(LanguageModelingArguments(corpus=str(text), sequence_length=32, sample_tokens=0), how, model)
    AcceleratorState._reset_state(True)
    arguments = dict(n_token=50, n_layer=2, n_head=2, d_model=16, d_head=8, d_inner=32)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    save_file(checkpoint_of_the_authors_code("deq_transformer", arguments), folder / "state_dict.safetensors")
    arguments = dict(n_embd=16, num_attention_heads=2, n_backbone_layers=1, vocab_size=50, padding_multiple=64)
    (folder / "attractor-140m").mkdir()
    (folder / "attractor-140m" / "config.json").write_text(json.dumps(arguments))
    torch.save(checkpoint_of_the_authors_code("attractor", arguments), folder / "attractor-140m" / "model.pt")
    return folder


def checkpoint_of_the_authors_code(family: str, arguments: dict) -> dict[str, torch.Tensor]:
    """A new model by the names that its tensors have there."""
    base = FAMILIES[family]
    config = base.config(arguments, {}, {})
    tensors, sources = {}, base.sources(config)
    for name, parameter in base.model_class(config).named_parameters(remove_duplicate=False):
        tensor, source = parameter.detach().clone(), sources[name]
        parts = tensor.split(source.sizes) if source.sizes else [tensor]
        tensors |= {
            key: part[..., None] if source.trailing else part for key, part in zip(source.keys, parts, strict=True)
        }
    return tensors


@pytest.fixture
def reader(belongings, tmp_path, monkeypatch):
    """A fresh copy of the belongings as working folder, and nothing left behind in this process."""
    solvers = dict(SOLVERS)
    monkeypatch.setattr(loop, "_cores_per_process", lambda: 1)  # other tests run on the other cores
    shutil.copytree(belongings, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(True)
    yield tmp_path
    AcceleratorState._reset_state(True)
    SOLVERS.clear()
    SOLVERS.update(solvers)


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")  # some pages show what a small budget does
@with_blocks("python")
def test_snippets_run_as_printed(page, reader, monkeypatch):
    if any(block.title for block in blocks(page, "python")):  # a script for torchrun: here it is its only process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
    namespace = {"__name__": page.stem}
    for block in blocks(page, "python"):
        numbered = "\n" * block.line + block.code  # so that a traceback names the page's own lines
        exec(compile(numbered, str(page), "exec"), namespace)


@pytest.mark.slow
def test_scripts_for_torchrun_run_with_two_processes(reader):
    (script,) = (block for page in PAGES for block in blocks(page, "python") if block.title)
    Path(script.title).write_text(script.code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script.title]
    finished = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    before, after = (AutoModelForCausalLM.from_pretrained(reader / name) for name in ("deq-model", "sharded-model"))
    moved = [(a - b).abs().max() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    assert all(0 < most < 0.1 for most in moved)  # every weight was trained, and none is lost


# Command lines


class Parsed(Exception):
    """Raised where a script has understood its command line and would begin."""


@pytest.fixture
def begin(monkeypatch):
    """A function that runs a script of the repository, or a command of `hf-deq`, until it has parsed its arguments."""
    parse = HfArgumentParser.parse_args_into_dataclasses

    def parse_and_stop(*arguments, **how):
        raise Parsed(parse(*arguments, **how))

    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse_and_stop)
    # The folder that a page starts a training from.
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *arguments, **how: AutoConfig.for_model("deq_attractor"))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "scripts")  # as Python does; the benchmarks share a module there

    def run(script: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            if script in COMMANDS:
                importlib.import_module(f"hf_deq.commands.{script}").main()
            else:
                runpy.run_path(script, run_name="__main__")
        except Parsed:
            return
        except SystemExit as stop:
            assert "--help" in arguments and not stop.code, f"{script} refuses {shlex.join(arguments)}: {stop.code}"
            return
        raise AssertionError(f"{script} does not read its command line with HfArgumentParser")

    return run


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, without comments and variables in front."""
    lines = "\n".join(block.code for block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(command) for line in lines for command in line.split(" #")[0].split("&&")]
    found = [[word for i, word in enumerate(words) if i or "=" not in word] for words in found]
    return [words for words in found if words]


@with_blocks("bash")
def test_command_lines_parse(page, begin):
    scripts = {block.title for block in blocks(page, "python")}
    for words in commands(page):
        launcher, arguments = words[0], words[1:]
        if launcher == "accelerate":
            launched = launch_command_parser().parse_args(arguments[1:])
        elif launcher == "torchrun":
            launched = get_args_parser().parse_args(arguments)
        elif launcher == "pip":
            assert_extras_exist(arguments)
            continue
        elif launcher == "lm_eval":  # tests/test_lm_eval.py runs such a line
            assert (ROOT / arguments[arguments.index("--tasks") + 1]).is_file()
            continue
        elif launcher == "transformers" or (launcher == "hf-deq" and arguments[0] == "serve"):
            transformers_cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
            continue
        elif launcher in ("python", "hf-deq"):
            begin(arguments[0], arguments[1:])
            continue
        else:
            assert words in (["pytest"], ["mkdocs", "serve"]) or words[:2] == ["hf", "download"], (
                f"{page.name}: how is {shlex.join(words)} checked?"
            )
            continue
        if launched.training_script not in scripts:
            begin(launched.training_script, launched.training_script_args)


def assert_extras_exist(arguments: list[str]) -> None:
    """`pip install -e ".[plot,test]"` names extras of this package, and anything else is a package by name."""
    extras = re.search(r"optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    for name in re.findall(r"\w+", "".join(re.findall(r"\.\[(.*?)\]", " ".join(arguments)))):
        assert re.search(rf"^{name} = \[", extras, re.M), f"there is no extra {name!r}"


# Links and the site


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as the site makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in headings(target), f"{page.name} links to {link}, which has {headings(target)}"


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r"[\w/]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents}
    assert sorted(navigation) == sorted(pages | {"index.md"})  # the README, see docs/hooks.py


def test_every_module_is_in_the_reference_once():
    named = re.findall(r"^::: (.*)$", "\n".join(page.read_text() for page in DOCS.glob("reference/*.md")), re.M)
    files = (file.relative_to(ROOT).with_suffix("") for file in (ROOT / "hf_deq").rglob("*.py"))
    assert sorted(named) == sorted(".".join(file.parts) for file in files if file.name not in ("__init__", "__main__"))


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    if not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip('the site needs its tools: pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "model_cards" / "deq-transformer-ptb-small" / "residuals.png").is_file()
    reference = (tmp_path / "reference" / "models.html").read_text()
    assert 'id="hf_deq.modeling_deq.DEQModel.forward"' in reference
    assert re.search(r"jacobian_loss_frequency.{0,400}?default:.{0,200}?1\.0", reference, re.S)
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'<(script|img|link rel="stylesheet")[^>]*(src|href)="(https?:)?//', page.read_text()), (
            page
        )


# The notebook


def test_the_notebook_runs_and_shows_what_it_gave(monkeypatch):
    """Cell by cell, without a kernel. Printed evaluations are those of the stored outputs."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(ROOT / "examples")
    notebook, namespace = json.loads(Path("first_steps.ipynb").read_text()), {}
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        with redirect_stdout(io.StringIO()) as printed:
            exec("".join(line for line in cell["source"] if not line.startswith("%")), namespace)
        stored = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert bool(stored) == bool(printed.getvalue()) and cell["outputs"]
        assert re.findall(r"\d+ evaluations", stored) == re.findall(r"\d+ evaluations", printed.getvalue())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
