"""The trained models in model_cards/: loaded in a moment, as good as their cards say, and ready for the Hub."""

import json
import re

import pytest
import torch
import yaml
from command_line import ROOT, script
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_deq.data import CorpusArguments, read_corpus
from hf_deq.evaluation.convergence import held_out_windows
from hf_deq.hub import read_config, read_record
from hf_deq.iterations import SafeguardedIteration

NAMES = ("deq-transformer-tiny", "deq-trellisnet-tiny", "deq-attractor-tiny")
FOLDERS = [ROOT / "model_cards" / name for name in NAMES]
shipped = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@pytest.fixture(scope="module")
def built_in_corpus():
    return read_corpus(CorpusArguments())


@shipped
def test_the_folder_is_small_and_its_card_says_what_was_measured(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    record, card = read_record(folder, read_config(folder)), (folder / "README.md").read_text()
    (row,) = (row for row in record.results if row["solver_tolerance"] == 1e-3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert f"| parameters | {model.num_parameters():,} |" in card
    assert f"| {row['bits_per_byte']:.3f} bits per byte; perplexity {row['perplexity']:.1f} per token" in card
    assert re.search(rf"tolerance 1e-3\) \| {row['num_evaluations']:.1f}; ", card)
    assert f"spectral radius of f's Jacobian at the equilibrium | {record.spectral_radius:.2f} |" in card
    assert record.cost["step"] == yaml.safe_load((folder / "recipe.yaml").read_text())["max_steps"]
    assert record.cost["validation_bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-4)
    assert f"{record.cost['seconds'] / 60:.1f} minutes" in card


@pytest.mark.parametrize("file", sorted(ROOT.glob("model_cards/*/*.json*")), ids=lambda file: f"{file.parent.name}")
def test_records_are_json_for_every_reader(file):
    """Python also writes numbers that are not finite, which no other reader understands."""

    def refuse(constant):
        raise AssertionError(f"{file} has {constant}")

    for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
        json.loads(text, parse_constant=refuse)


@shipped
@torch.no_grad()
def test_it_predicts_as_well_as_its_card_says(folder, built_in_corpus):
    """On this Python's own documentation, which differs a little from the one that it was trained on."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stream = built_in_corpus.encode("validation", tokenizer)
    windows = held_out_windows(stream.ids, count=32, length=128)
    output = model(windows, labels=windows)
    bits_per_byte = output.loss / torch.log(torch.tensor(2.0)) * len(stream.ids) / stream.num_bytes
    (row,) = (
        row for row in json.loads((folder / "results.json").read_text())["rows"] if row["solver_tolerance"] == 1e-3
    )
    assert bits_per_byte == pytest.approx(row["bits_per_byte"], rel=0.15)
    assert output.converged.float().mean() > 0.9 and output.num_evaluations.float().mean() < 15


@torch.no_grad()
def test_converged_means_converged_on_a_text_that_misleads_anderson():
    """Twice as long as those it was trained on: one position's residual swings to and fro without the safeguard."""
    folder, text = FOLDERS[0], (ROOT / "tests" / "fixtures" / "long_text.txt").read_text()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape == (1, 256)
    exact = model(ids, solver_tolerance=1e-6, solver_max_evaluations=100)
    one_by_one = model(ids, solver_tolerance=1e-6, solver_max_evaluations=400)
    assert exact.converged and torch.equal(exact.logits, one_by_one.logits)

    def divergence(output):
        """In nats, of the worst position."""
        return (
            F.kl_div(output.logits.log_softmax(-1), exact.logits.log_softmax(-1), log_target=True, reduction="none")
            .sum(-1)
            .max()
        )

    for tolerance, most in ((1e-2, 0.2), (1e-3, 0.05)):
        output = model(ids, solver_tolerance=tolerance)
        assert output.converged and output.residual <= tolerance and output.num_evaluations <= 30
        assert divergence(output) <= most
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafeguardedIteration, "evaluations_since_lowest", lambda iteration, own: torch.ones_like(own))
        unguarded = model(ids, solver_tolerance=1e-2, solver_max_evaluations=60)
    assert not unguarded.converged and divergence(unguarded) > 0.5


@shipped
def test_it_generates_the_same_with_and_without_a_cache(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The iterator ", return_tensors="pt")
    how = dict(max_new_tokens=20, do_sample=False, solver_tolerance=1e-5)
    ids = model.generate(**inputs, **how)
    assert torch.equal(ids, model.generate(**inputs, **how, use_cache=False))
    assert len(set(re.findall(r"[a-z]{3,}", tokenizer.decode(ids[0])))) > 3


@shipped
def test_it_is_ready_to_push(folder, tmp_path):
    finished = script("push_to_hub.py", folder, "--repo-id", "user/name", "--dry-run", "--output", tmp_path)
    assert finished.returncode == 0 and not finished.stderr.count("warning"), finished.stderr[-2000:]
    card = (tmp_path / "README.md").read_text()
    for part in (
        "model-index",
        "## Evaluation",
        "## Training",
        "spectral radius",
        "| minutes |",
        "![Quality against",
    ):
        assert part in card
