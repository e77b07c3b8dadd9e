"""Attention of an f that contains attention: the mask of a call, and the attention function of the configuration."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_deq import DEQConfig, attention_name
from .masking_deq import attends
from .weight_tying import apply_mask


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout_mask=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations.

    The softmax is computed in single precision or wider. In a double precision model it is computed in double
    precision, because otherwise rounding would keep the residual from falling.

    Args:
        module: its `num_key_value_groups` is the number of query heads that share a key/value head.
        query: `(batch, heads, sequence, size)`.
        key, value: `(batch, key/value heads, keys, size)`.
        attention_mask: the result of `additive_mask`. `None` if nothing is masked.
        scaling: factor of the scores.
        dropout_mask: is multiplied with the attention weights; `None` if dropout is off.

    Returns:
        The output `(batch, sequence, heads, size)`, and the attention weights before dropout.
    """
    if module.num_key_value_groups > 1:
        key, value = (heads.repeat_interleave(module.num_key_value_groups, 1) for heads in (key, value))
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = add_scores(attention_mask, scores)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (apply_mask(weights, dropout_mask) @ value).transpose(1, 2), weights


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kernel_arguments: dict,
    dropout_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Call the configured attention function.

    Args:
        module: the attention module, with `config`, `scaling` and `num_key_value_groups`.
        query, key, value, dropout_mask: as in `eager_attention_forward`.
        attention_mask: the result of `make_causal_mask`.
        kernel_arguments: further arguments that the caller of the model gave for the attention function.

    Returns:
        The output `(batch, sequence, heads, size)`, and the attention weights if the function returns them.
    """
    attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(attention_name(module.config), eager_attention_forward)
    if dropout_mask is not None:  # only our own function takes a mask that stays fixed during the solve
        attention, kernel_arguments = eager_attention_forward, {"dropout_mask": dropout_mask}
    return attention(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=0.0,
        scaling=module.scaling,
        sliding_window=module.config.sliding_window,
        **kernel_arguments,
    )


def contain_failures(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries, keys and values that are small enough for an attention score, and the positions where they were.

    No mask hides an infinite number or NaN from the other positions, because 0 * NaN is NaN. So all heads of a position
    with such a number, or with one so large that rotations or scores could overflow, become zero. This position then
    fails, see `let_fail`. (A query of NaN is not enough: some attention kernels return a finite output for it.)

    Args:
        heads: `(batch, sequence, heads, size)`.

    Returns:
        The heads, and `holds`, bool `(batch, sequence, 1, 1)`: True where they were small enough, and are unchanged.
    """
    # A product with zero would find NaN, too, but a compiler may take it for zero.
    largest = heads.detach().abs().amax((2, 3), keepdim=True)  # nine times as fast as vector_norm on a CPU
    holds = largest <= largest_head(heads.dtype, heads.shape[-1])
    return torch.where(holds, heads, 0), holds


def largest_head(dtype: torch.dtype, size: int) -> float:
    """Return the largest number that queries, keys and values of this size may have.

    Then neither a rotation overflows nor a score: kernels add up scores in single precision or wider. In float16, it is
    16,376.
    """
    scores = torch.finfo(torch.promote_types(dtype, torch.float32))
    return min(torch.finfo(dtype).max / 4, (scores.max / (8 * size)) ** 0.5)


def let_fail(output: Tensor, holds: Tensor) -> Tensor:
    """Return the output of the attention `(batch, sequence, heads, size)` with NaN where `holds` is False."""
    return torch.where(holds, output, float("nan"))


def positions_after(cache: Cache | None, inputs_embeds: Tensor) -> Tensor:
    """Return the `position_ids` `(1, sequence)` of inputs `(batch, sequence, features)` that follow a cache."""
    past_length = 0 if cache is None else cache.get_seq_length()
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length


def make_causal_mask(
    config: DEQConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    additive: bool = False,
) -> Tensor | None:
    """Return the mask for the attention function; `None` if the attention function masks by itself.

    Args:
        config: supplies `sliding_window` and the name of the attention function.
        inputs_embeds: `(batch, sequence, features)`.
        attention_mask: the checked mask of the caller, see `check_mask`. A 4D mask says already what is causal.
        position_ids: positions of packed texts; `None` if every row is one text.
        cache: the cache that precedes the new positions.
        additive: whether a mask of numbers is needed in any case, because scores will be added to it.
    """
    name = attention_name(config)
    if name != config._attn_implementation:  # the library makes no mask for a name that it does not know
        config = copy.copy(config)
        config._attn_implementation = name
    make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    no_skip = {"allow_is_causal_skip": False} if additive else {}
    mask = make_mask(config, inputs_embeds, attention_mask, cache, position_ids=position_ids, **no_skip)
    if mask is None:
        return None
    if additive or name == "eager":
        return additive_mask(attends(mask), inputs_embeds.dtype)
    return attends(mask) if name == "sdpa" else mask  # another function gets the mask that was made for it


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask (True attends) as numbers to be added to scores.

    They are 0 and -inf, which no score can outweigh. Queries that see no key (padding) see all of them, because a
    softmax of -inf alone is NaN.
    """
    hides = ~mask & mask.any(-1, keepdim=True)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(hides, -torch.inf)


def add_scores(mask: Tensor, scores: Tensor) -> Tensor:
    """Return the sum of the result of `additive_mask` and scores.

    A score of float16 can be infinite, and inf - inf is NaN: so hidden scores are replaced.
    """
    total = mask + scores
    return total.masked_fill(mask == -torch.inf, -torch.inf) if total.dtype == torch.float16 else total
