"""The configuration of an Attractor model."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from .configuration_deq import DEQConfig, require_one_of
from .positions_deq import check_rotary, require_head_dim

QK_NORMS = ("plain", "affine")


@strict
class DEQAttractorConfig(DEQConfig):
    """Configuration of an Attractor model ("Solve the Loop", arXiv 2605.12466). `DEQConfig` has the other fields.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the state.
        intermediate_size: width inside the feed-forward sub-layer.
        num_hidden_layers: number of all layers: those of the prelude and those of the head. It is also the number of
            layers of the key/value cache. The effective depth is larger, because the head is applied many times.
        num_prelude_layers: number of layers that are applied once, before the solve, from 0 to num_hidden_layers - 1.
            The other layers are the head, for which the solver finds an equilibrium.
        num_attention_heads: number of query heads. It must divide `hidden_size`, unless `head_dim` is given.
        num_key_value_heads: number of key/value heads. It must divide `num_attention_heads`, which is the default.
        head_dim: size of a head; by default `hidden_size / num_attention_heads`.
        hidden_act: activation of the feed-forward sub-layer.
        gated_mlp: whether the activation of one projection gates another one, as in Llama.
        attention_bias: whether the projections of the attention have biases.
        mlp_bias: whether the projections of the feed-forward sub-layer have biases.
        qk_norm: norm of each query and each key: `"plain"` (without weights, and with the rounding step of the dtype
            as epsilon, as in the authors' models), `"affine"` (with weights and `rms_norm_eps`, as in Qwen3), or
            `None`.
        rms_norm_eps: epsilon of the root-mean-square norms.
        rope_parameters: Transformers' rotary parameters; by default, `rope_theta` is 10000.
        max_position_embeddings: longest sequence that the model is meant for. No memory is allocated for it.
        sliding_window: number of tokens that a position attends to, including itself, at least 2; `None` for all
            tokens.
        layer_scale_init_value: initial value of the gates, one for each channel, on the two sub-layers of each layer
            of the head; `None` for no gates.
        layer_scale_max: upper limit of the gates. A gate is `layer_scale_max * sigmoid(parameter)`.
        embedding_multiplier: factor of the token embeddings.
        logit_scale: factor of the logits.
        final_logit_softcapping: limit k of the logits, which become k tanh(logits / k); `None` for no limit.
        embedding_dropout: dropout on the token embeddings.
        hidden_dropout: dropout on the output of each sub-layer. In the head, a mask is the same in all evaluations of
            a solve.
        output_dropout: dropout on the normalised equilibrium, before the output layer.
        initializer_range: standard deviation of the initial token embeddings; by default `hidden_size ** -0.5`.
        tie_word_embeddings: whether the output layer uses the token embeddings.
        use_cache: whether a forward pass returns keys and values by default.
    """

    model_type = "deq_attractor"
    base_model_tp_plan = None

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 4
    num_prelude_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = "plain"
    rms_norm_eps: float = 1e-5
    rope_parameters: RopeParameters | dict | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    layer_scale_init_value: int | float | None = 0.5
    layer_scale_max: int | float = 1.0
    embedding_multiplier: int | float = 1.0
    logit_scale: int | float = 1.0
    final_logit_softcapping: int | float | None = None
    embedding_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    output_dropout: int | float = 0.0
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.initializer_range is None and self.hidden_size > 0:
            self.initializer_range = self.hidden_size**-0.5
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check sizes and names. `@strict` calls this method after construction."""
        self.require_at_least(
            1, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"
        )
        self.require_at_least(1, "num_hidden_layers", largest=1000)
        self.require_at_least(0, "num_prelude_layers", "max_position_embeddings")
        self.require_positive(
            "initializer_range", "rms_norm_eps", "layer_scale_max", "embedding_multiplier", "logit_scale"
        )
        self.require_probabilities("embedding_dropout", "hidden_dropout", "output_dropout")
        require_one_of("hidden_act", self.hidden_act, ACT2FN)
        require_head_dim(self)
        check_rotary(self)
        if self.num_prelude_layers >= self.num_hidden_layers:
            raise ValueError(
                f"num_prelude_layers={self.num_prelude_layers} must be below num_hidden_layers="
                f"{self.num_hidden_layers}: the other layers are the head, and it needs at least one."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads="
                f"{self.num_attention_heads}."
            )
        if self.qk_norm is not None:
            require_one_of("qk_norm", self.qk_norm, QK_NORMS)
        if self.final_logit_softcapping is not None:
            self.require_positive("final_logit_softcapping")
        if self.sliding_window is not None:
            self.require_at_least(2, "sliding_window")
        if self.layer_scale_init_value is not None and not 0 < self.layer_scale_init_value <= self.layer_scale_max:
            raise ValueError(
                f"layer_scale_init_value={self.layer_scale_init_value} must be positive, and at most layer_scale_max="
                f"{self.layer_scale_max}; None leaves the gates out."
            )
