"""Packed rows: several texts behind each other in one row, none of which knows of the others."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


class Texts:
    """Which positions of packed rows belong to one text.

    Args:
        numbers: `(batch, sequence)`, the number of the text that each position belongs to. A change of the number
            along a row starts a new text.
    """

    def __init__(self, numbers: Tensor):
        starts = numbers[:, 1:] != numbers[:, :-1]
        self.numbers = F.pad(starts, (1, 0)).cumsum(1)  # a number that comes back is that of another text
        is_last = F.pad(starts, (0, 1), value=True)
        self.lasts = is_last.flatten().nonzero()[:, 0]
        lengths = self.lasts.diff(prepend=self.lasts.new_full((1,), -1))
        self.firsts = self.lasts - lengths + 1
        self.longest = int(lengths.max())
        self._together: dict[int, Tensor] = {}

    def flip(self) -> "Texts":
        """The same texts, read backwards."""
        return Texts(self.numbers.flip(1))

    def together(self, distance: int) -> Tensor:
        """Whether the positions from `distance` on belong to the text of the position so far before them.

        Returns:
            Bool `(batch, sequence - distance, 1)`.
        """
        if distance not in self._together:
            length = max(self.numbers.shape[1] - distance, 0)
            same = self.numbers[:, distance:] == self.numbers[:, :length]
            self._together[distance] = same[..., None]
        return self._together[distance]

    def scan(self, values: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Running sum or maximum `(batch, sequence, n)` that starts anew with each text (Hillis & Steele 1986).

        `combine` joins two pieces of a text; zero must be its neutral element. Another text's values are selected
        away, not subtracted: they may be infinite or not a number.
        """
        reach = 1
        while reach < self.longest:
            before = within_text(values[:, :-reach], reach, self)
            values = torch.cat([values[:, :reach], combine(values[:, reach:], before)], 1)
            reach *= 2
        return values


def within_text(before: Tensor, distance: int, texts: Texts | None) -> Tensor:
    """Values of the positions that lie `distance` before others; zero where the two belong to different texts.

    Args:
        before: `(batch, sequence - distance, features)`.
        distance: in positions, at least 1.
        texts: the texts of packed rows; `None` where every row is one text.
    """
    return before if texts is None else torch.where(texts.together(distance), before, 0)
