# Copyright 2026 The hf_deq authors. Licensed under the Apache License, Version 2.0.
"""DEQ-Transformer configuration."""

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import RopeParameters

from .configuration_deq import DEQConfig, require_one_of

NORM_POSITIONS = ("post", "pre", "pre_normalized_residual", "pre_open")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
POSITION_EMBEDDING_TYPES = ("rotary", "relative")


@strict
class DEQTransformerConfig(DEQConfig):
    """Configuration of a DEQ-Transformer; see `DEQConfig` for the fields of the equilibrium.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the state.
        intermediate_size: width inside the feed-forward sub-layer.
        num_hidden_layers: transformer layers in one application of f (and in the key/value cache).
            The effective depth is this times the number of evaluations.
        num_attention_heads: must divide `hidden_size`, unless `head_dim` is given.
        head_dim: size of a head; by default `hidden_size / num_attention_heads`.
        hidden_act: activation of the feed-forward sub-layer.
        norm_position: where the layer norms of f stand.
            `"post"`: after each residual sum, as in the paper.
            `"pre"`: in front of each sub-layer, and one more that closes f. Without that norm f(z + c) = f(z) + c
            for any shift c of all features, and no isolated fixed point exists.
            `"pre_normalized_residual"`: in front of each sub-layer, and the feed-forward sub-layer's residual branch
            carries its normalised input, as in the authors' code. Such an f has isolated fixed points.
            `"pre_open"`: in front of each sub-layer only, as in torchdeq's DEQ-LM. Such an f has no isolated fixed
            point: set `gradient="unrolled"`.
        norm_affine: whether the norms within f have weights and biases; the paper's have none.
        attention_output_norm: one more norm, between the attention and its output projection (torchdeq's DEQ-LM).
        final_norm: whether a norm stands between the equilibrium and the output layer; the paper has none.
        inject_residual: inject the input into the residual stream as well as into queries, keys and values; the
            paper injects into the latter alone.
        weight_norm: hold the linear maps of f as length g and direction v of each output.
        position_embedding_type: `"rotary"`, or `"relative"` (Transformer-XL, as in the paper).
        rope_parameters: Transformers' rotary parameters, `rope_theta` 10000 by default.
        max_position_embeddings: longest sequence the model is meant for; nothing is allocated.
        sliding_window: tokens that a position attends to, itself included, at least 2; `None` for all.
        memory_length: tokens of earlier segments whose states `forward` returns as `memory` and attends to when
            they are passed back; 0 for none. With more than one layer, all attend to the last one's states.
        layer_norm_eps: epsilon of every layer norm.
        embedding_size: width of the token embeddings, which are projected to `hidden_size`; by default that.
        cutoffs: ids at which the vocabulary is cut for adaptive embeddings and an adaptive softmax, rising; `None`
            for neither. Ids should be ordered by falling frequency.
        div_val: with cutoffs: by how much the embeddings of successive clusters shrink; with 1 they share a table.
        tied_projections: clusters whose projection in the output layer is that of the embeddings.
        head_bias: whether a linear output layer has biases (an adaptive one always does).
        initializer_range: standard deviation of the token embeddings; by default `hidden_size ** -0.5`.
        embedding_dropout: on the token embeddings.
        hidden_dropout: on the output of each sub-layer of f, one mask for all evaluations of a solve.
        attention_dropout: on the attention weights, one mask for all evaluations of a solve.
        output_dropout: on the equilibrium, in front of the output layer.
        variational_dropout: draw the masks of all but the attention once for all positions of a row, as in the paper.
        tie_word_embeddings: use the token embeddings as output layer.
        use_cache: whether a forward pass outside of training returns keys and values.
    """

    model_type = "deq_transformer"
    base_model_tp_plan = None
    former_fields = DEQConfig.former_fields | {
        "normalized_residual": 'write norm_position="pre_normalized_residual"',
        "closing_norm": 'write norm_position="pre" (with it) or "pre_open" (without it)',
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 1
    num_attention_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "gelu"
    norm_position: str = "post"
    norm_affine: bool = True
    attention_output_norm: bool = False
    final_norm: bool = True
    inject_residual: bool = True
    weight_norm: bool = False
    position_embedding_type: str = "rotary"
    rope_parameters: RopeParameters | dict | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    memory_length: int = 0
    layer_norm_eps: float = 1e-5
    embedding_size: int | None = None
    cutoffs: list[int] | None = None
    div_val: int = 1
    tied_projections: list[int] | None = None
    head_bias: bool = False
    initializer_range: float | None = None
    embedding_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    attention_dropout: int | float = 0.0
    output_dropout: int | float = 0.0
    variational_dropout: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.initializer_range is None and self.hidden_size > 0:
            self.initializer_range = self.hidden_size**-0.5
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.head_dim is None and self.num_attention_heads and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @classmethod
    def upgrade(cls, fields: dict) -> dict:
        """Turn the fields that an earlier version saved into those of today."""
        former = fields.get("norm_position"), fields.get("normalized_residual"), fields.get("closing_norm")
        if former == ("pre", True, True):
            raise ValueError(
                "normalized_residual=True with closing_norm=True is an f that hf_deq no longer has; norm_position is "
                f"one of {', '.join(NORM_POSITIONS)}."
            )
        position = {("pre", True, False): "pre_normalized_residual", ("pre", False, False): "pre_open"}.get(former)
        return super().upgrade(fields | ({"norm_position": position} if position else {}))

    @property
    def is_adaptive(self) -> bool:
        """Whether embeddings and output layer are adaptive ones, or need projections."""
        return self.cutoffs is not None or self.embedding_size != self.hidden_size

    def validate_architecture(self):
        """Shapes and names; called by `@strict` after construction."""
        self.require_at_least(
            1,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "embedding_size",
            "div_val",
        )
        self.require_at_least(0, "memory_length", "max_position_embeddings")
        self.require_positive("initializer_range", "layer_norm_eps")
        self.require_probabilities("embedding_dropout", "hidden_dropout", "attention_dropout", "output_dropout")
        require_one_of("norm_position", self.norm_position, NORM_POSITIONS)
        require_one_of("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        self._validate_heads()
        self._validate_vocabulary()
        if self.rope_parameters["rope_type"] in LENGTH_DEPENDENT_ROPE:
            raise ValueError(
                f"rope_type {self.rope_parameters['rope_type']!r} rotates early positions according to the length of "
                'the whole text, so nothing computed for a prefix would be final: use "default", "linear", "yarn" or '
                '"llama3".'
            )
        if self.position_embedding_type == "relative" and self.hidden_size % 2:
            raise ValueError(f"Relative positions need an even hidden_size, got {self.hidden_size}.")
        if self.sliding_window is not None and self.sliding_window < 2:
            raise ValueError(
                f"sliding_window must be at least 2 (a token and the one before it) or None, got {self.sliding_window}."
            )

    def _validate_heads(self):
        if self.head_dim is None:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}, unless "
                "head_dim is given."
            )
        self.require_at_least(1, "head_dim")
        if self.position_embedding_type == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"Rotary positions rotate pairs of channels: head_dim = {self.head_dim} must be even. Change "
                "num_attention_heads or head_dim."
            )

    def _validate_vocabulary(self):
        self.require_cutoffs()
        clusters = 1 + len(self.cutoffs or ())
        if self.div_val > 1 and self.cutoffs is None:
            raise ValueError(f"div_val={self.div_val} shrinks the embeddings of successive clusters: set cutoffs.")
        if self.embedding_size < self.div_val ** (clusters - 1):
            raise ValueError(
                f"embedding_size={self.embedding_size} divided {clusters - 1} times by div_val={self.div_val} leaves "
                "the last cluster no features."
            )
        tied = self.tied_projections or []
        if tied and not (self.tie_word_embeddings and (self.div_val > 1 or self.embedding_size != self.hidden_size)):
            raise ValueError(
                f"tied_projections={tied} needs projections (div_val > 1, or an embedding_size other than hidden_size) "
                "and tie_word_embeddings=True."
            )
        if any(not 0 <= cluster < clusters for cluster in tied):
            raise ValueError(f"tied_projections={tied} must be numbers of the {clusters} clusters, from 0.")
