"""The command lines, run as a user would."""

import dataclasses
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from command_line import ROOT, TINY, TINY_TRELLISNET, script
from datasets import Dataset
from families import random_ids
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_deq import commands
from hf_deq.commands import evaluate, serve
from hf_deq.commands.train import parse
from hf_deq.data import TokenStream, documents
from hf_deq.evaluation import HeldOutText, Protocol, evaluate_dial
from hf_deq.modeling_deq import DEQForCausalLM
from hf_deq.tasks import TASKS
from hf_deq.tasks.copy_memory import VARIANTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"sentence number {n} is about the number {n}, nothing else" for n in range(300)))
    return file


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    finished = script("train.py", "--corpus", corpus, "--output_dir", folder, *TINY)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return folder, finished.stdout


def test_train_prints_what_a_user_wants_to_know(trained):
    folder, printed = trained
    for expected in ("bits per byte", "bigram", "equilibrium:", "sample:\nThe ", f'from_pretrained("{folder}")'):
        assert expected in printed
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "metrics.jsonl"} <= {
        path.name for path in folder.iterdir()
    }


def test_the_saved_recipe_is_the_run(trained, corpus, tmp_path):
    folder, _ = trained
    again = script("train.py", folder / "recipe.yaml", "--output_dir", tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    losses = [
        [json.loads(line).get("loss") for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder, tmp_path)
    ]
    assert losses[0] == losses[1]


def test_generate_continues_the_prompt_and_reports_the_cost(trained):
    folder, _ = trained
    greedy = ["--no_do_sample", "--max_new_tokens", 6, "--prompt", "sentence number"]
    finished = script("generate.py", folder, *greedy)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.startswith("sentence number")
    assert re.search(
        r"6 tokens in .* tokens/s\); evaluations of f: [\d.]+ for the prompt, [\d.]+ per new token", finished.stderr
    )
    cheap = script("generate.py", folder, *greedy, "--solver_max_evaluations", 1)
    assert "1.0 for the prompt, 1.0 per new token; NOT all solves converged" in cheap.stderr
    beams = script("generate.py", folder, *greedy, "--num_beams", 2)
    assert beams.stdout.startswith("sentence number")


def test_evaluate_turns_the_dial(trained, tmp_path):
    folder, _ = trained
    finished = script(
        "evaluate.py",
        folder,
        "--length",
        16,
        "--tolerances",
        1e-2,
        1e-4,
        "--budgets",
        1,
        2,
        "--output",
        tmp_path / "dial.json",
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "1 evaluation " in finished.stdout and "tolerance 0.0001" in finished.stdout
    results = json.loads((tmp_path / "dial.json").read_text())
    rows = results["rows"]
    assert results["arguments"] == {"length": 16, "tolerances": [1e-2, 1e-4], "budgets": [1, 2]}
    assert f"{folder} on {results['measured']}" in finished.stdout
    assert [row["num_evaluations"] for row in rows[:2]] == [1, 2]
    assert rows[3]["residual"] < rows[2]["residual"] < rows[0]["residual"]
    assert rows[0]["perplexity"] > rows[3]["perplexity"]


def test_evaluate_wants_the_folder_first_because_its_task_has_flags(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text("task: state_tracking\n")
    monkeypatch.setattr(sys, "argv", ["hf-deq evaluate", "--words", "10", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "name the model folder first" in capsys.readouterr().err


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    """Over the batches of a large corpus; at once here, and elsewhere after five seconds."""
    monkeypatch.setattr(
        documents, "tqdm", lambda *arguments, **how: tqdm(*arguments, **how | {"delay": 0, "leave": True})
    )
    split = Dataset.from_dict({"text": ["a line"] * 2500})
    assert [len(texts) for texts in documents.batches_of_documents(split, "encode words")] == [1000, 1000, 500]
    assert "encode words: 100%|" in (said := capsys.readouterr().err) and "3/3" in said
    monkeypatch.setenv("LOCAL_RANK", "1")  # a second process is silent
    assert len(list(documents.batches_of_documents(split, "encode words"))) == 3 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hiden_size", "3"], "--hiden_size"),
        (["--num_attention_heads", "5"], "num_attention_heads=5 must divide hidden_size"),
        (["--solver", "newton"], "solver must be one of"),
        (["--corpus", "missing.txt"], "no such file"),
        (["--max_steps", "0"], "max_steps must be at least 1"),
        (["--model_type", "deq_trellisnet", "--kernel_size", "1"], "kernel_size must be at least 2"),
        (["--model_type", "deq_trellisnet", "--cutoffs", "9", "5"], "cutoffs must rise strictly"),
        (["--task", "copy_memory", "--copy_delay", "0"], "copy_delay must be at least 1"),
        (["--task", "copy_memory", "--copy_variant", "rnn"], "copy_variant must be one of"),
        (["--task", "translation"], "invalid choice: 'translation'"),
        (["--model_type", "deq_mamba"], "invalid choice: 'deq_mamba'"),
        (["--model_type", "gpt2", "--hidden_size", "32"], "--hidden_size"),
        (
            ["--model_type", "gpt2", "--n_positions", "64"],
            "n_positions=64 must cover the training sequences (sequence_length) (128)",
        ),
    ],
)
def test_train_refuses_bad_flags_in_a_line(arguments, message, corpus, tmp_path):
    small = ["--corpus", corpus, "--vocab_size", 300] if "copy_memory" not in arguments else []
    finished = script("train.py", *small, *arguments, "--output_dir", tmp_path)
    assert finished.returncode != 0
    assert message in finished.stderr and "Traceback" not in finished.stderr


def test_recipes_with_unknown_names_are_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 0.1\n")
    finished = script("train.py", recipe)
    assert finished.returncode != 0 and "unknown names ['learning_rat']" in finished.stderr
    finished = script("train.py", tmp_path / "missing.yaml")
    assert "error: there is no recipe" in finished.stderr


@pytest.mark.parametrize(
    "line, message",
    [
        ("max_steps: 1.0e+3", "max_steps must be a whole number, got 1000.0"),
        ("max_steps: yes", "max_steps must be a whole number, got True"),
        ("max_steps: {a: 1}", "max_steps must be a whole number, got {'a': 1}"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: true", "learning_rate must be a number, got True"),
        ("num_threads: 1.0", "num_threads must be a whole number, got 1.0"),
        ("overwrite: 3", "overwrite must be true or false, got 3"),
        ("output_dir: {a: 1}", "output_dir must be text, got {'a': 1}"),
        ("max_steps: {}", "max_steps must be a whole number, got {}"),
        ("warmup_steps: false", "warmup_steps must be a whole number, got False"),
        ("lr_milestones: ['2', 3.5]", "lr_milestones must be a list, each of them a whole number, got 3.5"),
        ("lr_milestones: 2", "lr_milestones must be a list, got 2"),
        ("learning_rate: [1, 2]", r"learning_rate must be one value, got \[1, 2\]"),
        ("learning_rate:", "learning_rate has no value. Write one, or leave the name out"),
    ],
)
def test_values_of_a_recipe_are_checked_as_those_of_flags(tmp_path, line, message):
    (recipe := tmp_path / "recipe.yaml").write_text(f"task: copy_memory\n{line}\n")
    with pytest.raises(ValueError, match=f"recipe.yaml: {message}"):
        parse([str(recipe)])


def test_whole_numbers_of_a_recipe_may_be_real_ones(tmp_path):
    (recipe := tmp_path / "recipe.yaml").write_text(
        "task: copy_memory\nlearning_rate: 1\nlr_scheduler_type: multistep\nlr_milestones: [2, 3]\n"
    )
    _, run, _, _ = parse([str(recipe)])
    assert (run.learning_rate, run.lr_milestones) == (1.0, [2, 3]) and isinstance(run.learning_rate, float)


def test_generate_and_evaluate_refuse_what_is_not_a_model(trained, tmp_path):
    for name in ("generate.py", "evaluate.py"):
        finished = script(name, tmp_path)
        assert finished.returncode != 0 and "Traceback" not in finished.stderr and "error: " in finished.stderr
    for flags, message in (
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "caf\udce9"], "the prompt is not text in UTF-8"),
        (["--device", "cuda:7"], "device 'cuda:7' is not available here"),
        (["--device", "toaster"], "device 'toaster' is not available here"),
    ):
        finished = script("generate.py", trained[0], *flags)
        assert finished.returncode != 0 and f"error: {message}" in finished.stderr
    damaged = shutil.copytree(trained[0], tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name in ("generate.py", "evaluate.py"):
        finished = script(name, damaged)
        assert (
            f"error: the weights in '{damaged}' are damaged" in finished.stderr and "Traceback" not in finished.stderr
        )
    config = json.loads((damaged / "config.json").read_text())
    for names, message in ((["Nonsense"], "names the architecture 'Nonsense'"), ("Nonsense", "architectures")):
        (damaged / "config.json").write_text(json.dumps(config | {"architectures": names}))
        finished = script("generate.py", damaged)
        assert message in finished.stderr and "Traceback" not in finished.stderr
    (damaged / "recipe.yaml").write_text("a: [")
    assert "is not YAML" in script("evaluate.py", damaged).stderr
    for content, message in (
        ("task: translation", "task: translation, which does not exist"),
        ("task: [a]", "task: ['a'], which does not exist"),
        ("sequence_length: long", "length must be a number, got 'long'"),
    ):
        (damaged / "recipe.yaml").write_text(content)
        finished = script("evaluate.py", copy_with_weights(trained[0], damaged))
        assert message in finished.stderr and "Traceback" not in finished.stderr
    for name in ("generate.py", "evaluate.py", "plot_convergence.py"):
        assert "error: model: there is no folder '/no/such/folder'" in script(name, "/no/such/folder").stderr


def copy_with_weights(folder, damaged):
    """A damaged copy of a folder, with whole weights and configuration again."""
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(folder / name, damaged / name)
    return damaged


def test_weights_that_are_not_finite_give_no_text(trained, corpus, tmp_path):
    """Generation says so in a line, and a training that ends with them shows no sample."""
    spoilt = shutil.copytree(trained[0], tmp_path / "spoilt")
    weights = load_file(spoilt / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, spoilt / "model.safetensors", {"format": "pt"})
    finished = script("generate.py", spoilt, "--prompt", "sentence")
    assert finished.returncode == 1 and "error: model.norm.weight is not finite" in finished.stderr
    flags = ["--init_from", spoilt, "--max_steps", 2, "--sequence_length", 16, "--num_threads", 1, "--shallow_steps", 0]
    finished = script("train.py", "--corpus", corpus, *flags, "--output_dir", tmp_path / "out", "--warmup_steps", 1)
    assert finished.returncode == 0 and "perplexity nan" in finished.stdout, finished.stderr[-2000:]
    assert "sample:" not in finished.stdout


def test_a_single_token_costs_nothing_after_the_prompt(trained):
    finished = script("generate.py", trained[0], "--prompt", "sentence", "--max_new_tokens", 1)
    assert re.search(r"evaluations of f: [\d.]+ for the prompt; ", finished.stderr), finished.stderr[-2000:]


def test_evaluate_refuses_flags_without_an_effect(trained):
    folder, _ = trained
    for flags, message in (
        (["--length", 0], "length must be at least 1, got 0"),
        (
            ["--corpus", "cpython_docs", "--validation_file", "short.txt"],
            "validation_file='short.txt' goes with a local",
        ),
        (["--stride", 4, "--carry_memory", "true"], "stride=4 is for windows"),
        (["--copy_delay", 3], "--copy_delay"),
        (["--memory_length", 64], "memory_length=64 is for a text that is read in streams"),
    ):
        finished = script("evaluate.py", folder, *flags)
        assert finished.returncode != 0 and message in finished.stderr and "Traceback" not in finished.stderr


def test_windows_that_an_explicit_model_cannot_read_are_refused():
    """Positions in a table have an end. Rotary positions have none."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_head=2, n_layer=1, n_positions=8))
    held_out = HeldOutText("random", "test", TokenStream(random_ids(1, 80)[0], 20, 200), 1, Protocol(length=16))
    with pytest.raises(
        ValueError, match=r"n_positions=8 must cover the windows \(length\) \(16\): give a length of at most 8"
    ):
        evaluate_dial(model, held_out, [{}])
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=8, **sizes))
    assert evaluate_dial(llama, held_out, [{}]).rows[0]["perplexity"] > 1


@pytest.fixture(scope="module")
def word_corpus(tmp_path_factory):
    """A folder of lines for word-level recipes."""
    folder = tmp_path_factory.mktemp("words")
    for part, count in (("train", 300), ("valid", 20), ("test", 20)):
        lines = [f"line number {n} is about the number {n} , nothing else" for n in range(count)]
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def scaled_down(recipe: dict) -> list:
    """Flags that make a published recipe small, and let it take a shallow step and one at the equilibrium."""
    flags = ["--hidden_size", 64, "--intermediate_size", 64, "--sequence_length", 16]
    flags += ["--shallow_steps", min(1, recipe["shallow_steps"])]
    flags += ["--num_attention_heads", 2, "--memory_length", 16] if recipe["model_type"] == "deq_transformer" else []
    flags += ["--embedding_size", 64] if "embedding_size" in recipe else []
    flags += ["--cutoffs", 20, 40, 200] if "cutoffs" in recipe else []
    return flags + (["--lr_milestones", 1] if "lr_milestones" in recipe else [])


@pytest.mark.parametrize(
    "recipe",
    sorted(file for file in (ROOT / "model_cards").glob("*/*.yaml") if file.stem != "sweep"),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_recipes_take_their_first_steps(recipe, corpus, word_corpus, tmp_path):
    flags = ["--output_dir", tmp_path, "--max_steps", 2, "--batch_size", 2, "--num_threads", 1]
    content = yaml.safe_load(recipe.read_text())
    if content.get("task") == "copy_memory":
        flags += ["--copy_delay", 1, "--copy_variant", "tcn", "--solver_max_evaluations", 2]
    elif content.get("task") == "state_tracking":
        flags += ["--word_length", 2, "--solver_max_evaluations", 2]
    elif content.get("word_level"):
        flags += ["--sample_tokens", 0, "--corpus", word_corpus, "--corpus_config", "", *scaled_down(content)]
    else:
        flags += ["--sample_tokens", 0, "--corpus", corpus, "--vocab_size", 300, "--sequence_length", 16]
        flags += ["--corpus_config", ""] if "corpus_config" in content else []
    if recipe.parent.name in ("deq-attractor-140m", "deq-transformer-34m"):
        flags += ["--hidden_size", 64, "--intermediate_size", 96, "--gradient_accumulation_steps", 1]
    finished = script("train.py", recipe, *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.parametrize("model_type", ["deq_transformer", "deq_trellisnet", "deq_attractor"])
@pytest.mark.parametrize("task", ["language_modeling", "copy_memory", "state_tracking"])
def test_there_is_a_recipe_for_every_model_and_task(model_type, task):
    """Chosen by these two flags alone."""
    arguments, run, fields, chosen = parse(["--model_type", model_type, "--task", task, "--max_steps", "7"])
    assert (type(arguments), chosen, run.max_steps) == (TASKS[task].arguments, model_type, 7)
    assert "hidden_size" in fields and run.train_solver_tolerance is not None


def test_an_explicit_baseline_takes_the_recipe_of_a_deq_but_for_its_model():
    ours = parse([])
    flags = ["--n_layer", "2", "--n_inner", "64", "--resid_pdrop", "0", "--embd_pdrop", "0.05"]
    data, training, fields, model_type = parse(["--model_type", "gpt2", *flags])
    assert (data, model_type) == (ours[0], "gpt2")
    assert training == dataclasses.replace(ours[1], train_solver_tolerance=None, shallow_steps=0)
    expected = dict(vocab_size=ours[2]["vocab_size"], n_layer=2, n_inner=64, resid_pdrop=0, embd_pdrop=0.05)
    assert fields == expected
    named = parse([str(ROOT / "model_cards" / "deq-transformer-tiny" / "recipe.yaml"), "--model_type", "gpt2", *flags])
    assert named[1:] == (training, fields, model_type)


def test_a_recipe_for_an_explicit_baseline_may_not_misspell(tmp_path):
    (tmp_path / "mine.yaml").write_text("model_type: deq_transformer\nsolver: picard\nmax_step: 3\n")
    with pytest.raises(ValueError, match=r"unknown names \['max_step'\]"):
        parse([str(tmp_path / "mine.yaml"), "--model_type", "llama"])


@pytest.mark.parametrize("name, value, known", [("task", "chess", "copy_memory"), ("model_type", "gpt3", "gpt2")])
def test_a_recipe_with_an_unknown_choice_says_what_there_is(tmp_path, name, value, known):
    (tmp_path / "mine.yaml").write_text(f"{name}: {value}\n")
    with pytest.raises(ValueError, match=f"{name} must be one of .*'{known}'.*, got '{value}'"):
        parse([str(tmp_path / "mine.yaml")])


def test_a_recipe_of_an_explicit_baseline_is_read_as_it_is(tmp_path):
    """What it says of a solver is refused later, and not left out silently."""
    (tmp_path / "mine.yaml").write_text("model_type: llama\nshallow_steps: 3\n")
    assert parse([str(tmp_path / "mine.yaml")])[1].shallow_steps == 3


def test_an_explicit_baseline_trains_and_its_recipe_is_the_run(corpus, tmp_path):
    flags = ["--model_type", "gpt2", "--n_embd", 32, "--n_layer", 1, "--n_head", 2, "--n_positions", 32]
    flags += ["--vocab_size", 300, "--sequence_length", 16, "--max_steps", 5, "--sample_tokens", 8, "--num_threads", 1]
    finished = script("train.py", "--corpus", corpus, "--output_dir", tmp_path / "one", *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "sample:\nThe " in finished.stdout and "640 tokens in" in finished.stdout
    again = script("train.py", tmp_path / "one" / "recipe.yaml", "--output_dir", tmp_path / "two")
    assert again.returncode == 0, again.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two"))
    assert one["validation_perplexity"] == two["validation_perplexity"]
    generated = script("generate.py", tmp_path / "one", "--prompt", "sentence", "--max_new_tokens", 3)
    assert generated.returncode == 0 and "3 tokens in" in generated.stderr, generated.stderr[-2000:]
    assert "evaluations" not in generated.stderr
    generated = script("generate.py", tmp_path / "one", "--prompt", "s", "--max_new_tokens", 100)
    limit = "n_positions=32 must cover what the prompt and max_new_tokens need (100): lower max_new_tokens"
    assert generated.returncode == 1 and limit in generated.stderr
    flags = ["--budgets", 3, "--tolerances", 0.3, "--batch_size", 9, "--output", tmp_path / "new" / "results.json"]
    evaluated = script("evaluate.py", tmp_path / "one", *flags)  # the sweeps give all their models the same flags
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert json.loads((tmp_path / "new" / "results.json").read_text())["arguments"] == {"batch_size": 9}


def test_the_folder_of_results_is_there_before_they_are_measured(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(evaluate, "evaluate_dial", lambda *arguments: pytest.fail("measured in vain"))
    finished = script("evaluate.py", trained[0], "--output", tmp_path / "file" / "results.json")
    assert finished.returncode == 1 and "file" in finished.stderr and "Traceback" not in finished.stderr


def test_a_trellisnet_goes_through_the_same_scripts(corpus, tmp_path):
    flags = ["--model_type", "deq_trellisnet", "--cutoffs", 50, 150, "--carry_memory", "true"]
    finished = script("train.py", "--corpus", corpus, "--output_dir", tmp_path, *TINY_TRELLISNET, *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "16 streams in segments of 16, memory carried" in finished.stdout
    assert json.loads((tmp_path / "config.json").read_text())["cutoffs"] == [50, 150]
    finished = script("evaluate.py", tmp_path, "--length", 16, "--tolerances", 1e-3, "--budgets", 1)
    assert "16 streams in segments of 16, memory carried" in finished.stdout, finished.stderr[-2000:]
    finished = script("evaluate.py", tmp_path, "--length", 16, "--tolerances", 1e-3, "--carry_memory", "false")
    assert "windows of 16, stride 8" in finished.stdout, finished.stderr[-2000:]
    finished = script("generate.py", tmp_path, "--prompt", "sentence number", "--max_new_tokens", 6)
    assert finished.stdout.startswith("sentence number"), finished.stderr[-2000:]


def test_a_checkpoint_of_the_authors_code_becomes_a_model_folder(tmp_path):
    reference = ROOT.parent / "shared" / "reference" / "transformer_adaptive"
    if not reference.is_dir():
        pytest.skip("the reference implementation's tensors are not distributed with the package")
    arguments = json.loads((reference / "config.json").read_text())["constructor"]
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    flags = ["--family", "deq_transformer", "--arguments", tmp_path / "arguments.json", "--output_dir"]
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save(load_file(reference / "model.safetensors"), checkpoint)
    for file, out in ((reference / "model.safetensors", tmp_path / "one"), (checkpoint, tmp_path / "other")):
        finished = script("convert_checkpoint.py", file, *flags, out)
        assert finished.returncode == 0 and "deq_transformer of 18,954 parameters" in finished.stdout, finished.stderr
        assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == 18_954
    card = ModelCard.load(tmp_path / "one" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and "18,954 parameters" in card.text
    finished = script("convert_checkpoint.py", checkpoint, *flags, tmp_path / "one")
    assert finished.returncode == 1 and "one' is not empty: choose another folder" in finished.stderr
    flags.append(tmp_path / "new")
    torch.save(torch.nn.Linear(2, 2), checkpoint)
    finished = script("convert_checkpoint.py", checkpoint, *flags)
    assert finished.returncode != 0 and "not a file of tensors alone" in finished.stderr
    finished = script("convert_checkpoint.py", tmp_path / "missing.pt", *flags)
    assert "error: there is no checkpoint" in finished.stderr
    (tmp_path / "arguments.json").write_text(json.dumps(arguments | {"n_token": 300}))
    finished = script("convert_checkpoint.py", reference / "model.safetensors", *flags)
    assert finished.returncode != 0 and "crit.out_layers.2.bias is (100,), but should be (200,)" in finished.stderr


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors"])
def test_a_folder_of_an_attractor_model_becomes_a_model_folder(tmp_path, name):
    reference = ROOT.parent / "shared" / "reference" / "attractor_anderson"
    if not reference.is_dir():
        pytest.skip("the reference implementation's tensors are not distributed with the package")
    arguments = json.loads((reference / "config.json").read_text())["constructor"]
    folder, out = tmp_path / "theirs", tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(arguments))
    state_dict = load_file(reference / "model.safetensors")
    save = {"model.safetensors": save_file, "model.pt": torch.save}.get(name, lambda s, f: torch.save({"model": s}, f))
    save(state_dict, folder / name)
    finished = script("convert_checkpoint.py", folder, "--family", "attractor", "--output_dir", out)
    assert finished.returncode == 0 and "deq_attractor of 33,056 parameters" in finished.stdout, finished.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
    (folder / name).unlink()
    finished = script("convert_checkpoint.py", folder, "--family", "attractor", "--output_dir", tmp_path / "other")
    assert "holds none of model.safetensors, model.pt, pytorch_model.bin" in finished.stderr


def test_a_decoder_becomes_a_model_folder_and_no_folder_is_written_over(trained, tmp_path):
    folder, out, flags = tmp_path / "llama", tmp_path / "out", ["--num_prelude_layers", 1, "--output_dir"]
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained[0]).save_pretrained(folder)
    out.mkdir()
    (out / ".training").touch()  # the lock of a training that was refused
    finished = script("retrofit.py", folder, *flags, out)
    assert finished.returncode == 0 and "deq_attractor of" in finished.stdout, finished.stderr
    assert AutoModelForCausalLM.from_pretrained(out).config.num_prelude_layers == 1
    for full in (folder, out, trained[0]):
        before = {file: file.stat().st_mtime_ns for file in full.iterdir()}
        finished = script("retrofit.py", folder, *flags, full)
        assert finished.returncode == 1, finished.stdout
        assert f"error: output_dir {str(full)!r} is not empty: choose another folder" in finished.stderr
        assert {file: file.stat().st_mtime_ns for file in full.iterdir()} == before


def test_copy_memory_goes_through_the_same_scripts(tmp_path, monkeypatch):
    flags = ["--hidden_size", 16, "--intermediate_size", 16, "--max_steps", 5, "--warmup_steps", 1, "--num_threads", 1]
    flags += ["--copy_delay", 2, "--copy_variant", "tcn", "--output_dir", tmp_path, "--batch_size", 4]
    finished = script("train.py", "--task", "copy_memory", *flags)
    assert "of the symbols recalled" in finished.stdout and "recalled  [" in finished.stdout, finished.stderr[-2000:]
    finished = script("evaluate.py", tmp_path, "--tolerances", 1e-3, "--budgets", 1)
    assert "copy memory, variant 'tcn', delay 2" in finished.stdout, finished.stderr[-2000:]
    assert "recalled" in finished.stdout and "tolerance 0.001" in finished.stdout
    for name, flags in (("generate.py", []), ("plot_convergence.py", ["--text", "a b"])):
        finished = script(name, tmp_path, *flags)
        assert finished.returncode == 1 and f"error: '{tmp_path}' has no tokenizer" in finished.stderr
    (tmp_path / "recipe.yaml").write_text("task: copy_memory\n")
    monkeypatch.setitem(VARIANTS, "deq", (20, 10))  # fewer examples than there are
    finished = script("evaluate.py", tmp_path, "--tolerances", 1, "--budgets", 1)
    assert "copy memory, variant 'deq', delay 400" in finished.stdout, finished.stderr[-2000:]


def test_ctrl_c_saves_and_leaves(corpus, tmp_path):
    """The real thing: another process, a real interrupt in the middle of a step."""
    flags = [*TINY, "--max_steps", "100000", "--logging_steps", "1"]
    command = [sys.executable, ROOT / "scripts" / "train.py", "--corpus", corpus, "--output_dir", tmp_path, *flags]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "continue with --resume" in printed
    (file,) = tmp_path.glob("checkpoints/step-*/run.json")
    saved = json.loads(file.read_text())
    assert saved["step"] == metrics.read_text().count("\n")


def test_the_console_command_finds_its_commands(monkeypatch, capsys):
    def hf_deq(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-deq", *arguments])
        commands.main()

    hf_deq("--help")
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("train", "evaluate", "generate", "serve", "convert", "push", "plot"))
    for name in commands.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            hf_deq(name, "--help")
        assert not stop.value.code and f"usage: hf-deq {name}" in capsys.readouterr().out.replace("Usage", "usage")
    with pytest.raises(SystemExit, match="there is no command 'trian'"):
        hf_deq("trian")


def test_the_server_finds_every_model(monkeypatch):
    monkeypatch.setattr(serve, "serve", lambda: None)
    classes = [model_class.__name__ for model_class in DEQForCausalLM.__subclasses__()]
    for name in classes:
        monkeypatch.delattr(serve.transformers, name, raising=False)
    serve.main()
    assert len(classes) == 3 and all(hasattr(sys.modules["transformers"], name) for name in classes)


def test_training_runs_as_a_module(monkeypatch, capsys):
    """As `accelerate launch -m hf_deq.training` does it."""
    monkeypatch.setattr(sys, "argv", ["hf_deq.training", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("hf_deq.training", run_name="__main__")
    assert not stop.value.code and "--shallow_steps" in capsys.readouterr().out


def test_recipes_go_by_name_and_broken_ones_are_refused(tmp_path):
    _, run, fields, model_type = parse(["deq-trellisnet-tiny", "--max_steps", "7"])
    assert (run.max_steps, model_type) == (7, "deq_trellisnet") and fields["hidden_size"] > 0
    finished = script("train.py", "deq-transformer-huge")
    assert "there is no recipe 'deq-transformer-huge': name a file, or one of deq-attractor-140m," in finished.stderr
    for content, message in (
        ("- a\n- list\n", "must be lines of `name: value`, but it is a list"),
        ("a: [", "not YAML"),
        ("corpus: caf\udce9", f"the recipe {tmp_path / 'recipe.yaml'} is not YAML: 'utf-8' codec can't decode"),
        ("task: [a]", "task must be one of"),
        ("init_from: 3", "init_from: there is no folder '3' here"),
    ):
        (tmp_path / "recipe.yaml").write_text(content, errors="surrogateescape")
        finished = script("train.py", tmp_path / "recipe.yaml")
        assert message in finished.stderr and "Traceback" not in finished.stderr
