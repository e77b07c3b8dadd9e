"""Engines of accelerate: sharded weights train as one process does, and what cannot train is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from families import every_family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_deq.commands.train import parse
from hf_deq.evaluation import in_step
from hf_deq.training import train
from hf_deq.training.engine import check_engine

WORKER = Path(__file__).with_name("sharded_worker.py")
USUAL = {
    **dict(hidden_size=32, intermediate_size=64, vocab_size=300, sequence_length=16, batch_size=8, warmup_steps=2),
    **dict(max_steps=20, save_steps=10, logging_steps=1, num_threads=1, sample_tokens=6, eval_steps=15),
    **dict(shallow_steps=5, train_solver_tolerance=1e-7, backward_tolerance=1e-7, learning_rate=1e-3),
}
RUNS = {
    "transformer": dict(num_attention_heads=2, weight_norm="true"),
    "memory": dict(num_attention_heads=2, carry_memory="true", memory_length=16, gradient_accumulation_steps=2),
    "trellisnet": dict(model_type="deq_trellisnet", carry_memory="true", cutoffs=50),
    "reversible": dict(num_attention_heads=2, weight_norm="true", gradient="reversible"),
    "loose": dict(num_attention_heads=2, weight_norm="true", train_solver_tolerance=0.3, backward_tolerance=0.3),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0),
}


def flags(corpus, folder, **how) -> list[str]:
    explicit = how.get("model_type") == "gpt2"
    names = {"corpus": corpus, "output_dir": folder} | USUAL | how | ({"attn_pdrop": 0} if explicit else {})
    of_a_deq = ("hidden_size", "intermediate_size", "shallow_steps", "train_solver_tolerance", "backward_tolerance")
    names = {name: value for name, value in names.items() if not (explicit and name in of_a_deq)}
    return [part for name, value in names.items() for part in (f"--{name}", str(value))]


def launch(words: list[str], processes: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    finished = subprocess.run(
        [*command, str(WORKER), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n\n".join(f"sentence number {n} is about the number {n}, nothing else" for n in range(300)))
    return str(file)


@pytest.fixture(scope="module")
def sharded(corpus, tmp_path_factory):
    """Every run with two processes that share the weights, and one that goes on from a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, how in RUNS.items():
        launch(flags(corpus, folder / name, **how))
    shutil.copytree(folder / "transformer", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step-00000020")
    launch(flags(corpus, folder / "resumed", **RUNS["transformer"], resume="true"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "loose"])
def test_sharded_weights_train_as_one_process_does(name, sharded, corpus, tmp_path):
    """Loss by loss; validation, sample and a whole safetensors folder at the end."""
    AcceleratorState._reset_state(True)
    train(*parse(flags(corpus, tmp_path, **RUNS[name])))
    AcceleratorState._reset_state(True)
    assert outcome(sharded / name)["outcome"] == "finished"
    ours, theirs = metrics(sharded / name), metrics(tmp_path)
    for one, other in zip(ours, theirs, strict=True):
        for key in other.keys() & {"loss", "validation_perplexity"}:
            assert one[key] == pytest.approx(other[key], rel=1e-5), (key, other["step"])
    assert ours[-1]["num_processes"] == 2 and theirs[-1]["num_processes"] == 1
    one, other = (load_file(folder / "model.safetensors") for folder in (sharded / name, tmp_path))
    assert one.keys() == other.keys() and all(one[key].shape == other[key].shape for key in one)
    ids = torch.arange(10)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (sharded / name, tmp_path)]
    torch.testing.assert_close(*(model(ids).logits for model in models), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_weights_are_gathered_once_for_a_solve_however_many_evaluations(sharded):
    exact, loose, unrolled = outcome(sharded / "transformer"), outcome(sharded / "loose"), 5
    many, few = (
        [line["forward_evaluations"] for line in metrics(sharded / name) if "loss" in line][unrolled:]
        for name in ("transformer", "loose")
    )
    assert min(many) > 2 * max(few)
    assert exact["gathered"] == loose["gathered"] and max(exact["gathered"]) == 3  # also in the shallow steps


@pytest.mark.slow
def test_a_sharded_checkpoint_is_resumed_exactly_or_refused(sharded, corpus, tmp_path):
    losses = [
        [line["loss"] for line in metrics(sharded / name) if "loss" in line] for name in ("transformer", "resumed")
    ]
    assert losses[0] == losses[1] and outcome(sharded / "resumed")["outcome"] == "finished"
    shutil.copytree(sharded / "transformer", tmp_path / "one")
    launch(flags(corpus, tmp_path / "one", **RUNS["transformer"], resume="true"), processes=1)
    assert "a run of 2 process(es), this one has 1" in outcome(tmp_path / "one")["outcome"]


@pytest.mark.slow
@every_family
def test_transformers_own_trainer_shards_them_too(family, tmp_path):
    family.model(solver_tolerance=1e-6, backward_tolerance=1e-6).float().save_pretrained(tmp_path / "model")
    for name, processes in (("two", 2), ("one", 1)):
        (tmp_path / name).mkdir()
        launch(["trainer", str(tmp_path / name), str(tmp_path / "model")], processes)
    two, one = outcome(tmp_path / "two"), outcome(tmp_path / "one")
    assert two["sharded"] and two["losses"] == pytest.approx(one["losses"], rel=1e-4)  # logged with four digits
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "saved").eval() for name in ("two", "one")]
    ids = torch.arange(10)[None]
    torch.testing.assert_close(*(model(ids).logits for model in models), rtol=0, atol=1e-3)


def accelerator(kind, **how):
    return SimpleNamespace(distributed_type=kind, num_processes=2, device=torch.device("cpu"), **how)


@pytest.mark.parametrize(
    "engine, message",
    [
        (accelerator(DistributedType.DEEPSPEED), "DeepSpeed .*Use FSDP2, which shards as well"),
        (accelerator(DistributedType.FSDP, is_fsdp2=False), "FSDP of version 1 .*add --fsdp_version 2"),
        (accelerator(DistributedType.MULTI_CPU), "does not shard on 2 process.* of cpu.*Leave --use_fsdp out"),
    ],
)
def test_engines_that_cannot_train_are_refused(engine, message, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=message):
        check_engine(engine)
    check_engine(accelerator(DistributedType.FSDP, is_fsdp2=True))


def test_all_processes_call_a_model_equally_often():
    """A process with less to score calls it on any input, after it has learnt how often the others do."""
    calls, events = [], []

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids, use_cache):
            calls.append(ids.tolist())

    def gather(mine):
        events.append(("gather", len(calls)))
        return torch.cat([mine, torch.tensor([5])])

    engine = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather)
    assert list(in_step(iter([1, 2, 3]), 3, Model(), torch.tensor([[7]]), engine)) == [1, 2, 3]
    assert calls == [[[7]], [[7]]] and events == [("gather", 0)]
    assert list(in_step(iter([1]), 1, Model(), torch.tensor([[7]]), None)) == [1] and len(calls) == 2
