"""Packed rows: one row holds several texts, one after the other. No text depends on another text."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


class Texts:
    """The texts of packed rows: which positions belong to the same text.

    Args:
        numbers: `(batch, sequence)`, the number of the text that each position belongs to. A new text starts where
            the number changes along a row.
    """

    def __init__(self, numbers: Tensor):
        starts = numbers[:, 1:] != numbers[:, :-1]
        self.numbers = F.pad(starts, (1, 0)).cumsum(1)  # a number that returns later is another text
        is_last = F.pad(starts, (0, 1), value=True)
        self.lasts = is_last.flatten().nonzero()[:, 0]
        lengths = self.lasts.diff(prepend=self.lasts.new_full((1,), -1))
        self.firsts = self.lasts - lengths + 1
        self.longest = int(lengths.max())
        self._together: dict[int, Tensor] = {}

    def flip(self) -> "Texts":
        """Return the same texts, read backwards."""
        return Texts(self.numbers.flip(1))

    def together(self, distance: int) -> Tensor:
        """Return whether a position belongs to the same text as the position `distance` before it.

        Returns:
            Bool `(batch, sequence - distance, 1)`, for the positions from `distance` on.
        """
        if distance not in self._together:
            length = max(self.numbers.shape[1] - distance, 0)
            same = self.numbers[:, distance:] == self.numbers[:, :length]
            self._together[distance] = same[..., None]
        return self._together[distance]

    def scan(self, values: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return a running sum or maximum `(batch, sequence, n)` that restarts with each text (Hillis & Steele 1986).

        `combine` joins two pieces of a text. Zero must be its neutral element. Values of other texts are replaced by
        zero, not subtracted, because they may be infinite or not a number.
        """
        reach = 1
        while reach < self.longest:
            before = within_text(values[:, :-reach], reach, self)
            values = torch.cat([values[:, :reach], combine(values[:, reach:], before)], 1)
            reach *= 2
        return values


def within_text(before: Tensor, distance: int, texts: Texts | None) -> Tensor:
    """Return earlier values, set to zero where the earlier and the later position belong to different texts.

    Args:
        before: for each position from `distance` on, the value `distance` positions earlier,
            `(batch, sequence - distance, features)`.
        distance: at least 1.
        texts: the texts of packed rows; `None` if every row is one text.
    """
    return before if texts is None else torch.where(texts.together(distance), before, 0)
