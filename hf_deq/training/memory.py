"""The memory of a model that is carried from training step to training step, and saved in checkpoints."""

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

FILE = "memory.safetensors"


class CarriedMemory:
    """The memory of every micro-batch of a step. The rows of a micro-batch are divided among the processes, in order.

    Args:
        accelerator: the accelerator of the training run.
        pieces: number of micro-batches of a step.

    Attributes:
        pieces: one memory per micro-batch; `None` if there is no memory.
    """

    def __init__(self, accelerator: Accelerator, pieces: int):
        self.accelerator = accelerator
        self.pieces: list[tuple[torch.Tensor, ...] | None] = [None] * pieces

    def forget(self) -> None:
        """Discard the memory of all micro-batches."""
        self.pieces = [None] * len(self.pieces)

    def save(self, folder: Path) -> None:
        """Write the memory of all processes, if there is one."""
        tensors = {
            f"{piece}.{part}": self.accelerator.gather(state).cpu().contiguous()
            for piece, memory in enumerate(self.pieces)
            for part, state in enumerate(memory or ())
        }
        if tensors and self.accelerator.is_main_process:
            save_file(tensors, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read this process's share of a saved memory. Without a saved memory, discard the present one."""
        self.forget()
        if not (folder / FILE).is_file():
            return
        accelerator = self.accelerator
        tensors = load_file(folder / FILE)
        for piece in range(len(self.pieces)):
            parts = [tensors[name] for name in sorted(tensors) if name.startswith(f"{piece}.")]
            shares = (part.chunk(accelerator.num_processes)[accelerator.process_index] for part in parts)
            self.pieces[piece] = tuple(share.to(accelerator.device) for share in shares)
