"""What a model remembers from training step to training step, also across a checkpoint."""

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

FILE = "memory.safetensors"


class CarriedMemory:
    """The memory of every micro-batch of a step; the rows of a micro-batch are shared among the processes in order.

    Attributes:
        pieces: one memory a micro-batch, `None` where nothing is remembered.
    """

    def __init__(self, accelerator: Accelerator, pieces: int):
        self.accelerator = accelerator
        self.pieces: list[tuple[torch.Tensor, ...] | None] = [None] * pieces

    def forget(self) -> None:
        """Start anew."""
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
        """Take this process's share of a saved memory, if there is one."""
        self.forget()
        if not (folder / FILE).is_file():
            return
        accelerator = self.accelerator
        tensors = load_file(folder / FILE)
        for piece in range(len(self.pieces)):
            parts = [tensors[name] for name in sorted(tensors) if name.startswith(f"{piece}.")]
            shares = (part.chunk(accelerator.num_processes)[accelerator.process_index] for part in parts)
            self.pieces[piece] = tuple(share.to(accelerator.device) for share in shares)
