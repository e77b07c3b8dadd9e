"""What the conversion of every code base needs: the source of a parameter, and the arguments of a constructor."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """The source of a parameter in a state dict.

    Attributes:
        keys: names of the tensors in the state dict. Several tensors are joined along their first dimension.
        trailing: whether the tensor has one more dimension at the end, of size one (a convolution with one tap).
        rows: indices that bring the rows of the joined tensor into our order; `None` if the order is the same.
        sizes: number of rows of each tensor; needed for several tensors.
        scale: factor of the tensor.
    """

    keys: tuple[str, ...]
    trailing: bool = False
    rows: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    scale: float = 1.0

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the parameter, computed from the tensors of a state dict."""
        tensor = torch.cat([tensors[key] for key in self.keys]) if self.sizes else tensors[self.keys[0]]
        tensor = tensor.squeeze(-1) if self.trailing else tensor
        tensor = tensor if self.rows is None else tensor[self.rows]
        return tensor if self.scale == 1 else tensor * self.scale

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, given the shape of the parameter."""
        sizes = self.sizes or shape[:1]
        return {key: (size, *shape[1:]) + (1,) * self.trailing for key, size in zip(self.keys, sizes, strict=True)}


class Arguments:
    """Constructor arguments. It records which ones were read or ignored, so that it can refuse all others."""

    def __init__(self, arguments: dict):
        self.arguments, self.left = arguments, set(arguments)

    def __call__(self, name: str, *default):
        """Return an argument, or the default if it is not given.

        Raises:
            ValueError: if the argument is not given, and has no default.
        """
        self.left.discard(name)
        if name not in self.arguments and not default:
            raise ValueError(f"constructor_arguments lacks {name!r}; it has {sorted(self.arguments)}.")
        return self.arguments.get(name, *default)

    def ignore(self, *names: str) -> None:
        """Accept arguments that do not change the model."""
        self.left -= set(names)

    def refuse_unknown(self) -> None:
        """Refuse arguments that were neither read nor ignored.

        Raises:
            ValueError: if there are such arguments.
        """
        if self.left:
            raise ValueError(f"constructor_arguments has {sorted(self.left)}, which no model of this family takes.")


def linear(ours: str, theirs: str, trailing: bool = False, rows: Tensor | None = None) -> dict[str, Source]:
    """Return the sources of a linear map, a convolution or a norm, for all parameter names that it may have.

    The caller uses only the names that the model really has.
    """
    return {
        f"{ours}.weight": Source((f"{theirs}.weight",), trailing, rows),
        f"{ours}.magnitude": Source((f"{theirs}.weight_g",), trailing, rows),
        f"{ours}.direction": Source((f"{theirs}.weight_v",), trailing, rows),
        f"{ours}.bias": Source((f"{theirs}.bias",), rows=rows),
    }
