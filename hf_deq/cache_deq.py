"""Caches: the data that is kept between calls.

The equilibrium of a prefix is final. So the data that later tokens need is stored once per token:

    EquilibriumCacheView    keys and values at the equilibrium, in Transformers' own cache classes
    TrellisStateLayer       the last states and inputs that the convolutions reach, for any text length

During a solve, f reads the past but does not write to the cache. The model writes once, at the end.
"""

from copy import copy

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, StaticLayer

from .configuration_deq import DEQConfig


class EquilibriumCacheView:
    """Replaces a `Cache` inside f: `update` returns what the cache would return, but does not change the cache.

    At the end, `commit` updates the cache with the keys and values of the last application of f. Without gradients,
    the joined tensors are reused within a solve: only the part of the new tokens is overwritten. With gradients,
    backward may call f again after the commit. So the view then reads from a copy of the cache, and a preallocated
    cache takes its memory twice until backward.

    Raises:
        ValueError: if the cache keeps its layers on another device between updates.
    """

    def __init__(self, cache: Cache):
        refuse_offloaded(cache)
        self.cache = cache
        self._past = [_scratch_copy(layer) for layer in cache.layers] if torch.is_grad_enabled() else cache.layers
        self._last, self._joined = {}, {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Return the past keys and values, joined with the new ones `(batch, heads, sequence, head size)`."""
        present = self._last[layer_idx] = key_states, value_states
        if layer_idx >= len(self._past):  # a cache without a config gets its layers in the first real update
            return present
        layer = self._past[layer_idx]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _joined(layer, *present)
        if layer_idx not in self._joined:  # the past is copied once per solve, not in every evaluation
            place = _place_of_new_tokens(layer, key_states.shape[2])
            self._joined[layer_idx] = place, _joined(layer, *present)
            return self._joined[layer_idx][1]
        place, joined = self._joined[layer_idx]
        if place is None:
            return _joined(layer, *present)
        for whole, new in zip(joined, present, strict=True):
            whole[:, :, place] = new
        return joined

    def commit(self) -> None:
        """Write the keys and values of the last application of f to the cache, without gradients."""
        for layer_idx, (key_states, value_states) in sorted(self._last.items()):
            self.cache.update(key_states.detach(), value_states.detach(), layer_idx)


def refuse_offloaded(cache: Cache) -> None:
    """Refuse a cache that moves its layers between devices.

    Raises:
        ValueError: if the cache is offloaded.
    """
    if getattr(cache, "offloading", False):
        raise ValueError(
            "An offloaded cache leaves the device after every update, but a solve reads it in every evaluation: use a "
            "dynamic or a static cache."
        )


def _place_of_new_tokens(layer, count: int) -> slice | None:
    """Return the place of `count` new tokens in the result of the layer's `update`; `None` if the place varies."""
    if not getattr(layer, "is_compileable", False):
        return slice(-count, None)  # at the end, even if older tokens are dropped or quantized
    if layer.is_sliding:
        return None
    past_length = int(layer.get_seq_length())
    return slice(past_length, past_length + count)


def _joined(layer, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the layer's `update` would return. The layer does not change.

    For a static layer this makes no write at all, since CUDA graphs would not allow one.
    """
    if type(layer) is StaticLayer and layer.is_initialized and layer.keys.device.type != "mps":  # no index_copy there
        place = layer.get_seq_length() + torch.arange(key_states.shape[2], device=key_states.device)
        return layer.keys.index_copy(2, place, key_states), layer.values.index_copy(2, place, value_states)
    return _scratch_copy(layer).update(key_states, value_states)


def _scratch_copy(layer):
    """Return a copy of a cache layer. An update of the copy does not change the layer.

    Growing layers replace their tensors, so a shallow copy is enough. Preallocated layers write in place, so their
    tensors are copied too.
    """
    scratch = copy(layer)
    if getattr(layer, "is_compileable", False):
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor):
                setattr(scratch, name, value.clone())
    return scratch


class TrellisStateLayer(CacheLayerMixin):
    """A cache layer of constant size: the last equilibrium states and embedded inputs of a DEQ-TrellisNet.

    The layer type is registered, so `DynamicCache(config=...)` and `StaticCache(config=...)` use this layer.
    `keys` holds states `(batch, positions, state size)`. `values` holds inputs `(batch, positions, embedding size)`.
    Both hold as many positions as the convolutions reach back, with zeros before the start of the text. Decoding
    that may remove tokens again (assisted, prompt lookup) keeps all positions until the next `crop`.
    """

    _layer_type = "deq_trellis"
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.cumulative_length = 0
        self.record_past = False

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be removed again: only after `activate_past_recording`."""
        return self.record_past

    @property
    def past(self) -> tuple[Tensor, Tensor] | None:
        """The states and inputs that the next call needs, or `None` at the start of a text."""
        if not self.is_initialized:
            return None
        return self.keys[:, -self.state_window :], self.values[:, -self.input_window :]

    def lazy_initialization(self, states: Tensor, inputs: Tensor) -> None:
        """Start from a first past, whose lengths set the window sizes."""
        self.keys, self.values = states, inputs
        self.state_window, self.input_window = states.shape[1], inputs.shape[1]
        self.dtype, self.device = states.dtype, states.device
        self.is_initialized = True

    def update(self, states: Tensor, inputs: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Append the states and inputs of new tokens. Unless past recording is on, drop positions out of reach.

        Args:
            states, inputs: `(batch, new tokens, size)`.
            past: the past from which the new tokens were computed. In the first call, it sets the window sizes.

        Returns:
            The past of the next token.
        """
        if not self.is_initialized:
            self.lazy_initialization(*past)
        self.keys, self.values = torch.cat([self.keys, states], 1), torch.cat([self.values, inputs], 1)
        self.cumulative_length += states.shape[1]
        if not self.record_past:
            self.crop(0)
        return self.past

    def activate_past_recording(self) -> None:
        """From now on, keep all positions until `crop`, so that tokens can be removed again."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, and drop positions out of reach (also for 0).

        Raises:
            ValueError: if the number is positive, or if more tokens would be removed than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}.")
        if not self.is_initialized:
            return
        end = self.keys.shape[1] + tokens_to_remove
        if end < self.state_window:
            raise ValueError(
                f"crop({tokens_to_remove}) goes back further than was recorded: call activate_past_recording() before "
                "the tokens that may have to be taken back."
            )
        # Copies, so that a short window does not keep the storage of a long text in memory.
        self.keys = self.keys[:, end - self.state_window : end].clone()
        end = self.values.shape[1] + tokens_to_remove
        self.values = self.values[:, end - self.input_window : end].clone()
        self.cumulative_length += tokens_to_remove

    def reset(self) -> None:
        """Forget everything. The next text may have another number of rows."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen so far."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of a mask. A mask covers all tokens."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            self.keys, self.values = (past.repeat_interleave(repeats, 0) for past in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows with these indices."""
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


STATIC_LAYER_TYPE_MAPPING[TrellisStateLayer._layer_type] = TrellisStateLayer  # also for a static cache


def check_cacheable(config: DEQConfig, unroll_steps: int | None = None) -> None:
    """Refuse to cache where a prefix has no final state.

    Raises:
        ValueError: if f is unrolled, by the configuration or for this call, or is solved in sequence scope.
    """
    if config.gradient == "unrolled" or unroll_steps is not None:
        raise ValueError(
            'Unrolled steps (gradient="unrolled", unroll_steps) have no equilibrium whose keys and values could be '
            'cached: every step has different ones. Pass use_cache=False, or solve with gradient="implicit".'
        )
    if config.solver_scope == "sequence":
        raise ValueError(
            'solver_scope="sequence" lets later tokens change earlier states until convergence, so a prefix has no '
            'final state to cache. Pass use_cache=False, or set solver_scope="causal".'
        )
