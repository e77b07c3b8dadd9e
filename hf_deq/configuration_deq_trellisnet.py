"""The configuration of a DEQ-TrellisNet."""

from huggingface_hub.dataclasses import strict

from .cache_deq import TrellisStateLayer
from .configuration_deq import DEQConfig


@strict
class DEQTrellisNetConfig(DEQConfig):
    """Configuration of a DEQ-TrellisNet. See `DEQConfig` for the fields of the equilibrium.

    The defaults are the sizes of the paper's Penn Treebank model (Bai et al. 2019, section 5 and appendix C).

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the output, `last_hidden_state` (nout in the authors' code).
        intermediate_size: number of channels of the hidden state that are not part of the output (nhid in the authors'
            code). Hidden state and cell state have intermediate_size + hidden_size channels each.
        embedding_size: width of the token embeddings (ninp in the authors' code); by default `hidden_size`.
        kernel_size: number of taps of both convolutions, at least 2.
        dilation: distance in positions between the taps of the convolution of the hidden state.
        cell_scan: whether every application of f solves the recurrence of the cell (it is linear once the gates are
            known), instead of taking one step of the recurrence. `False` is the paper's f. It has the same
            equilibrium, but needs several times as many evaluations. With few `unroll_steps` it is a different model.
        weight_norm: whether the convolutions are stored as length g and direction v of each output channel.
        cutoffs: ids at which the vocabulary is cut for an adaptive softmax, in rising order. The ids below the first
            cutoff share a softmax with one entry for each other cluster. `None` for a full softmax. Ids should be
            ordered by falling frequency.
        num_softmax_experts: number of softmaxes that are mixed (Yang et al. 2018); 0 for a single softmax.
        initializer_range: standard deviation of the initial token embeddings; by default `embedding_size ** -0.5`.
        embedding_dropout: dropout on word types: a dropped word type has zero embeddings wherever it occurs. It needs
            `input_ids`, and has no effect on `inputs_embeds`.
        input_dropout: dropout on the embedded input, with one mask for all positions.
        hidden_dropout: dropout on the hidden state before its convolution, with one mask for all positions and
            evaluations.
        output_dropout: dropout on the output, with one mask for all positions.
        weight_dropout: dropout on the weights of the convolution of the hidden state, with one mask per solve.
        tie_word_embeddings: whether the output layer uses the token embeddings.
        num_hidden_layers: must be 1: a cache holds one state. The effective depth is the number of evaluations.
        use_cache: whether a forward pass returns the state for the next token by default.
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
        """The name of the cache layer type. Transformers uses it to make a cache for this model."""
        return [TrellisStateLayer._layer_type]  # num_hidden_layers is 1, or refused

    @property
    def remembers(self) -> bool:
        """Always: the states and inputs that the convolutions reach."""
        return True

    def validate_layer_type(self):
        """Skip the check of Transformers, which accepts only its own layer types. Our layer type is registered."""

    def validate_architecture(self):
        """Check sizes and options. `@strict` calls this method after construction."""
        self.require_at_least(1, "vocab_size", "hidden_size", "intermediate_size", "embedding_size")
        self.require_at_least(1, "dilation", largest=100_000)
        self.require_at_least(2, "kernel_size", largest=1000)
        self.require_at_least(0, "num_softmax_experts", largest=1000)
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
