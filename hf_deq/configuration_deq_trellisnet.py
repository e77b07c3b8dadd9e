# Copyright 2026 The hf_deq authors. Licensed under the Apache License, Version 2.0.
"""DEQ-TrellisNet configuration."""

from huggingface_hub.dataclasses import strict

from .cache_deq import TrellisStateLayer
from .configuration_deq import DEQConfig


@strict
class DEQTrellisNetConfig(DEQConfig):
    """Configuration of a DEQ-TrellisNet; see `DEQConfig` for the fields of the equilibrium.

    The defaults are the sizes of the paper's Penn Treebank model (Bai et al. 2019, section 5 and appendix C).

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the output, `last_hidden_state` (the paper's nout).
        intermediate_size: channels of the hidden state that are not output (nhid). Hidden and cell
            state have intermediate_size + hidden_size channels each.
        embedding_size: width of the token embeddings (ninp); by default `hidden_size`.
        kernel_size: taps of both convolutions, at least 2.
        dilation: positions between the taps of the convolution of the hidden state.
        cell_scan: solve the recurrence of the cell, linear once the gates are known, in every application
            of f, instead of taking one step of it. `False` is the paper's f: the same equilibrium, found in
            several times the evaluations, and a different model where `unroll_steps` are few.
        weight_norm: hold the convolutions as length g and direction v of each output channel.
        cutoffs: ids at which the vocabulary is cut for the split softmax, rising: ids below the first
            share a head with one entry for each of the other clusters. `None` for a full softmax.
            Ids should be ordered by falling frequency.
        num_softmax_experts: softmaxes that are mixed (Yang et al. 2018), or 0 for a single one.
        initializer_range: standard deviation of the token embeddings; by default `embedding_size ** -0.5`.
        embedding_dropout: on word types: the embeddings of a dropped one are zero wherever it occurs. It
            needs `input_ids`, and does nothing to `inputs_embeds`.
        input_dropout: on the embedded input, one mask for all positions.
        hidden_dropout: on the hidden state that is convolved, one mask for all positions and evaluations.
        output_dropout: on the output, one mask for all positions.
        weight_dropout: on the weights of the convolution of the hidden state, one mask for a solve.
        tie_word_embeddings: use the token embeddings as output layer.
        num_hidden_layers: 1, the one state that a cache holds. The effective depth is the number of evaluations.
        use_cache: whether a forward pass outside of training returns the state for the next token.
    """

    model_type = "deq_trellisnet"
    base_model_tp_plan = None

    vocab_size: int = 10000
    hidden_size: int = 400
    intermediate_size: int = 1000
    embedding_size: int | None = None
    kernel_size: int = 2
    dilation: int = 1
    cell_scan: bool = True
    weight_norm: bool = True
    cutoffs: list[int] | None = None
    num_softmax_experts: int = 0
    initializer_range: float | None = None
    embedding_dropout: int | float = 0.0
    input_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    output_dropout: int | float = 0.0
    weight_dropout: int | float = 0.0
    tie_word_embeddings: bool = True
    num_hidden_layers: int = 1
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.initializer_range is None and self.embedding_size > 0:
            self.initializer_range = self.embedding_size**-0.5
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Names the cache layer, from which Transformers makes a cache for this model."""
        return [TrellisStateLayer._layer_type] * self.num_hidden_layers

    def validate_layer_type(self):
        """The library checks `layer_types` against its own; ours has registered itself."""

    def validate_architecture(self):
        """Shapes and names; called by `@strict` after construction."""
        self.require_at_least(1, "vocab_size", "hidden_size", "intermediate_size", "embedding_size", "dilation")
        self.require_at_least(2, "kernel_size")
        self.require_at_least(0, "num_softmax_experts")
        self.require_probabilities(
            "embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"
        )
        if self.num_hidden_layers != 1:
            raise ValueError(
                f"num_hidden_layers must be 1 (one weight-tied layer, applied until convergence), got "
                f"{self.num_hidden_layers}. Width is intermediate_size, reach kernel_size and dilation."
            )
        if self.num_softmax_experts == 0 and self.tie_word_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                "tie_word_embeddings makes the embeddings the output layer, so "
                f"embedding_size={self.embedding_size} must equal hidden_size={self.hidden_size}: make them equal, set "
                "tie_word_embeddings=False, or use num_softmax_experts, whose latent states have the embeddings' size."
            )
        self.require_positive("initializer_range")
        self.require_cutoffs()
        if self.cutoffs and self.num_softmax_experts:
            raise ValueError(
                f"cutoffs={self.cutoffs} and num_softmax_experts={self.num_softmax_experts} are two kinds of softmax: "
                "set one of them."
            )
