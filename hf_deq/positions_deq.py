"""Positions of tokens in attention: rotary or relative positions with the same interface.

positions = RotaryPositions.make(config, position_ids, dtype)      # once per call
positions = positions.of_layer(attention)                          # once per solve
states = positions.rotate(states)                                  # queries and keys, in every evaluation
query, mask = positions.score(query, mask)                         # for the attention function
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .attention_deq import add_scores
from .configuration_deq import DEQConfig, require_one_of

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
MAY_BE_ZERO = ("mscale", "mscale_all_dim")  # of YaRN: the library reads zero as not given


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary positions (Su et al. 2021): feature i of a head is rotated together with feature i + size / 2.

    Attributes:
        cosines, sines: `(batch, sequence, 1, head size)`. The first half of the sines is negated.
    """

    cosines: Tensor
    sines: Tensor

    @classmethod
    def make(cls, config: DEQConfig, position_ids: Tensor, dtype: torch.dtype) -> "RotaryPositions":
        """Compute the cosines and sines for `position_ids` `(batch, sequence)`.

        They are not stored in a buffer of the model, because a cast of the model would round the buffer.
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
        return cls(cosines[:, :, None], sines[:, :, None])

    def of_layer(self, attention: nn.Module) -> "RotaryPositions":
        """Return the positions as they are: they are the same for all layers."""
        return self

    def rotate(self, states: Tensor) -> Tensor:
        """Return rotated queries and keys, `(batch, sequence, heads, size)`."""
        turned = torch.addcmul(states * self.cosines, states.roll(states.shape[-1] // 2, -1), self.sines)
        return turned.to(states.dtype)

    def score(self, query: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the query and the mask for the attention function, both unchanged."""
        return query, mask


@dataclass(frozen=True)
class RelativePositions:
    """Relative positions (Dai et al. 2019): a score for each query and each distance is added to the mask.

    Attributes:
        encodings: sinusoids `(distances, hidden)`, first all sines, then all cosines.
        distances: distance from every query back to every key, `(queries, keys)`.
        attention: the attention module of one layer.
        keys: the keys that this layer computes for the distances, `(heads, size, distances)`.
    """

    encodings: Tensor
    distances: Tensor
    attention: nn.Module | None = None
    keys: Tensor | None = None

    @classmethod
    def make(cls, inputs_embeds: Tensor, own_keys: Tensor, keys: int) -> "RelativePositions":
        """Compute the encodings and the distances.

        Args:
            inputs_embeds: the inputs, `(batch, sequence, hidden)`.
            own_keys: for every query, the index of the key at its position, `(queries,)`.
            keys: number of keys.
        """
        hidden_size, device = inputs_embeds.shape[2], inputs_embeds.device
        dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
        frequencies = 10000 ** -(torch.arange(0, hidden_size, 2, device=device, dtype=dtype) / hidden_size)
        angles = torch.arange(keys, device=device, dtype=dtype)[:, None] * frequencies
        encodings = torch.cat([angles.sin(), angles.cos()], -1).to(inputs_embeds.dtype)
        distances = own_keys[:, None] - torch.arange(keys, device=device)
        return cls(encodings, distances.clamp_(0, keys - 1))

    def of_layer(self, attention: nn.Module) -> "RelativePositions":
        """Return the positions with the keys of one layer. Called once per solve."""
        keys = attention.relative_proj(self.encodings).view(-1, attention.num_heads, attention.head_dim)
        return replace(self, attention=attention, keys=keys.permute(1, 2, 0))

    def rotate(self, states: Tensor) -> Tensor:
        """Return queries and keys unchanged."""
        return states

    def score(self, query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query and the mask for the attention function.

        Together they add the terms b, c and d of the attention score (Dai et al. 2019, equation 5).
        """
        by_distance = (query + self.attention.position_bias[:, None]) @ self.keys * self.attention.scaling
        scores = by_distance.gather(-1, self.distances.expand(*by_distance.shape[:2], -1, -1))
        return query + self.attention.content_bias[:, None], add_scores(mask, scores)


Positions = RotaryPositions | RelativePositions


def require_head_dim(config: DEQConfig) -> None:
    """Refuse a configuration without a size of the heads.

    Raises:
        ValueError: if `head_dim` is missing or below 1.
    """
    if config.head_dim is None:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} must divide hidden_size={config.hidden_size}, unless "
            "head_dim is given."
        )
    config.require_at_least(1, "head_dim")


def check_rotary(config: DEQConfig) -> None:
    """Refuse rotary positions that this package cannot compute, or that are not causal.

    Raises:
        ValueError: if `head_dim` is odd, or if `rope_parameters` have an unknown or length-dependent type, numbers out
            of range, a `partial_rotary_factor` other than 1, or values that do not fit together.
    """
    if config.head_dim % 2:
        raise ValueError(
            f"Rotary positions rotate pairs of channels: head_dim = {config.head_dim} must be even. Change "
            "num_attention_heads or head_dim."
        )
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    require_one_of("rope_type", kind, ("default", *ROPE_INIT_FUNCTIONS))
    if kind in LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"rope_type {kind!r} rotates early positions according to the length of "
            'the whole text, so nothing computed for a prefix would be final: use "default", "linear", "yarn" or '
            '"llama3".'
        )
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            "rope_parameters: partial_rotary_factor must be 1, because these models rotate whole heads; got "
            f"{parameters['partial_rotary_factor']}."
        )
    for name, value in parameters.items():
        if not isinstance(value, int | float) or name == "truncate":  # the only switch among the numbers
            continue
        if isinstance(value, bool) or not (0 < value < float("inf") or (value == 0 and name in MAY_BE_ZERO)):
            raise ValueError(f"rope_parameters: {name} must be positive and finite, got {value}.")
    if kind != "default":
        try:
            with torch.device("cpu"):  # models are checked within the meta device, too, when they are loaded
                ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        except Exception as error:  # the library's functions trust their input
            raise ValueError(f"rope_parameters={parameters} do not fit together: {error!r}.") from error
