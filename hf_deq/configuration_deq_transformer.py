"""The configuration of a DEQ-Transformer."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from .configuration_deq import DEQConfig, require_one_of
from .positions_deq import check_rotary, require_head_dim

NORM_POSITIONS = ("post", "pre", "pre_normalized_residual", "pre_open")
POSITION_EMBEDDING_TYPES = ("rotary", "relative")


@strict
class DEQTransformerConfig(DEQConfig):
    """Configuration of a DEQ-Transformer. See `DEQConfig` for the fields of the equilibrium.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the state.
        intermediate_size: width inside the feed-forward sub-layer.
        num_hidden_layers: number of transformer layers in one application of f (and in the key/value cache). The
            effective depth is this number times the number of evaluations.
        num_attention_heads: number of heads. It must divide `hidden_size`, unless `head_dim` is given.
        head_dim: size of a head; by default `hidden_size / num_attention_heads`.
        hidden_act: activation of the feed-forward sub-layer.
        norm_position: where f has layer norms.
            `"post"`: after each residual sum, as in the paper.
            `"pre"`: before each sub-layer, and one more norm at the end of f. Without this last norm,
            f(z + c) = f(z) + c for any shift c of all features, and no isolated fixed point exists.
            `"pre_normalized_residual"`: before each sub-layer. The residual branch of the feed-forward sub-layer
            carries the normalised input, as in the authors' code. Such an f has isolated fixed points.
            `"pre_open"`: only before each sub-layer, as in torchdeq's DEQ-LM. Such an f has no isolated fixed point:
            set `gradient="unrolled"`.
        norm_affine: whether the norms within f have weights and biases. In the paper they have none.
        attention_output_norm: whether there is a norm between the attention and its output projection, as in
            torchdeq's DEQ-LM.
        final_norm: whether there is a norm between the equilibrium and the output layer. The paper has no such norm.
        inject_residual: whether the input is injected into the residual stream, in addition to queries, keys and
            values. The paper injects only into queries, keys and values.
        weight_norm: whether the linear maps of f are stored as length g and direction v of each output.
        position_embedding_type: `"rotary"`, or `"relative"` (Transformer-XL, as in the paper).
        rope_parameters: Transformers' rotary parameters; by default, `rope_theta` is 10000.
        max_position_embeddings: longest sequence that the model is meant for. No memory is allocated for it.
        sliding_window: number of tokens that a position attends to, including itself, at least 2; `None` for all
            tokens.
        memory_length: number of tokens from earlier segments whose states `forward` returns as `memory`; 0 for none.
            If `memory` is passed to the next call, its tokens attend to these states. With several layers, all layers
            attend to the states of the last layer.
        layer_norm_eps: epsilon of every layer norm.
        embedding_size: width of the token embeddings; by default `hidden_size`. Other widths are projected to
            `hidden_size`.
        cutoffs: ids at which the vocabulary is cut for adaptive embeddings and an adaptive softmax, in rising order;
            `None` for no cuts. Ids should be ordered by falling frequency.
        div_val: with cutoffs: factor by which the width of the embeddings shrinks from one cluster to the next. With 1,
            all clusters share one table.
        tied_projections: clusters whose projection is shared by the output layer and the embeddings.
        head_bias: whether a linear output layer has biases. An adaptive output layer always has biases.
        initializer_range: standard deviation of the initial token embeddings; by default `hidden_size ** -0.5`.
        embedding_dropout: dropout on the token embeddings.
        hidden_dropout: dropout on the output of each sub-layer of f, with one mask for all evaluations of a solve.
        attention_dropout: dropout on the attention weights, with one mask for all evaluations of a solve.
        output_dropout: dropout on the equilibrium, before the output layer.
        variational_dropout: whether all dropout masks, except those of the attention weights, are the same for all
            positions of a row, as in the paper.
        tie_word_embeddings: whether the output layer uses the token embeddings.
        use_cache: whether a forward pass returns keys and values by default.
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
        """Return the fields that an earlier version saved as fields of this version.

        Raises:
            ValueError: if they describe an f that this version does not have.
        """
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
        """Whether the vocabulary has cutoffs, or embeddings and output layer need projections."""
        return self.cutoffs is not None or self.embedding_size != self.hidden_size

    @property
    def remembers(self) -> bool:
        """With a `memory_length`: the last states."""
        return self.memory_length > 0

    def validate_architecture(self):
        """Check sizes and names. `@strict` calls this method after construction."""
        self.require_at_least(
            1, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "embedding_size", "div_val"
        )
        self.require_at_least(1, "num_hidden_layers", largest=1000)
        require_one_of("hidden_act", self.hidden_act, ACT2FN)
        self.require_at_least(0, "memory_length", "max_position_embeddings")
        self.require_positive("initializer_range", "layer_norm_eps")
        self.require_probabilities("embedding_dropout", "hidden_dropout", "attention_dropout", "output_dropout")
        require_one_of("norm_position", self.norm_position, NORM_POSITIONS)
        require_one_of("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        require_head_dim(self)
        self._validate_vocabulary()
        if self.position_embedding_type == "rotary":
            check_rotary(self)
        if self.position_embedding_type == "relative" and self.hidden_size % 2:
            raise ValueError(f"Relative positions need an even hidden_size, got {self.hidden_size}.")
        if self.sliding_window is not None and self.sliding_window < 2:
            raise ValueError(
                f"sliding_window must be at least 2 (a token and the one before it) or None, got {self.sliding_window}."
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
