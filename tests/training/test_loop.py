"""The training loop learns, resumes exactly, does not depend on the number of processes, and refuses bad input."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from families import TRANSFORMER, TRELLISNET
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_deq import DEQTransformerForCausalLM, DEQTransformerModel, DEQTrellisNetForCausalLM
from hf_deq.evaluation import HeldOutText
from hf_deq.tasks import CopyMemoryArguments, LanguageModelingArguments, StateTracking, StateTrackingArguments
from hf_deq.training import Interrupted, RunArguments, log, loop, train
from hf_deq.training.log import parse_metrics
from hf_deq.training.models import model_kind, parameter_groups
from hf_deq.training.optimizers import make_optimizer, make_schedule

SCRIPTS = Path(__file__).parents[2] / "scripts"

MODEL = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=2,
    solver_tolerance=1e-3,
)
MODELS = {
    "deq_transformer": MODEL,
    "deq_trellisnet": {name: value for name, value in MODEL.items() if name != "num_attention_heads"},
    "deq_attractor": MODEL | {"num_hidden_layers": 2, "num_prelude_layers": 1},
    "gpt2": dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}
both = pytest.mark.parametrize("model_type", ["deq_transformer", "deq_trellisnet"])
# The weight-tied explicit twin of a deep equilibrium model.
UNROLLED = dict(gradient="unrolled", solver_max_evaluations=3)
SOLVER_COLUMN = re.compile("evaluations|residual|converged|jacobian")
# With these, training carries a memory over segments.
REMEMBERING = {
    "deq_transformer": dict(carry_memory=True, model=dict(memory_length=16)),
    "deq_trellisnet": dict(carry_memory=True),
}
# Solved so well that runs which differ by rounding only do not drift apart visibly.
TIGHT = dict(max_steps=6, train_solver_tolerance=1e-6, shallow_steps=3, model=dict(backward_tolerance=1e-6))
DATA = dict(sequence_length=16, sample_tokens=0)
TRAINING = dict(
    max_steps=12,
    batch_size=8,
    warmup_steps=2,
    logging_steps=1,
    learning_rate=1e-2,
    num_threads=1,  # other tests run on the other cores
)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps one state per Python process; every run here starts its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text with structure: counting in words."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    file = tmp_path_factory.mktemp("corpus") / "counting.txt"
    file.write_text("\n\n".join(" ".join(words[int(digit)] for digit in str(n)) + " is " + str(n) for n in range(700)))
    return str(file)


def run(corpus, folder, model=None, model_type="deq_transformer", **how):
    """Train; `how` has names of the run and of the task."""
    named = DATA | TRAINING | {"output_dir": str(folder), "shallow_steps": 0 if model_type == "gpt2" else 4} | how
    of_task = {field.name for field in fields(LanguageModelingArguments)}
    task = LanguageModelingArguments(corpus, **{name: value for name, value in named.items() if name in of_task})
    arguments = RunArguments(**{name: value for name, value in named.items() if name not in of_task})
    return train(task, arguments, MODELS[model_type] | (model or {}), model_type)


def losses(folder) -> dict[int, float]:
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def interrupt_at(step, monkeypatch):
    """Send ourselves an interrupt when the optimizer takes its step of that number."""
    plain, taken = torch.optim.AdamW.step, []

    def counting(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == step:
            signal.raise_signal(signal.SIGINT)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counting)


@both
def test_learns_reports_and_saves(model_type, corpus, tmp_path, capsys):
    report = run(corpus, tmp_path, None, model_type, max_steps=60, logging_steps=20, sample_tokens=5, eval_steps=40)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert report == lines[-1]
    assert lines[0]["loss"] > 1.5 * lines[-2]["loss"]
    assert {"backward_evaluations", "forward_evaluations", "residual", "tokens_per_second", "gradient_norm"} <= lines[
        -2
    ].keys()
    assert any("validation_perplexity" in line for line in lines[:-1])
    assert report["validation_bits_per_byte"] < report["bits_per_byte_unigram"]
    assert report["validation_num_evaluations"] > 1 and report["num_processes"] == 1
    printed = capsys.readouterr().out
    assert "bits per byte" in printed and f'from_pretrained("{tmp_path}")' in printed and "sample:\nThe " in printed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == model_type and len(tokenizer) == model.config.vocab_size == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None


def test_the_progress_bar_shows_the_course_of_the_evaluations():
    """As far as the terminal can say it, and in 100 columns."""
    line = {"loss": 4.9123, "perplexity": 136.02, "residual": 0.021, "tokens_per_second": 12345.6, "step": 50}
    say, plainly = log.Summary("utf-8"), [log.Summary(name) for name in (None, "cp1252", "cp437")]
    for evaluations in (2.0, 9.0, 2.0, 4.0, 5.5, 9.0, 7.5, 9.04):  # two more than are shown
        course = {"forward_evaluations": evaluations, "backward_evaluations": 8.1}
        said, plain = say(line | course), {summary(line | course) for summary in plainly}
    assert said == "loss 4.91 ppl 136 evals 9.0 ▁▃▄█▆█ back 8.1 res 2e-02 12346 tok/s"
    assert plain == {said.replace(" ▁▃▄█▆█", "")}
    assert say(line) == "loss 4.91 ppl 136 res 2e-02 12346 tok/s"  # an explicit model's has no evaluations
    bar = tqdm.format_meter(1000, 2000, 800, ncols=100, bar_format=log.BAR, postfix=said)
    assert len(bar) <= 100 and bar.startswith(" 50%|") and bar.endswith("[13:20<13:20, " + said + "]")


def test_a_sparkline_does_not_magnify_noise():
    assert log.sparkline([5.0, 5.02, 5.0]) == "▁▁▁" and log.sparkline([]) == ""
    assert log.sparkline([1, 8, 4.5, 2]) in ("▁█▄▂", "▁█▅▂")


def test_an_explicit_model_takes_the_same_steps(corpus, tmp_path, capsys):
    """GPT-2 learns by the same loop, and nothing is said of a solver it does not have."""
    how = dict(max_steps=60, logging_steps=20, eval_steps=40, sample_tokens=5)
    report = run(corpus, tmp_path, None, "gpt2", **how)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert report == lines[-1] and lines[0]["loss"] > 1.5 * lines[-2]["loss"]
    assert {"step", "loss", "perplexity", "learning_rate", "gradient_norm", "tokens_per_second"} == lines[0].keys()
    assert any("validation_perplexity" in line for line in lines[:-1])
    assert not [name for line in lines for name in line if SOLVER_COLUMN.search(name)]
    assert report["validation_bits_per_byte"] < report["bits_per_byte_unigram"]
    captured = capsys.readouterr()
    assert "sample:\nThe " in captured.out and "equilibrium" not in captured.out
    assert "evals" not in captured.err and "tok/s" in captured.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == "gpt2" and model.config.vocab_size == 300
    assert model.config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_a_paused_clock_stands_still(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    clock = log.Clock()
    assert clock.seconds() == 1
    with clock.paused() as seconds:
        assert seconds == clock.seconds() == clock.seconds() == 2
        next(ticks)
    assert clock.seconds() == 3
    with suppress(KeyError), clock.paused():
        raise KeyError
    assert clock.seconds() == 5


@pytest.mark.parametrize("model_type", MODELS)
def test_size_tokens_and_time_are_reported(model_type, corpus, tmp_path, capsys, monkeypatch):
    """Time is that of training, without the validations in between, which take hours here."""
    score, hours = HeldOutText.score, []
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 3600 * len(hours))

    def slow(*args, **kwargs):
        hours.append(1)
        return score(*args, **kwargs)

    monkeypatch.setattr(log, "time", clock)
    monkeypatch.setattr(HeldOutText, "score", slow)
    report = run(corpus, tmp_path, None, model_type, max_steps=4, eval_steps=1, save_steps=2)
    assert len(hours) == 4 and 0 < report["seconds"] < 3600
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 1 for line in lines if "loss" in line)
    times = [line["seconds"] for line in lines if "validation_perplexity" in line]
    assert len(times) == 4 and times == sorted(times) and times[-1] == report["seconds"]
    saved = json.loads((tmp_path / "checkpoints" / "step-00000004" / "run.json").read_text())
    assert 0 < saved["seconds"] <= report["seconds"]
    size = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    assert (report["num_parameters"], report["num_tokens"]) == (size, 4 * 8 * 16)
    assert f"training: {size:,} parameters, 512 tokens in 0." in capsys.readouterr().out


@pytest.mark.parametrize("model_type", MODELS)
def test_the_loss_is_the_cross_entropy_of_the_labels_given(model_type):
    """The labels of the loop belong to the inputs of the same place: nothing shifts them again."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type])).eval()
    ids = torch.randint(300, (3, 17))
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[0, -4:] = -100
    outputs = model(inputs, labels=labels, shift_labels=labels, use_cache=False)
    counted = labels != -100
    picked = outputs.logits.log_softmax(-1)[counted].gather(1, labels[counted][:, None])
    torch.testing.assert_close(outputs.loss, -picked.mean())


@both
def test_the_unrolled_twin_trains(model_type, corpus, tmp_path):
    """Weight-tied layers without an equilibrium: validation and the sample do without a cache."""
    run(
        corpus,
        tmp_path,
        UNROLLED,
        model_type,
        shallow_steps=0,
        max_steps=40,
        logging_steps=20,
        eval_steps=20,
        sample_tokens=3,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if "loss" in line)
    assert last["loss"] < 0.8 * first["loss"] and last["forward_evaluations"] == 3
    assert lines[-1]["validation_num_evaluations"] == 3 and "backward_evaluations" not in last


def test_a_model_that_is_never_solved_refuses_shallow_steps(corpus, tmp_path):
    """It would train at another depth than it is used with."""
    with pytest.raises(ValueError, match='shallow_steps=4 would train with 2 .* gradient="unrolled" always uses 3'):
        run(corpus, tmp_path, UNROLLED)


def test_shallow_pretraining_switches_to_the_equilibrium(corpus, tmp_path):
    run(corpus, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:-1]
    assert [line["forward_evaluations"] for line in lines[:4]] == [2.0] * 4
    assert all(line["forward_evaluations"] > 2 and "backward_evaluations" in line for line in lines[4:])
    assert not any("backward_evaluations" in line for line in lines[:4])


@pytest.mark.parametrize(
    "model_type, remember, interrupted_at, logging_steps",
    [
        ("deq_transformer", False, 2, 1),
        ("deq_transformer", True, 9, 5),
        ("deq_trellisnet", True, 2, 1),
        pytest.param("deq_trellisnet", False, 9, 5, marks=pytest.mark.slow),
        pytest.param("deq_transformer", False, 9, 5, marks=pytest.mark.slow),
        pytest.param("deq_transformer", True, 2, 1, marks=pytest.mark.slow),
        pytest.param("deq_trellisnet", True, 9, 5, marks=pytest.mark.slow),
    ],
)
def test_interrupt_saves_and_resume_continues_exactly(
    corpus, tmp_path, monkeypatch, model_type, remember, interrupted_at, logging_steps
):
    """Across the switch from shallow pretraining, with dropout, a random Jacobian penalty and a carried memory."""
    model = dict(hidden_dropout=0.1, embedding_dropout=0.1, jacobian_loss_weight=0.1, jacobian_loss_frequency=0.5)
    how = dict(REMEMBERING[model_type]) if remember else {}
    how |= dict(model_type=model_type, logging_steps=logging_steps, gradient_accumulation_steps=2)
    how["model"] = model | how.get("model", {})
    whole = run(corpus, tmp_path / "whole", **how)
    AcceleratorState._reset_state(True)
    interrupt_at(interrupted_at, monkeypatch)
    with pytest.raises(Interrupted, match=f"stopped at step {interrupted_at} of 12.*--resume"):
        run(corpus, tmp_path / "parts", **how)
    monkeypatch.undo()
    AcceleratorState._reset_state(True)
    resumed = run(corpus, tmp_path / "parts", **how, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert resumed["validation_perplexity"] == whole["validation_perplexity"]
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / part).state_dict() for part in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_trackers_get_plain_values(tmp_path, monkeypatch):
    """TensorBoard refuses lists."""
    given = {}
    monkeypatch.setattr(
        loop, "Accelerator", lambda **how: SimpleNamespace(init_trackers=lambda name, config: given.update(config))
    )
    arguments = RunArguments(
        str(tmp_path), lr_scheduler_type="multistep", lr_milestones=[1, 2], report_to="tensorboard"
    )
    loop._start_trackers(loop._make_accelerator(arguments, tmp_path), arguments)
    assert given["lr_milestones"] == "[1, 2]" and given["batch_size"] == arguments.batch_size
    assert all(isinstance(value, int | float | str) for value in given.values())


def test_validations_change_nothing_in_a_run(tmp_path):
    """With dropout, on examples that a loader brings: it must not draw from the state that the masks are drawn from."""
    model = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, hidden_dropout=0.3)
    how = dict(max_steps=4, logging_steps=1, batch_size=4, warmup_steps=0, num_threads=1)
    for steps in (0, 1):
        AcceleratorState._reset_state(True)
        arguments = RunArguments(output_dir=str(tmp_path / str(steps)), eval_steps=steps, **how)
        train(StateTrackingArguments(word_length=4), arguments, model)
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_an_explicit_model_resumes_exactly(corpus, tmp_path, monkeypatch, logging_steps):
    how = dict(model_type="gpt2", logging_steps=logging_steps, gradient_accumulation_steps=2)  # and GPT-2's dropout
    whole = run(corpus, tmp_path / "whole", **how)
    AcceleratorState._reset_state(True)
    interrupt_at(7, monkeypatch)
    with pytest.raises(Interrupted, match="stopped at step 7 of 12.*--resume"):
        run(corpus, tmp_path / "parts", **how)
    monkeypatch.undo()
    AcceleratorState._reset_state(True)
    resumed = run(corpus, tmp_path / "parts", **how, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert resumed["validation_perplexity"] == whole["validation_perplexity"]
    assert resumed["num_tokens"] == whole["num_tokens"] == 12 * 8 * 16


def test_resume_forgets_steps_after_the_checkpoint(corpus, tmp_path):
    run(corpus, tmp_path, save_steps=8)
    first = losses(tmp_path)
    AcceleratorState._reset_state(True)
    run(corpus, tmp_path, save_steps=8, resume=True)
    assert losses(tmp_path) == first and list(losses(tmp_path)) == list(range(1, 13))


def test_a_finished_run_that_is_resumed_reports_once(corpus, tmp_path):
    for resume in (False, True):
        AcceleratorState._reset_state(True)
        run(corpus, tmp_path, save_steps=6, eval_steps=6, resume=resume)
    lines = parse_metrics((tmp_path / "metrics.jsonl").read_text())
    assert [line["step"] for line in lines if "validation_perplexity" in line] == [6, 12]


def test_the_recipe_forgets_what_belongs_to_one_start(corpus, tmp_path):
    """A run by the recipe of an overwritten run would overwrite it unasked."""
    for how in ({}, {"overwrite": True}, {"resume": True}):
        AcceleratorState._reset_state(True)
        run(corpus, tmp_path, save_steps=12, **how)
        assert {"overwrite", "resume"}.isdisjoint(yaml.safe_load((tmp_path / "recipe.yaml").read_text()))


def test_a_training_without_a_solved_step_is_said(corpus, tmp_path, caplog):
    run(corpus, tmp_path, shallow_steps=12)
    assert "shallow_steps=12 covers all of max_steps=12: no step" in caplog.text


@pytest.mark.parametrize("gradient, is_said", [("unrolled", True), ("reversible", True), ("implicit", False)])
def test_a_tolerance_that_no_step_is_solved_to_is_said(tmp_path, gradient, is_said, caplog):
    task = StateTracking(StateTrackingArguments("parity", 4), {})
    config = TRANSFORMER.config(gradient=gradient, solver_damping=1.0)
    model_kind(config, RunArguments(str(tmp_path), train_solver_tolerance=1e-2)).check(task)
    assert ("train_solver_tolerance=0.01 has no effect" in caplog.text) == is_said


def test_a_half_written_line_blocks_neither_a_resume_nor_a_fresh_run(corpus, tmp_path, caplog):
    """A run that is killed while it writes its metrics leaves a part of a line, here in the middle and at the end."""
    run(corpus, tmp_path, save_steps=8)
    first, metrics = losses(tmp_path), tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    for resume in (True, False):
        metrics.write_text("".join([*lines[:3], '{"step": 4, "lo', *lines[4:], '{"step"']))
        assert len(parse_metrics(metrics.read_text())) == len(lines) - 2
        AcceleratorState._reset_state(True)
        run(corpus, tmp_path, save_steps=8, resume=resume, overwrite=not resume)
        assert "2 line(s) of metrics.jsonl are not whole" in caplog.text
        lost = (4, 5) if resume else ()  # the half line took the next one with it
        assert losses(tmp_path) == {step: loss for step, loss in first.items() if step not in lost}


def test_the_same_seed_is_the_same_run_and_another_is_not(corpus, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        AcceleratorState._reset_state(True)
        run(corpus, tmp_path / name, seed=seed, max_steps=4)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


@pytest.mark.parametrize("carry_memory", [False, True])
def test_accumulation_does_not_change_the_run(corpus, tmp_path, carry_memory):
    how = dict(TIGHT, carry_memory=carry_memory, model_type="deq_trellisnet" if carry_memory else "deq_transformer")
    for pieces in (1, 4):
        AcceleratorState._reset_state(True)
        run(corpus, tmp_path / str(pieces), **how, gradient_accumulation_steps=pieces)
    one, four = losses(tmp_path / "1"), losses(tmp_path / "4")
    assert len(one) == 6
    assert list(four.values()) == pytest.approx(list(one.values()), rel=1e-4)


@pytest.mark.parametrize(
    "model_type, remember",
    [pytest.param("deq_transformer", False, marks=pytest.mark.slow), ("deq_trellisnet", True)],
)
def test_two_processes_take_the_steps_of_one(corpus, tmp_path, model_type, remember):
    how = dict(TIGHT, carry_memory=remember, model_type=model_type)
    flags = {**TRAINING, **DATA, **MODELS[model_type], **TIGHT["model"], **how, "corpus": corpus}
    del flags["model"]
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(SCRIPTS / "train.py"), *arguments, "--output_dir", str(tmp_path / "two")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[-1])
    assert two["num_processes"] == 2
    one = run(corpus, tmp_path / "one", **how)
    assert one["num_processes"] == 1
    assert list(losses(tmp_path / "two").values()) == pytest.approx(list(losses(tmp_path / "one").values()), rel=1e-4)
    assert two["validation_perplexity"] == pytest.approx(one["validation_perplexity"], rel=1e-3)


def test_mixed_precision_trains(corpus, tmp_path, monkeypatch):
    embed, seen = DEQTransformerModel._embed, set()

    def embedding(self, *arguments):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return embed(self, *arguments)

    monkeypatch.setattr(DEQTransformerModel, "_embed", embedding)
    run(corpus, tmp_path, mixed_precision="bf16", max_steps=30, train_solver_tolerance=1e-2)
    assert losses(tmp_path)[30] < 0.8 * losses(tmp_path)[1]
    assert (True, True) in seen and (True, False) not in seen


def test_gradients_are_clipped(corpus, tmp_path):
    """A single step of SGD at a rate of 1 moves the weights by the length of the clipped gradient."""
    weights = []
    for limit in (1e-3, 3e-3):
        AcceleratorState._reset_state(True)
        how = dict(optimizer="sgd", learning_rate=1.0, weight_decay=0.0, warmup_steps=0, max_steps=1)
        run(corpus, tmp_path / str(limit), **how, lr_scheduler_type="constant", max_grad_norm=limit)
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / str(limit)).state_dict())
    moved = sum((weights[1][name] - weights[0][name]).square().sum() for name in weights[0] if name != "lm_head.weight")
    assert moved.sqrt() == pytest.approx(2e-3, rel=0.02)


def test_an_existing_tokenizer_is_used(corpus, tmp_path):
    run(corpus, tmp_path / "first", max_steps=1)
    AcceleratorState._reset_state(True)
    run(corpus, tmp_path / "second", {"vocab_size": 999}, max_steps=1, tokenizer=str(tmp_path / "first"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second").config.vocab_size == 300
    assert yaml.safe_load((tmp_path / "second" / "recipe.yaml").read_text())["vocab_size"] == 300
    with pytest.raises(ValueError, match="tokenizer=.* is what --overwrite would remove"):
        run(corpus, tmp_path / "first", overwrite=True, tokenizer=str(tmp_path / "first"))


def test_bad_input_is_refused_before_training(corpus, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"output_dir .*cannot be written to.*choose another"):
        run("no such corpus.txt", tmp_path / "file" / "below")  # checked before the corpus is looked for
    with pytest.raises(ValueError, match="less than one sequence of 100000"):
        run(corpus, tmp_path / "a", sequence_length=100_000)
    with pytest.raises(ValueError, match="batch_size=8 must be divisible by gradient_accumulation_steps"):
        run(corpus, tmp_path / "a", gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="carry_memory needs a model that remembers.*: set memory_length"):
        run(corpus, tmp_path / "a", carry_memory=True)
    with pytest.raises(
        ValueError, match="carry_memory needs a model that remembers.*deq_attractor does not: set carry_memory to"
    ):
        run(corpus, tmp_path / "a", None, "deq_attractor", carry_memory=True)
    with pytest.raises(ValueError, match="less than one for each of 4096 streams"):
        run(corpus, tmp_path / "a", None, "deq_trellisnet", carry_memory=True, batch_size=4096)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        run(corpus, tmp_path / "a", resume=True)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        run(corpus, tmp_path / "a", max_steps=0)
    with pytest.raises(ValueError, match="mixed_precision must be one of no, fp16, bf16, got False"):
        run(corpus, tmp_path / "a", mixed_precision=False)
    with pytest.raises(ValueError, match="sample_prompt is empty"):
        run(corpus, tmp_path / "a", sample_prompt="", sample_tokens=3)
    with pytest.raises(ValueError, match="learning_rate must not be negative"):
        run(corpus, tmp_path / "a", learning_rate=-1.0)


def test_explicit_models_refuse_what_they_cannot_do(corpus, tmp_path):
    explicit = dict(folder=tmp_path, model_type="gpt2")
    with pytest.raises(
        ValueError,
        match="n_positions=64 must cover the training sequences .sequence_length. .65.: raise n_positions to 65",
    ):
        run(corpus, **explicit, sequence_length=65)
    with pytest.raises(ValueError, match="n_positions=64 must cover the sample's prompt and sample_tokens"):
        run(corpus, **explicit, sample_tokens=64)
    with pytest.raises(
        ValueError, match="carry_memory needs a model that remembers.*gpt2 does not: set carry_memory to"
    ):
        run(corpus, **explicit, carry_memory=True)
    with pytest.raises(ValueError, match="train_solver_tolerance is for models that solve"):
        run(corpus, **explicit, train_solver_tolerance=1e-2)
    with pytest.raises(ValueError, match="shallow_steps is for models that solve"):
        run(corpus, **explicit, shallow_steps=2)


def test_an_explicit_model_learns_any_task(tmp_path):
    arguments = RunArguments(**(TRAINING | {"output_dir": str(tmp_path), "max_steps": 30}))
    sizes = {name: value for name, value in MODELS["gpt2"].items() if name != "vocab_size"}  # that of the task
    report = train(CopyMemoryArguments(copy_delay=3, copy_variant="tcn"), arguments, sizes, "gpt2")
    assert losses(tmp_path)[30] < 0.5 * losses(tmp_path)[1] and report["validation_loss"] < 1.5
    assert not [name for name in report if SOLVER_COLUMN.search(name)]


def test_resume_refuses_another_config(corpus, tmp_path):
    run(corpus, tmp_path, save_steps=6, max_steps=6)
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match=r"other arguments \(hidden_size: 32 -> 64, learning_rate: 0.01 -> 0.02\)"):
        run(corpus, tmp_path, max_steps=6, resume=True, learning_rate=0.02, model={"hidden_size": 64})


def test_weight_decay_spares_what_is_not_a_map():
    def decayed(model):
        groups = parameter_groups(model, 0.1)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        return {names[id(parameter)].split(".", 3)[-1] for parameter in groups[0]["params"]}

    parts = {f"{name}.{part}" for name in ("injection", "recurrence") for part in ("magnitude", "direction")}
    assert decayed(TRELLISNET.model(cutoffs=[20], tie_word_embeddings=False)) == parts
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **MODELS["gpt2"] | {"n_layer": 1}))
    assert decayed(gpt2) == {f"{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert decayed(TRANSFORMER.model()) == {"injection.weight"} | {
        f"blocks.0.{name}.weight" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "up_proj", "down_proj")
    }


def learning_rates(steps=12, **training) -> list[float]:
    """Of each step."""
    arguments = RunArguments(learning_rate=1.0, max_steps=steps, **training)
    optimizer = make_optimizer(TRANSFORMER.model(), arguments)
    schedule, rates = make_schedule(optimizer, arguments), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules_of_the_learning_rate():
    cosine = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert learning_rates(warmup_steps=2) == pytest.approx([0, 0.5, *cosine])
    assert learning_rates(warmup_steps=2, lr_scheduler_type="constant") == [0, 0.5, *[1] * 10]
    decaying = dict(lr_scheduler_type="multistep", lr_milestones=[4, 9])
    assert learning_rates(warmup_steps=2, **decaying) == pytest.approx([0, 0.5, 1, 1, *[0.1] * 5, *[0.01] * 3])
    assert learning_rates(warmup_steps=0, **decaying)[0] == 1


def test_what_a_schedule_does_not_reach_is_said(caplog):
    decaying = dict(lr_scheduler_type="multistep", lr_milestones=[4, 11])
    learning_rates(warmup_steps=11, **decaying)
    assert not caplog.text
    learning_rates(warmup_steps=12, **decaying | {"lr_milestones": [4, 12, 13]})
    assert "warmup_steps=12 covers all of max_steps=12: no step has the full learning_rate" in caplog.text
    assert "lr_milestones=[12, 13] lie beyond max_steps=12" in caplog.text


@pytest.mark.parametrize(
    "training, reference",
    [
        (
            dict(weight_decay=0.3, adam_beta2=0.9),
            lambda model: torch.optim.AdamW(parameter_groups(model, 0.3), lr=0.1, betas=(0.9, 0.9)),
        ),
        (dict(weight_decay=0.0, optimizer="sgd"), lambda model: torch.optim.SGD(model.parameters(), lr=0.1)),
    ],
    ids=["adamw", "sgd"],
)
def test_optimizers_are_those_of_the_papers(training, reference):
    ours, theirs = TRANSFORMER.model(), TRANSFORMER.model()
    theirs.load_state_dict(ours.state_dict())
    arguments = RunArguments(learning_rate=0.1, **training)
    for model, optimizer in ((ours, make_optimizer(ours, arguments)), (theirs, reference(theirs))):
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.sin(parameter.detach() + step)
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_sgd_trains_and_resumes_in_the_middle_of_its_schedule(corpus, tmp_path):
    how = dict(optimizer="sgd", learning_rate=1.0, weight_decay=1e-6, save_steps=8)
    how |= dict(lr_scheduler_type="multistep", lr_milestones=[7, 10])

    def metrics():
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return [(line["loss"], line["learning_rate"]) for line in lines if "loss" in line]

    run(corpus, tmp_path, **how)
    whole = metrics()
    AcceleratorState._reset_state(True)
    run(corpus, tmp_path, **how, resume=True)
    assert metrics() == whole and whole[-1][0] < whole[0][0]
    assert [rate for _, rate in whole][-4:] == pytest.approx([0.1, 0.01, 0.01, 0.01])


@pytest.mark.parametrize(
    "training, message",
    [
        (dict(optimizer="adam"), "optimizer must be one of adamw, sgd, got 'adam'"),
        (
            dict(lr_scheduler_type="linear"),
            "lr_scheduler_type must be one of cosine, constant, multistep, got 'linear'",
        ),
        (dict(lr_scheduler_type="multistep"), 'lr_scheduler_type="multistep" needs lr_milestones'),
        (dict(lr_milestones=[3]), r"lr_milestones=\[3\] are for lr_scheduler_type='multistep', which is 'cosine'"),
        (dict(lr_scheduler_type="multistep", lr_milestones=[3, 3]), "lr_milestones must rise strictly"),
        (dict(lr_scheduler_type="multistep", lr_milestones=[0, 3]), "lr_milestones must rise strictly from 1"),
    ],
)
def test_optimizers_and_schedules_are_checked(training, message):
    with pytest.raises(ValueError, match=message):
        RunArguments(**training)


@both
def test_memory_goes_from_step_to_step(model_type, corpus, tmp_path, monkeypatch):
    """Every step is given what the step before it returned, and nothing where the streams start again."""
    given, returned = [], []
    model_class = {"deq_transformer": DEQTransformerForCausalLM, "deq_trellisnet": DEQTrellisNetForCausalLM}[model_type]
    plain = model_class.forward

    def noting(self, *args, memory=None, **kwargs):
        output = plain(self, *args, memory=memory, **kwargs)
        if self.training:
            given.append(memory)
            returned.append(output.memory)
        return output

    monkeypatch.setattr(model_class, "forward", noting)
    report = run(corpus, tmp_path, **REMEMBERING[model_type] | {"model_type": model_type}, batch_size=64, max_steps=20)
    blocks_per_row = len(given) // sum(memory is None for memory in given)
    assert 2 < blocks_per_row < 20 and report["validation_num_tokens"] > 0
    for step, memory in enumerate(given):
        if step % blocks_per_row == 0:
            assert memory is None
        else:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(memory, returned[step - 1], strict=True))


@pytest.mark.parametrize("model_type", ["deq_transformer", pytest.param("deq_trellisnet", marks=pytest.mark.slow)])
def test_copy_memory_trains(model_type, tmp_path, capsys):
    arguments = RunArguments(**(TRAINING | {"output_dir": str(tmp_path), "shallow_steps": 4, "max_steps": 40}))
    fields = {name: value for name, value in MODELS[model_type].items() if name != "vocab_size"}
    report = train(CopyMemoryArguments(copy_delay=3, copy_variant="tcn"), arguments, fields, model_type)
    assert losses(tmp_path)[40] < 0.5 * losses(tmp_path)[1]
    assert report["memoryless_loss"] == pytest.approx(10 * 2.0794 / 23, rel=1e-4)
    assert 0 < report["validation_loss"] < 1.5 and 0 < report["validation_recalled"] < 1
    printed = capsys.readouterr().out
    assert "10,000 training and 1,000 test sequences" in printed and "to recall [" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 10
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="vocab_size must be 10 for the task copy_memory, got 16: leave it out"):
        overwriting = replace(arguments, overwrite=True)
        train(
            CopyMemoryArguments(copy_delay=3, copy_variant="tcn"), overwriting, fields | {"vocab_size": 16}, model_type
        )
