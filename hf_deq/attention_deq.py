"""What attention needs besides its projections: positions, masks of numbers, and the attention itself written out."""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_deq_transformer import DEQTransformerConfig
from .weight_tying import apply_mask


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout_mask=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """Attention written out: `(batch, heads, sequence, size)` to `(batch, sequence, heads, size)` and weights.

    The softmax is in single precision at least, but never below the model's own: rounding a double
    precision model there would put a floor under its residual.
    """
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (apply_mask(weights, dropout_mask) @ value).transpose(1, 2), weights


def rotary_positions(config: DEQTransformerConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `rotate`, `(batch, sequence, 1, 1, head size)`.

    Computed anew for every call rather than kept in a buffer, which a cast of the model would round.
    """
    precise = torch.promote_types(dtype, torch.float32)
    head_dim, scaling = config.head_dim, 1.0
    if config.rope_parameters["rope_type"] == "default":
        channels = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=precise)
        frequencies = config.rope_parameters["rope_theta"] ** -(channels / head_dim)
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, position_ids.device)
    angles = position_ids[..., None].to(precise) * frequencies
    cosines, sines = (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
    cosines, sines = torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)
    return cosines[:, :, None, None], sines[:, :, None, None]


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions: feature i of a head turns with feature i + size / 2; states `(batch, sequence, ..., size)`."""
    return torch.addcmul(states * cosines, states.roll(states.shape[-1] // 2, -1), sines)


def relative_positions(inputs_embeds: Tensor, first_query: int, keys: int) -> tuple[Tensor, Tensor]:
    """Sinusoids `(distances, hidden)`, all sines first, and the distance of every query and key `(queries, keys)`.

    `first_query` is the index among the keys of the first query's own key.
    """
    length, hidden_size = inputs_embeds.shape[1:]
    device, dtype = inputs_embeds.device, torch.promote_types(inputs_embeds.dtype, torch.float32)
    frequencies = 10000 ** -(torch.arange(0, hidden_size, 2, device=device, dtype=dtype) / hidden_size)
    angles = torch.arange(keys, device=device, dtype=dtype)[:, None] * frequencies
    encodings = torch.cat([angles.sin(), angles.cos()], -1).to(inputs_embeds.dtype)
    queries = torch.arange(length, device=device)[:, None] + first_query
    distances = (queries - torch.arange(keys, device=device)).clamp_(0, keys - 1)
    return encodings, distances


def require_attention_weights(config: DEQTransformerConfig) -> None:
    """Fused kernels that take no mask of numbers cannot add scores, nor drop weights the same way every time."""
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            'position_embedding_type="relative" and attention_dropout change the attention weights, which '
            f'{config._attn_implementation!r} cannot: use attn_implementation="sdpa" or "eager".'
        )


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask (boolean: True attends) as numbers that leave room to add scores to."""
    if mask.dtype != torch.bool:
        return mask / 2
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min / 2)
