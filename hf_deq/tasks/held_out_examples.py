"""Test sequences of a synthetic task: what a model is judged on where there is no text."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..evaluation import HeldOut, evaluating, in_step, share_of, solve_sums, summed
from ..generation_deq import REPORTED


@dataclass(frozen=True)
class HeldOutExamples(HeldOut):
    """Sequences with a label for every position. Subclasses say what is measured.

    Args:
        examples: a dataset of `input_ids` and the `labels` of the same positions, all of one length.
        batch_size: sequences per forward pass.
    """

    examples: Dataset
    batch_size: int = 50
    split = "test"

    measured: ClassVar[tuple[str, ...]]  # names of what `measure` returns

    def measure(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Measure each sequence.

        Args:
            logits: `(batch, sequence, classes)`, in double precision.
            labels: `(batch, sequence)`.

        Returns:
            One row for each name in `measured`: `(names, batch)`.
        """
        raise NotImplementedError

    def score(self, model, accelerator=None, progress=False, **dial):
        """Means over the sequences: what is measured, and what the solves took."""
        rank, processes = share_of(accelerator)
        mine = Subset(self.examples, range(rank, len(self.examples), processes))
        # A generator of its own: a loader draws one number when it starts, which would change the training after it.
        loader = DataLoader(mine, self.batch_size, generator=torch.Generator())
        batches = tqdm(loader, desc="evaluate", leave=False, disable=rank > 0)
        scores = (self._sums(model, batch, dial) for batch in batches)
        names = (*self.measured, *REPORTED)
        with evaluating(model):
            sums = in_step(scores, len(batches), model, self.windows(1), accelerator)
            totals = sum(sums, torch.zeros(len(names), dtype=torch.float64))
        totals = summed(totals, accelerator)
        return dict(zip(names, (totals / len(self.examples)).tolist(), strict=True))

    @torch.no_grad()
    def _sums(self, model: PreTrainedModel, batch: dict, dial: dict) -> Tensor:
        outputs = model(batch["input_ids"].to(model.device), use_cache=False, **dial)
        of_sequences = self.measure(outputs.logits.cpu().double(), batch["labels"])
        return torch.tensor([*of_sequences.sum(1).tolist(), *solve_sums(outputs)], dtype=torch.float64)

    def windows(self, count):
        return torch.stack([self.examples[index]["input_ids"] for index in range(min(count, len(self.examples)))])
