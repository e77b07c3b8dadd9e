"""The copy memory task: recall ten symbols after a long delay (Bai, Kolter & Koltun 2019, table 1).

A sequence of delay + 20 ids: ten symbols from 1 to 8, zeros, and a sign that they are to be repeated. The target is
zero until then, and the ten symbols in the last ten positions. The loss is the cross-entropy over all
positions, among ten classes; whoever remembers nothing scores 10 ln 8 / (delay + 20). Two variants are published:

    "deq"    the sign is a single 9 in position delay + 10 (counted from 1), then zeros; 20,000 training
             and 2,000 test sequences
    "tcn"    the last eleven positions are 9 (Bai, Kolter & Koltun 2018); 10,000 and 1,000 sequences
"""

import math

import torch
from torch import Tensor

SYMBOLS, CLASSES, BLANK, SIGN = 10, 10, 0, 9
VARIANTS = {"deq": (20_000, 2_000), "tcn": (10_000, 1_000)}


class CopyMemory(torch.utils.data.Dataset):
    """Sequences of the task, made from a seed.

    Args:
        delay: positions from the last symbol to the (first) sign, the paper's T; at least 1.
        variant: `"deq"` or `"tcn"`.
        split: `"train"` or `"test"`.
        size: sequences; by default the variant's own number.
        seed: of the symbols; the splits differ at the same seed.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, delay: int, variant: str = "deq", split: str = "train", size: int | None = None, seed: int = 0):
        if variant not in VARIANTS:
            raise ValueError(f"copy_variant must be one of {sorted(VARIANTS)}, got {variant!r}.")
        if delay < 1:
            raise ValueError(f"copy_delay must be at least 1, got {delay}.")
        self.delay, self.variant = delay, variant
        is_test = split == "test"
        size = VARIANTS[variant][is_test] if size is None else size
        generator = torch.Generator().manual_seed(2 * seed + is_test)
        self.symbols = torch.randint(1, CLASSES - 1, (size, SYMBOLS), generator=generator)

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels` of the same positions, each `(delay + 20,)`."""
        inputs = torch.full((self.delay + 2 * SYMBOLS,), BLANK)
        labels = inputs.clone()
        inputs[:SYMBOLS] = labels[-SYMBOLS:] = self.symbols[index]
        sign = self.delay + SYMBOLS - 1
        if self.variant == "deq":
            inputs[sign] = SIGN
        else:
            inputs[sign:] = SIGN
        return {"input_ids": inputs, "labels": labels}

    @property
    def memoryless_loss(self) -> float:
        """Nats per position of a model that knows when to answer, but not what."""
        return SYMBOLS * math.log(8) / (self.delay + 2 * SYMBOLS)
