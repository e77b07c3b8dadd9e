"""Training that starts from a model folder: the weights and the tokenizer of the folder, and what contradicts it."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_deq.commands.train import parse
from hf_deq.hub import retrofit
from hf_deq.tasks import CopyMemoryArguments, LanguageModelingArguments
from hf_deq.training import RunArguments, train

SIZES = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=300)


def train_anew(*arguments):
    """Train in a process that may have trained before, in another precision."""
    AcceleratorState._reset_state(True)
    try:
        return train(*arguments)
    finally:
        AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"The iterator {n} has a number, and its number is {n}: no more." for n in range(200)))
    return file


def data(text: Path) -> LanguageModelingArguments:
    return LanguageModelingArguments(corpus=str(text), sequence_length=32, sample_tokens=0)


def run(folder: Path, **arguments) -> RunArguments:
    return RunArguments(output_dir=str(folder), num_threads=1, **({"max_steps": 2, "warmup_steps": 1} | arguments))


@pytest.fixture(scope="module")
def llama(text, tmp_path_factory) -> Path:
    """A small explicit model, trained for two steps."""
    folder = tmp_path_factory.mktemp("llama")
    train_anew(data(text), run(folder), SIZES | {"num_hidden_layers": 3}, "llama")
    return folder


@pytest.fixture(scope="module")
def retrofitted(llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retrofitted")
    retrofit(AutoModelForCausalLM.from_pretrained(llama), 1, 1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def test_dropout_is_a_matter_of_the_training(text, llama, retrofitted, tmp_path):
    dropout = {"hidden_dropout": 0.1, "output_dropout": 0.2}
    train_anew(data(text), run(tmp_path, init_from=str(retrofitted)), dropout, "deq_attractor")
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert (config.hidden_dropout, config.output_dropout) == (0.1, 0.2)
    assert retrofit(AutoModelForCausalLM.from_pretrained(llama), 1, 1, **dropout).config.hidden_dropout == 0.1


def test_training_goes_on_from_the_weights_of_the_folder(text, retrofitted, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(retrofitted)
    still = dict(learning_rate=0.0, weight_decay=0.0, init_from=str(retrofitted))
    train_anew(data(text), run(tmp_path / "still", **still), {"solver_tolerance": 1e-2}, "deq_attractor")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "still")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert after.config.solver_tolerance == 1e-2  # how it is solved may change
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (retrofitted, tmp_path / "still")]
    assert vocabularies[0] == vocabularies[1]
    assert yaml.safe_load((tmp_path / "still" / "recipe.yaml").read_text())["init_from"] == str(retrofitted)
    result = train_anew(data(text), run(tmp_path / "moved", init_from=str(retrofitted)), {}, "deq_attractor")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    assert not torch.equal(next(moved.parameters()), next(before.parameters())) and result["step"] == 2


def test_an_explicit_model_goes_on_too(text, llama, tmp_path):
    train_anew(data(text), run(tmp_path, init_from=str(llama), max_steps=1), {}, "llama")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 3


def test_a_run_that_started_from_a_folder_resumes(text, retrofitted, tmp_path):
    how = dict(init_from=str(retrofitted), save_steps=1, max_steps=3)
    whole = train_anew(data(text), run(tmp_path, **how), {}, "deq_attractor")
    (tmp_path / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")
    again = train_anew(data(text), run(tmp_path, **how, resume=True), {}, "deq_attractor")
    assert again["validation_nats_per_token"] == pytest.approx(whole["validation_nats_per_token"], rel=1e-9)


@pytest.mark.parametrize(
    "fields, model_type, message",
    [
        ({"hidden_size": 32}, "deq_attractor", "hidden_size=32 contradicts init_from=.*, where it is 16: leave"),
        ({"num_prelude_layers": 0}, "deq_attractor", "num_prelude_layers=0 contradicts"),
        ({}, "deq_trellisnet", "holds a deq_attractor, but model_type is deq_trellisnet"),
        ({}, "gpt2", "holds a deq_attractor, but model_type is gpt2"),
    ],
)
def test_what_contradicts_the_folder_is_refused(text, retrofitted, tmp_path, fields, model_type, message):
    with pytest.raises(ValueError, match=message):
        train_anew(data(text), run(tmp_path, init_from=str(retrofitted)), fields, model_type)


def test_a_folder_of_another_task_is_refused(text, llama, tmp_path):
    delay = CopyMemoryArguments(copy_delay=3)
    with pytest.raises(ValueError, match="was trained on task: language_modeling, but this run is for task: copy_mem"):
        train_anew(delay, run(tmp_path / "a", init_from=str(llama)), {}, "llama")
    train_anew(delay, run(tmp_path / "b", max_steps=1), SIZES | {"vocab_size": 10}, "deq_transformer")
    with pytest.raises(ValueError, match="was trained on task: copy_memory, but this run is for task: language_model"):
        train_anew(data(text), run(tmp_path / "c", init_from=str(tmp_path / "b")), {}, "deq_transformer")


def test_the_rotary_base_of_the_folder_may_be_named_but_not_changed(text, retrofitted, tmp_path):
    how = dict(init_from=str(retrofitted), max_steps=1)
    train_anew(data(text), run(tmp_path / "same", **how), {"rope_theta": 10000.0}, "deq_attractor")
    with pytest.raises(ValueError, match="rope_theta=500.0 contradicts init_from=.*, where it is 10000"):
        train_anew(data(text), run(tmp_path / "other", **how), {"rope_theta": 500.0}, "deq_attractor")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(text, retrofitted, tmp_path):
    larger = LanguageModelingArguments(corpus=str(text), sequence_length=32, sample_tokens=0, tokenizer=str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(retrofitted)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_size=.* contradicts init_from"):
        train_anew(larger, run(tmp_path / "out", init_from=str(retrofitted)), {}, "deq_attractor")


def test_the_folder_says_what_the_model_is_and_the_recipe_how_to_train(retrofitted):
    _, arguments, fields, model_type = parse(["--init_from", str(retrofitted), "--max_steps", "7"])
    assert model_type == "deq_attractor" and fields == {}
    assert arguments.max_steps == 7 and arguments.init_from == str(retrofitted) and arguments.batch_size == 8
    with pytest.raises(ValueError, match="init_from: there is no folder '/nowhere'"):
        parse(["--init_from", "/nowhere"])
    with pytest.raises(ValueError, match="init_from: there is no folder 'my-modle' here, and as a name on the Hub"):
        parse(["--init_from", "my-modle"])
