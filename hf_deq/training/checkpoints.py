"""The states of a run in its folder, from which `--resume` goes on.

    output_dir/checkpoints/step-00000500/     a whole checkpoint: manifest.json was written last
    output_dir/checkpoints/.new-00000600/     one that is being written; a kill leaves it behind, a later run removes it

accelerate saves model, optimizer, schedule and random states. Beside them lie the carried memory and run.json: how far
the run has come, and by which recipe. The manifest has size and checksum of every file. So a damaged checkpoint is
recognised, and the run goes on from the one before it.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging

from .memory import CarriedMemory

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
NAME, UNFINISHED = "step-{:08d}", ".new-{:08d}"
# Arguments that may change when a run is resumed.
FREE_ON_RESUME = (
    "output_dir",
    "overwrite",
    "resume",
    "num_threads",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "keep_checkpoints",
    "report_to",
    "sample_prompt",
    "sample_tokens",
)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: of the run.
        accelerator: holds what is saved.
        memory: that the run carries.
        recipe: all arguments of the run.
        keep: how many checkpoints to keep, the newest ones.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, memory: CarriedMemory, recipe: dict, keep: int):
        self.folder, self.accelerator, self.memory = folder / "checkpoints", accelerator, memory
        self.recipe, self.keep = recipe, keep

    def save(self, progress: dict) -> Path:
        """Save the run and how far it has come; returns the checkpoint's folder.

        Raises:
            OSError: if the checkpoint cannot be written, for example because the disk is full. Earlier checkpoints
                stay.
        """
        path, new = (self.folder / name.format(progress["step"]) for name in (NAME, UNFINISHED))
        try:
            if self.accelerator.is_main_process:
                self._remove_unfinished()
                new.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(new))
            self.memory.save(new)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                run = progress | {"recipe": self.recipe, "num_processes": self.accelerator.num_processes}
                (new / "run.json").write_text(json.dumps(run, indent=1))
                write_manifest(new)
                _make_room(path)
                new.rename(path)
                _sync(self.folder)
                self._remove_old(path)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise errors of their own
            if self.accelerator.is_main_process:
                shutil.rmtree(new, ignore_errors=True)  # on a full disk, what comes next needs its space
            raise OSError(
                f"the checkpoint of step {progress['step']} could not be written to {self.folder} ({error}); free some "
                f"space, and continue with --resume from {self.last or 'the beginning'}."
            ) from error
        self.accelerator.wait_for_everyone()
        return path

    def load(self) -> dict:
        """Load the newest checkpoint that is whole and finite; returns how far the run had come.

        Raises:
            ValueError: if there is none, or it belongs to a run with other arguments or another number of processes.
        """
        for path in self._all():
            fault = find_fault(path)
            if fault is None:
                progress = self._load(path)
                if self.accelerator.is_main_process:  # what a kill in the last save left
                    self._remove_unfinished()
                    self._remove_old(path)
                return progress
            logger.warning(f"resume: passing over {path}: {fault}.")
        raise ValueError(
            f"resume: {self.folder} holds no checkpoint that is whole. Check output_dir, or start without --resume."
        )

    def _load(self, path: Path) -> dict:
        progress = json.loads((path / "run.json").read_text())
        self._check_recipe(path, progress.pop("recipe"))
        theirs, ours = progress.pop("num_processes"), self.accelerator.num_processes
        if theirs != ours:
            raise ValueError(
                f"resume: {path} belongs to a run of {theirs} process(es), this one has {ours}: dropout would be drawn "
                "differently. Start as many processes, or another run in another output_dir."
            )
        self.accelerator.load_state(str(path))
        self.memory.load(path)
        return progress

    def _check_recipe(self, path: Path, theirs: dict) -> None:
        ours = self.recipe
        different = {n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n)} - set(FREE_ON_RESUME)
        if different:
            changes = ", ".join(f"{name}: {theirs.get(name)} -> {ours.get(name)}" for name in sorted(different))
            raise ValueError(
                f"resume: {path} belongs to a run with other arguments ({changes}); use those, or another output_dir."
            )

    def remove(self, step: int) -> None:
        """Remove the checkpoint of a step, if there is one."""
        path = self.folder / NAME.format(step)
        if self.accelerator.is_main_process and path.is_dir():
            _remove(path)

    def remove_all(self) -> None:
        """Remove the checkpoints of an earlier run, and nothing else."""
        self._remove_unfinished()
        for path in self._finished():
            _remove(path)

    def _all(self) -> list[Path]:
        """What has the name of a checkpoint, the newest first."""
        return sorted(self.folder.glob("step-[0-9]*"), reverse=True)

    def _finished(self) -> list[Path]:
        """The checkpoints that a run has written to the end, the newest first."""
        return [path for path in self._all() if _is_finished(path)]

    @property
    def last(self) -> Path | None:
        """The newest checkpoint, or `None`."""
        return next(iter(self._finished()), None)

    def _remove_old(self, good: Path) -> None:
        """Keep `keep` checkpoints, counted from a good one: those of later steps may be damaged."""
        finished = self._finished()
        for path in finished[finished.index(good) + self.keep :]:
            _remove(path)

    def _remove_unfinished(self) -> None:
        """Remove what a kill left behind. Only this module makes folders of this name."""
        for path in self.folder.glob(".new-*"):
            shutil.rmtree(path)


def write_manifest(path: Path) -> None:
    """Write size and checksum of every file in a folder, and make sure that all of them are on the disk."""
    files = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        _sync(file)
        files[file.relative_to(path).as_posix()] = {"size": file.stat().st_size, "sha256": _checksum(file)}
    (path / MANIFEST).write_text(json.dumps(files, indent=1))
    _sync(path / MANIFEST)


def _is_finished(path: Path) -> bool:
    """Whether a run has written a checkpoint to the end. Then it is ours, though it may be damaged since."""
    return (path / MANIFEST).is_file()


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; `None` if it is whole and its weights are finite."""
    try:
        files = json.loads((path / MANIFEST).read_text())
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != expected["size"] or _checksum(path / name) != expected["sha256"]:
                return f"{name} is damaged"
        for file in path.glob("*.safetensors"):
            names = [name for name, tensor in load_file(file).items() if not torch.isfinite(tensor).all()]
            if names:
                return f"{names[0]} in {file.name} is not finite"
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
        return f"{MANIFEST} cannot be read"
    return None


def _make_room(path: Path) -> None:
    """Take away a checkpoint of the same step, from a run that went on from an earlier step because it was damaged.

    A folder without a manifest may not be ours, so it is only moved aside.
    """
    if _is_finished(path):
        _remove(path)
    elif path.exists():
        path.rename(path.with_name(f"damaged-{path.name}-{os.getpid()}"))


def _remove(path: Path) -> None:
    """Remove a checkpoint. A kill in between leaves a folder that counts as unfinished."""
    gone = path.with_name(f".new-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone)


def _checksum(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the operating system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some systems cannot do this for folders
        pass
    finally:
        os.close(descriptor)
