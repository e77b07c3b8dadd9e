"""A stream of token ids as training sequences, and which of them each optimizer step takes.

blocks = SequenceBlocks(stream.ids, length=128)     # a torch dataset for any DataLoader
DataLoader(blocks, batch_sampler=StepBatches(len(blocks), 16, seed=0, first=0, last=1000))
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class SequenceBlocks(torch.utils.data.Dataset):
    """A stream, cut into contiguous blocks of `length` inputs. The label of an input is the id that follows it.

    Raises:
        ValueError: if the stream is shorter than one block.
    """

    def __init__(self, ids: Tensor, length: int):
        if len(ids) < length + 1:
            raise ValueError(
                f"The corpus has {len(ids)} tokens, less than one sequence of {length} + 1: use more text or a smaller "
                "sequence_length."
            )
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.length
        ids = self.ids[start : start + self.length + 1]
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class ContiguousBatches(torch.utils.data.Sampler):
    """Batches of block indices for `rows` parallel streams. The next block of a row continues its last one.

    Row r of step k is block r * steps_per_epoch + k % steps_per_epoch. The remaining blocks are left out. Each step is
    split into `pieces` batches of neighbouring rows.

    Args:
        num_blocks, rows, pieces: numbers of blocks, of streams, and of batches in a step.
        first, last: the steps are `first` to `last - 1`.

    Raises:
        ValueError: if there are fewer blocks than rows.
    """

    def __init__(self, num_blocks: int, rows: int, pieces: int, first: int, last: int):
        self.rows, self.first, self.last = rows, first, last
        self.batch_size = rows // pieces
        self.steps_per_epoch = num_blocks // rows
        self.drop_last = True  # accelerate asks; every batch is full
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"The corpus has {num_blocks} sequences, less than one for each of {rows} streams: use more text, a "
                "smaller batch_size or a smaller sequence_length."
            )

    def starts_anew_at(self, step: int) -> bool:
        """Whether the streams are at their beginning, so that this step does not continue the one before it."""
        return step % self.steps_per_epoch == 0

    def __len__(self) -> int:
        return (self.last - self.first) * (self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            blocks = [row * self.steps_per_epoch + step % self.steps_per_epoch for row in range(self.rows)]
            for start in range(0, self.rows, self.batch_size):
                yield blocks[start : start + self.batch_size]


class StepBatches(torch.utils.data.Sampler):
    """Batches of block indices for the steps `first` to `last - 1`: pieces of one seeded permutation for each epoch."""

    def __init__(self, num_blocks: int, batch_size: int, seed: int, first: int, last: int):
        self.num_blocks, self.batch_size, self.seed, self.first, self.last = num_blocks, batch_size, seed, first, last
        self.drop_last = True  # accelerate asks; every batch is full

    def starts_anew_at(self, step: int) -> bool:
        """Always true: no sequence continues another one."""
        return True

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        for position in range(self.first * self.batch_size, self.last * self.batch_size, self.batch_size):
            batch = []
            for place in range(position, position + self.batch_size):
                if place // self.num_blocks != epoch:
                    epoch = place // self.num_blocks
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.num_blocks, generator=generator)
                batch.append(int(order[place % self.num_blocks]))
            yield batch
