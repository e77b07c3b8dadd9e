"""The state of a run in its folder, from which `--resume` goes on.

accelerate saves model, optimizer, schedule and random states. Beside them lie the carried memory and run.json, which
says how far the run has come and by which recipe. The step is also the position in the data.
"""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

from .memory import CarriedMemory

# What may differ between a run and its continuation.
FREE_ON_RESUME = (
    "output_dir",
    "resume",
    "num_threads",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "report_to",
    "sample_prompt",
    "sample_tokens",
)


class Checkpoints:
    """The checkpoint of a run.

    Args:
        folder: of the run.
        accelerator: holds what is saved.
        memory: that the run carries.
        recipe: all arguments of the run.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, memory: CarriedMemory, recipe: dict):
        self.folder, self.accelerator, self.memory, self.recipe = folder, accelerator, memory, recipe

    def save(self, progress: dict) -> Path:
        """Save the run and how far it has come; returns the checkpoint's folder."""
        path, fresh = self.folder / "checkpoint", self.folder / "checkpoint.new"
        self.accelerator.save_state(str(fresh))
        self.memory.save(fresh)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (fresh / "run.json").write_text(json.dumps(progress | {"recipe": self.recipe}, indent=1))
            shutil.rmtree(path, ignore_errors=True)  # only now, when the new one is complete
            fresh.rename(path)
        self.accelerator.wait_for_everyone()
        return path

    def load(self) -> dict:
        """Load the run; returns how far it had come.

        Raises:
            ValueError: if there is no checkpoint, or it belongs to a run with other arguments.
        """
        path = self.folder / "checkpoint"
        if not path.exists():  # killed just before the new one took its place
            path = self.folder / "checkpoint.new"
        if not (path / "run.json").is_file():
            raise ValueError(f"resume: {self.folder} holds no checkpoint. Check output_dir, or start without --resume.")
        progress = json.loads((path / "run.json").read_text())
        self._check_recipe(path, progress.pop("recipe"))
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
