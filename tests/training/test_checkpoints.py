"""A run survives kills, damage, full disks and its own mistakes: it goes on from the newest whole checkpoint."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock
from safetensors.torch import load_file, save_file

from hf_deq import DEQTransformerForCausalLM
from hf_deq.tasks import CopyMemoryArguments
from hf_deq.training import Diverged, Interrupted, RunArguments, checkpoints, log, loop, train
from hf_deq.training.checkpoints import Checkpoints, find_fault, write_manifest

MODEL = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, hidden_dropout=0.1, solver_tolerance=1e-2)
STEPS, SAVES = 12, 3


def run(folder, **how) -> dict:
    """Train with dropout, so that random states count, and without the score of the test set."""
    AcceleratorState._reset_state(True)
    usual = dict(max_steps=STEPS, save_steps=SAVES, batch_size=4, warmup_steps=2, logging_steps=1, num_threads=1)
    arguments = RunArguments(**(usual | {"output_dir": str(folder)} | how))
    try:
        return train(CopyMemoryArguments(copy_delay=2, copy_variant="tcn"), arguments, MODEL)
    finally:
        AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True, scope="module")
def no_score():
    scores = dict(loss=1.0, recalled=0.0, num_evaluations=1.0, residual=1.0, converged=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_deq.tasks.copy_memory.HeldOutSequences.score", lambda *arguments, **how: scores)
        yield


@pytest.fixture(scope="module")
def whole(no_score, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def losses(folder) -> dict[int, float]:
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same(one, other) -> None:
    assert losses(one) == losses(other)
    weights = [load_file(Path(folder) / "model.safetensors") for folder in (one, other)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_newest_checkpoints_are_kept_and_are_whole(whole):
    assert names(whole) == ["step-00000009", "step-00000012"]
    assert all(find_fault(path) is None for path in (whole / "checkpoints").iterdir())


def test_a_run_keeps_as_many_as_it_is_told(tmp_path):
    run(tmp_path, keep_checkpoints=3)
    assert names(tmp_path) == ["step-00000006", "step-00000009", "step-00000012"]


FILES = ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "run.json", "manifest.json")
HARMS = ("missing", "shorter", "flipped")


def damage(path: Path, harm: str) -> None:
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "shorter":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x5A
        path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_found(finished, file, harm):
    damage(finished / "checkpoints" / "step-00000012" / file, harm)
    fault = find_fault(finished / "checkpoints" / "step-00000012")
    assert fault and (file in fault or file == "manifest.json")  # a wrong manifest says something of another file


@pytest.mark.parametrize("file, harm", list(zip(FILES, HARMS * 2, strict=True)))
def test_a_damaged_checkpoint_is_passed_over(finished, whole, file, harm, caplog):
    """The run goes on from the one before, says why, and ends where the undamaged one ended."""
    damage(finished / "checkpoints" / "step-00000012" / file, harm)
    run(finished, resume=True)
    assert "passing over" in caplog.text and "step-00000012" in caplog.text
    assert file in caplog.text or file == "manifest.json"
    assert_same(finished, whole)


def test_without_a_whole_checkpoint_a_resume_is_refused(finished, tmp_path):
    for path in (finished / "checkpoints").iterdir():
        (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no checkpoint that is whole. Check output_dir"):
        run(finished, resume=True)
    with pytest.raises(ValueError, match="holds no checkpoint that is whole"):
        run(tmp_path / "empty", resume=True)


def test_weights_that_are_not_finite_are_passed_over(finished, whole, caplog):
    """Also if the manifest says that they are what was written."""
    path = finished / "checkpoints" / "step-00000012"
    weights = load_file(path / "model.safetensors")
    weights[next(iter(weights))].view(-1)[0] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "manifest.json").unlink()
    write_manifest(path)
    run(finished, resume=True)
    assert "is not finite" in caplog.text
    assert_same(finished, whole)


def test_another_number_of_processes_is_refused(finished):
    path = finished / "checkpoints" / "step-00000012"
    progress = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(progress | {"num_processes": 2}))
    (path / "manifest.json").unlink()
    write_manifest(path)
    with pytest.raises(ValueError, match=r"a run of 2 process\(es\), this one has 1.*Start as many processes"):
        run(finished, resume=True)


def test_another_run_is_not_overwritten_unasked(finished, whole):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds another run: continue it with --resume, begin anew with --overwrite"):
        run(finished, seed=1)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_overwriting_removes_only_what_a_run_wrote(finished, whole):
    foreign = [finished / "checkpoint" / "a.txt", finished / "checkpoints" / "step-notes" / "b.txt"]
    for file in foreign:
        file.parent.mkdir()
        file.write_text("not ours")
    run(finished, overwrite=True)
    assert all(file.read_text() == "not ours" for file in foreign)
    assert names(finished) == [*names(whole), "step-notes"]
    assert_same(finished, whole)


def test_steps_that_are_not_finite_leave_a_good_checkpoint(tmp_path, whole, monkeypatch):
    """Between two lines of the log: they are skipped, the run ends at the next checkpoint, and can be resumed."""
    function, calls = DEQTransformerForCausalLM.loss_function, []

    def failing(self, *arguments, **how):
        calls.append(1)
        return function.fget(self)(*arguments, **how) * (torch.nan if len(calls) > 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(DEQTransformerForCausalLM, "loss_function", failing)
        with pytest.raises(Diverged, match=r"not finite in the last 8 steps, up to step 12.*step-00000009"):
            run(tmp_path, logging_steps=100)
    assert all(find_fault(path) is None for path in (tmp_path / "checkpoints").iterdir())
    weights = load_file(tmp_path / "checkpoints" / "step-00000009" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    run(tmp_path, resume=True)


def test_two_trainings_cannot_share_a_folder(tmp_path):
    with (
        FileLock(tmp_path / ".training"),
        pytest.raises(ValueError, match="another training runs in .*wait for its end"),
    ):
        run(tmp_path)
    run(tmp_path)


def test_what_was_measured_of_an_earlier_model_goes_when_its_folder_is_overwritten(tmp_path):
    stale = [tmp_path / name for name in ("results.json", "dial.png", "dial.json", "training.png")]
    for how in ({}, {"resume": True}, {"overwrite": True}):  # the first start finds files that no run has left
        for file in (*stale, tmp_path / "notes.json"):
            file.write_text("{}")
        run(tmp_path, **how)
        assert [file.exists() for file in stale] == ["overwrite" not in how] * 4 and (tmp_path / "notes.json").exists()


def test_an_overwritten_model_does_not_outlive_the_start_of_the_next_run(finished, monkeypatch):
    """Stopped early, the folder would have the old model beside the recipe and the metrics of the new one."""
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors", "notes.json"):
        (finished / name).write_text("{}")

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_deq.training.loop._Trainer._take_steps", stop)
    with pytest.raises(KeyboardInterrupt):
        run(finished, overwrite=True, seed=5)
    left = {file.name for file in finished.iterdir()} - {".training"}
    assert left == {"checkpoints", "metrics.jsonl", "recipe.yaml", "notes.json"}
    assert "seed: 5" in (finished / "recipe.yaml").read_text() and not (finished / "metrics.jsonl").read_text()


def test_a_run_does_not_overwrite_what_it_starts_from(finished):
    before = (finished / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="init_from=.* is what --overwrite would remove: choose another output_dir"):
        run(finished, overwrite=True, init_from=f"{finished}/../{finished.name}")
    assert (finished / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("error, said", [(KeyboardInterrupt, Interrupted), (ZeroDivisionError, ZeroDivisionError)])
def test_what_ends_the_report_does_not_cost_the_training(tmp_path, whole, monkeypatch, error, said):
    """Without --save_steps, too. The checkpoint for it goes when the run is finished."""

    def fail(*arguments, **how):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("hf_deq.tasks.copy_memory.HeldOutSequences.score", fail)
        with pytest.raises(said):
            run(tmp_path, save_steps=0)
    assert names(tmp_path) == ["step-00000012"] and find_fault(tmp_path / "checkpoints" / "step-00000012") is None
    line = run(tmp_path, save_steps=0, resume=True)
    assert line["step"] == STEPS and names(tmp_path) == []
    assert_same(tmp_path, whole)


def test_a_resume_after_the_last_step_leaves_its_checkpoint_alone(tmp_path, monkeypatch):
    """To write it again could lose it: a kill in between would leave none."""
    run(tmp_path, save_steps=5)
    monkeypatch.setattr("hf_deq.training.checkpoints.Checkpoints.save", lambda *arguments: pytest.fail("saved again"))
    assert run(tmp_path, save_steps=5, resume=True)["step"] == STEPS


def full(folder):
    raise OSError(28, "No space left on device")


def test_a_last_checkpoint_that_cannot_be_written_does_not_cost_the_report(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_deq.training.checkpoints.write_manifest", full)
    assert run(tmp_path, save_steps=0)["step"] == STEPS
    assert "could not be written ([Errno 28] No space left" in caplog.text and "resume" not in caplog.text
    assert "If the report is interrupted: there is no checkpoint to continue from" in caplog.text
    assert (tmp_path / "model.safetensors").is_file()
    assert not [*(tmp_path / "checkpoints").iterdir()]  # what was written of it would take the space of the report


def test_an_earlier_checkpoint_is_there_to_continue_from(tmp_path, monkeypatch, caplog):
    writes = iter([write_manifest, write_manifest, full])
    monkeypatch.setattr("hf_deq.training.checkpoints.write_manifest", lambda folder: next(writes)(folder))
    assert run(tmp_path, save_steps=5)["step"] == STEPS
    assert "If the report is interrupted: continue with --resume" in caplog.text
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


def test_an_interruption_without_a_checkpoint_promises_none(tmp_path, monkeypatch):
    def interrupted(*arguments, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_deq.training.checkpoints.write_manifest", full)
    monkeypatch.setattr("hf_deq.tasks.copy_memory.HeldOutSequences.score", interrupted)
    with pytest.raises(Interrupted, match="no checkpoint to continue from, but the model is saved: hf-deq evaluate "):
        run(tmp_path, save_steps=0)


def test_a_stop_while_the_model_is_saved_ends_the_run_before_the_report(tmp_path, whole, monkeypatch):
    def stopped(trainer):
        saved(trainer)
        os.kill(os.getpid(), signal.SIGTERM)

    saved = loop._Trainer._save_model
    with monkeypatch.context() as patch:
        patch.setattr("hf_deq.training.loop._Trainer._save_model", stopped)
        with pytest.raises(Interrupted, match="before the report; continue with --resume"):
            run(tmp_path, save_steps=0)
    assert run(tmp_path, save_steps=0, resume=True)["step"] == STEPS
    assert_same(tmp_path, whole)


def test_a_run_that_saves_keeps_its_last_step(tmp_path):
    run(tmp_path, save_steps=5)
    assert names(tmp_path) == ["step-00000010", "step-00000012"]


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("flock")])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, error):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", failing)
    with pytest.raises(OSError, match="cannot be locked.*choose another"):
        run(tmp_path)


def test_a_single_bad_step_is_skipped_counted_and_forgotten(tmp_path, monkeypatch):
    function, calls = DEQTransformerForCausalLM.loss_function, []

    def failing_once(self, *arguments, **how):
        calls.append(1)
        return function.fget(self)(*arguments, **how) * (torch.inf if len(calls) == 5 else 1)

    monkeypatch.setattr(DEQTransformerForCausalLM, "loss_function", failing_once)
    run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert [line.get("skipped_steps") for line in lines] == [None] * 4 + [1] * 8
    assert "loss" not in lines[4] and all("loss" in line for line in lines[:4] + lines[5:])


def test_a_full_disk_is_said_in_a_line_and_costs_one_checkpoint(tmp_path, whole, monkeypatch):
    """The disk is a limit on the size of files, in force while the third checkpoint is written."""
    save_state, calls = Accelerator.save_state, []

    def with_a_limit(self, *arguments, **how):
        calls.append(1)
        if len(calls) < 3:
            return save_state(self, *arguments, **how)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            return save_state(self, *arguments, **how)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", with_a_limit)
        with pytest.raises(OSError, match=r"checkpoint of step 9 could not be written.*--resume from .*step-00000006"):
            run(tmp_path)
    run(tmp_path, resume=True)
    assert names(tmp_path) == names(whole)  # what was left of the failed one is gone
    assert_same(tmp_path, whole)


# Kills. Each run is a child of this process that has imported everything already; it kills itself at some moment.

STAGES = [
    ("Accelerator.save_state", Accelerator, "save_state"),
    ("Checkpoints._remove_old", Checkpoints, "_remove_old"),
    ("write_manifest", checkpoints, "write_manifest"),
    ("checksum", checkpoints, "_checksum"),
    ("sync", checkpoints, "_sync"),
    ("remove", checkpoints, "_remove"),
    ("rmtree", shutil, "rmtree"),
    ("rename", Path, "rename"),
    ("replace", Path, "replace"),
    ("metrics", log.MetricsFile, "write"),
]


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(owner, name: str, call: int, after: bool) -> None:
    """Have this process killed before or after a call of that function; in the middle of `shutil.rmtree`."""
    function, calls = getattr(owner, name), []

    def fatal(*arguments, **how):
        calls.append(1)
        if len(calls) == call and name == "rmtree":
            next(file for file in Path(arguments[0]).iterdir() if file.is_file()).unlink()
        if len(calls) == call and not after:
            kill_myself()
        result = function(*arguments, **how)
        if len(calls) == call:
            kill_myself()
        return result

    setattr(owner, name, fatal)


def die_at(seconds: float) -> None:
    signal.signal(signal.SIGALRM, lambda *_: kill_myself())
    signal.setitimer(signal.ITIMER_REAL, seconds)


def in_a_child(folder, how: dict, death=None) -> int:
    """Train in a child; its exit code."""

    def work():
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if death is not None:
            death()
        run(folder, **how)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    return child.exitcode


def survives(folder, death, whole) -> bool:
    """Kill a run, go on until it ends, and compare; whether it was killed at all."""
    killed = in_a_child(folder, {}, death) == -signal.SIGKILL
    can_resume = any((path / "manifest.json").is_file() for path in folder.glob("checkpoints/step-*"))
    how = {"resume": True} if can_resume else {"overwrite": True}
    assert in_a_child(folder, how) == 0, f"{folder} could not go on with {how}"
    assert_same(folder, whole)
    assert names(folder) == names(whole)
    return killed


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_exactly(whole, tmp_path):
    """In every stage of saving, early and late, and at random: bit for bit the run that was not killed."""
    trials = {
        f"{stage} {call} {after}": partial(die_in, owner, name, call, after)
        for stage, owner, name in STAGES
        for call in (1, 3)
        for after in (False, True)
    }
    started = time.monotonic()
    assert in_a_child(tmp_path / "timed", {}) == 0
    duration, moments = time.monotonic() - started, random.Random(0)
    trials |= {f"random {i}": partial(die_at, moments.uniform(0, duration)) for i in range(20)}
    killed = [survives(tmp_path / str(i), death, whole) for i, death in enumerate(trials.values())]
    print(f"{sum(killed)} of {len(killed)} runs were killed, and all went on exactly")
    assert sum(killed) >= 40


@pytest.mark.parametrize(
    "owner, name, call",
    [(shutil, "rmtree", 1), (shutil, "rmtree", 2), (Checkpoints, "_remove_old", 4)],
    ids=["early", "in the last save", "before the last removal"],
)
def test_a_run_that_is_killed_while_an_old_checkpoint_goes_can_be_resumed(owner, name, call, whole, tmp_path):
    """The quick part of the test above: the moment at which both an old and a new checkpoint are on the disk."""
    assert survives(tmp_path / "run", lambda: die_in(owner, name, call, False), whole)


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(finished, whole):
    """One checkpoint is kept, a damaged one has a later step, and the run is killed between the two."""
    folder = finished / "checkpoints"
    (folder / "step-00000012" / "model.safetensors").unlink()
    how = dict(resume=True, keep_checkpoints=1, save_steps=2)
    death = partial(die_in, Checkpoints, "_remove_old", 2, True)  # the first call is that of the resume
    assert in_a_child(finished, how, death) == -signal.SIGKILL
    assert names(finished) == ["step-00000010", "step-00000012"]
    assert find_fault(folder / "step-00000010") is None
    assert in_a_child(finished, how) == 0
    assert_same(finished, whole)
