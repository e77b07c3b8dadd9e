# Copyright 2026 The hf_deq authors. Licensed under the Apache License, Version 2.0.
"""DEQ-Transformer configuration."""

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import RopeParameters

from .configuration_deq import DEQConfig, require_one_of

NORM_POSITIONS = ("pre", "post")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
POSITION_EMBEDDING_TYPES = ("rotary", "relative")


@strict
class DEQTransformerConfig(DEQConfig):
    """Configuration of a DEQ-Transformer; see `DEQConfig` for the fields of the equilibrium.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the state and of the token embeddings.
        intermediate_size: width inside the feed-forward sub-layer.
        num_hidden_layers: transformer layers in one application of f (and in the key/value cache).
            The effective depth is this times the number of evaluations.
        num_attention_heads: must divide `hidden_size`.
        hidden_act: activation of the feed-forward sub-layer.
        norm_position: `"post"` (layer norm after each residual sum) or `"pre"` (in front of each
            sub-layer, and one more that closes f: without it f(z + c) = f(z) + c for any shift c of
            all features, and no isolated fixed point exists).
        position_embedding_type: `"rotary"`, or `"relative"` (Transformer-XL, as in the paper).
        rope_parameters: Transformers' rotary parameters, `rope_theta` 10000 by default.
        max_position_embeddings: longest sequence the model is meant for; nothing is allocated.
        sliding_window: tokens that a position attends to, itself included; `None` for all.
        memory_length: tokens of earlier segments whose states `forward` returns as `memory` and attends to when
            they are passed back; 0 for none. With more than one layer, all attend to the last one's states.
        layer_norm_eps: epsilon of every layer norm.
        initializer_range: standard deviation of the token embeddings; by default `hidden_size ** -0.5`.
        embedding_dropout: on the token embeddings.
        hidden_dropout: on the output of each sub-layer of f, one mask for all evaluations of a solve.
        output_dropout: on the equilibrium, in front of the output layer.
        tie_word_embeddings: use the token embeddings as output layer.
        use_cache: whether a forward pass outside of training returns keys and values.
    """

    model_type = "deq_transformer"
    base_model_tp_plan = None
    attribute_map = {"embedding_size": "hidden_size"}

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 1
    num_attention_heads: int = 8
    hidden_act: str = "gelu"
    norm_position: str = "post"
    position_embedding_type: str = "rotary"
    rope_parameters: RopeParameters | dict | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    memory_length: int = 0
    layer_norm_eps: float = 1e-5
    initializer_range: float | None = None
    embedding_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    output_dropout: int | float = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Shapes and names; called by `@strict` after construction."""
        self.require_at_least(
            1, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        )
        self.require_at_least(0, "memory_length")
        self.require_probabilities("embedding_dropout", "hidden_dropout", "output_dropout")
        require_one_of("norm_position", self.norm_position, NORM_POSITIONS)
        require_one_of("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}."
            )
        if self.position_embedding_type == "rotary" and (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                "Rotary positions rotate pairs of channels: hidden_size / num_attention_heads = "
                f"{self.hidden_size // self.num_attention_heads} must be even. Change num_attention_heads."
            )
        if self.rope_parameters["rope_type"] in LENGTH_DEPENDENT_ROPE:
            raise ValueError(
                f"rope_type {self.rope_parameters['rope_type']!r} rotates early positions according to the length of "
                'the whole text, so nothing computed for a prefix would be final: use "default", "linear", "yarn" or '
                '"llama3".'
            )
        if self.position_embedding_type == "relative" and self.hidden_size % 2:
            raise ValueError(f"Relative positions need an even hidden_size, got {self.hidden_size}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1 (or None), got {self.sliding_window}.")
