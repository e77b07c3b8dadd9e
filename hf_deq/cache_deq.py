"""What is remembered between calls.

The equilibrium of a prefix is final, so keys and values are stored once per token, at the
equilibrium, in Transformers' own cache classes. While a solve runs, f sees past and present
through a view that leaves the cache as it is; `commit` writes once, at the end.
"""

from copy import copy

import torch
from transformers import Cache


class EquilibriumCacheView:
    """Stands in for a `Cache` inside f: every `update` answers as the cache would, none changes it.

    `commit` then updates the cache for good with the keys and values of the last application.

    Raises:
        ValueError: the cache keeps its layers on another device between updates.
    """

    def __init__(self, cache: Cache):
        if getattr(cache, "offloading", False):
            raise ValueError(
                "An offloaded cache would be fetched in every evaluation of f: use a dynamic or a static cache."
            )
        self.cache = cache
        self._last = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the past joined with `(batch, heads, sequence, head size)` of the present."""
        self._last[layer_idx] = key_states, value_states
        if layer_idx >= len(self.cache.layers):  # a cache made without a config grows with its first true update
            return key_states, value_states
        return _scratch_copy(self.cache.layers[layer_idx]).update(key_states, value_states)

    def commit(self) -> None:
        """Write the keys and values that f used last, without their gradients."""
        for layer_idx, (key_states, value_states) in sorted(self._last.items()):
            self.cache.update(key_states.detach(), value_states.detach(), layer_idx)


def _scratch_copy(layer):
    """A copy of a cache layer whose update leaves the layer alone.

    Growing layers replace their tensors, so a shallow copy will do; preallocated ones write in place.
    """
    scratch = copy(layer)
    if getattr(layer, "is_compileable", False):
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor):
                setattr(scratch, name, value.clone())
    return scratch
