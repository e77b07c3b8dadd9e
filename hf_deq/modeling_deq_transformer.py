"""DEQ-Transformer: the equilibrium of one (or a few) weight-tied transformer layers (Bai et al. 2019, section 4.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.output_capturing import OutputRecorder

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from .attention_deq import attend, contain_failures, let_fail, make_causal_mask, positions_after
from .classification_deq import DEQForSequenceClassification
from .configuration_deq import attention_name
from .configuration_deq_transformer import DEQTransformerConfig
from .layer_deq import DEQLayer, DEQLayerOutput, Dial, latest
from .masking_deq import Rows
from .modeling_deq import DEQForCausalLM, DEQModel, DEQPreTrainedModel
from .paging_deq import CacheView, PagedTexts, view_of
from .positions_deq import Positions, RelativePositions, RotaryPositions
from .softmax_heads import LogProbabilityHead
from .weight_tying import VariationalDropout, WeightNormLinear, apply_mask, draw_dropout_mask

# A gain is the standard deviation of initial weights, relative to fan_in ** -0.5. With these gains the solver reaches
# 1e-3 in 8 to 11 evaluations for a new f, and in 10 to 12 for a trained f. With a gain of 1.0 a new f needs 20 to 60.
STATE_GAIN = 0.5
# These gains are for an f whose input does not enter the residual stream, as in the paper. Then the input enters only
# through the attention. With the gains above, such an f is close to the identity and needs 43 to more than 60
# evaluations.
ATTENTION_ONLY_GAINS = {"qkv_proj": 0.25, "o_proj": 1.0, "injection": 2.0}


def _linear(config: DEQTransformerConfig, in_features: int, out_features: int, bias: bool = True, gain: float = 1.0):
    """Make a linear map of f, with weight normalisation if `config.weight_norm`. `gain` is for its initial weights."""
    linear = (WeightNormLinear if config.weight_norm else nn.Linear)(in_features, out_features, bias=bias)
    linear.initializer_gain = gain
    return linear


def _gain(config: DEQTransformerConfig, name: str, usual: float = STATE_GAIN) -> float:
    """Return the gain of a linear map. The gain depends on where the input is injected."""
    return usual if config.inject_residual else ATTENTION_ONLY_GAINS[name]


def _norm(config: DEQTransformerConfig, features: int) -> nn.LayerNorm:
    """Make a layer norm of f."""
    return nn.LayerNorm(features, eps=config.layer_norm_eps, elementwise_affine=config.norm_affine)


class DEQTransformerAttention(nn.Module):
    """Causal multi-head attention. Queries, keys and values are the projected state plus the injected input."""

    def __init__(self, config: DEQTransformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width = self.num_heads * self.head_dim
        self.qkv_proj = _linear(config, config.hidden_size, 3 * width, bias=False, gain=_gain(config, "qkv_proj"))
        self.output_norm = _norm(config, width) if config.attention_output_norm else nn.Identity()
        self.o_proj = _linear(config, width, config.hidden_size, gain=_gain(config, "o_proj"))
        if config.position_embedding_type == "relative":
            self.relative_proj = _linear(config, config.hidden_size, width, bias=False)
            self.content_bias = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
            self.position_bias = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))

    def project(self, z: Tensor, injection: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each `(batch, heads, sequence, size)`, and the positions that hold."""
        heads = (self.qkv_proj(z) + injection).unflatten(-1, (-1, self.head_dim))
        heads, holds = contain_failures(heads)
        queries_and_keys, value = heads.split([2 * self.num_heads, self.num_heads], 2)
        query, key = positions.rotate(queries_and_keys).transpose(1, 2).chunk(2, 1)
        return query, key, value.transpose(1, 2), holds

    def forward(
        self,
        z: Tensor,
        injection: Tensor,
        positions: Positions,
        attention_mask: Tensor | None,
        dropout_mask: Tensor | None,
        view: CacheView | None,
        kernel_arguments: dict,
    ) -> tuple[Tensor, Tensor | None]:
        """Map a state `(batch, sequence, hidden)` and an injection `(..., 3 heads size)` to output and weights."""
        query, key, value, holds = self.project(z, injection, positions)
        if view is not None:
            key, value = view.update(key, value, self.layer_idx)
        query, attention_mask = positions.score(query, attention_mask)
        output, weights = attend(self, query, key, value, attention_mask, kernel_arguments, dropout_mask)
        return self.o_proj(self.output_norm(let_fail(output, holds).flatten(2))), weights


@dataclass(frozen=True)
class DropoutMasks:
    """The dropout masks of one transformer layer for a whole solve. A mask is `None` if its dropout is off.

    Attributes:
        attended: mask for the output of the attention, `(batch, sequence or 1, hidden)`.
        fed: mask for the output of the feed-forward sub-layer, same shape.
        weights: mask for the attention weights, `(batch, heads, queries, keys)`.
    """

    attended: Tensor | None
    fed: Tensor | None
    weights: Tensor | None

    @classmethod
    def draw(cls, config: DEQTransformerConfig, like: Tensor, keys: int, training: bool) -> "DropoutMasks":
        """Draw the masks for inputs `like`, `(batch, sequence, hidden)`, and this number of keys."""
        if not training:
            return cls(None, None, None)
        shape = like[:, :1] if config.variational_dropout else like
        attended, fed = (draw_dropout_mask(shape, config.hidden_dropout, training) for _ in ("attention", "feed"))
        scores = (len(like), config.num_attention_heads, like.shape[1], keys)
        weights = draw_dropout_mask(like, config.attention_dropout, training, scores)
        return cls(attended, fed, weights)


class DEQTransformerBlock(nn.Module):
    """One transformer layer of f: attention, then feed-forward.

    The input is injected into the attention, and also into the residual stream if `inject_residual` is set.
    """

    def __init__(self, config: DEQTransformerConfig, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_position != "post"
        self.normalized_residual = config.norm_position == "pre_normalized_residual"
        self.self_attn = DEQTransformerAttention(config, layer_idx)
        self.attention_norm = _norm(config, config.hidden_size)
        self.up_proj = _linear(config, config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = _linear(config, config.intermediate_size, config.hidden_size, gain=STATE_GAIN)
        self.feed_forward_norm = _norm(config, config.hidden_size)

    def forward(
        self,
        z: Tensor,
        into_attention: Tensor,
        into_residual: Tensor | None,
        positions: Positions,
        masks: DropoutMasks,
        attention_mask: Tensor | None,
        view: CacheView | None,
        kernel_arguments: dict,
    ) -> tuple[Tensor, Tensor | None]:
        """Map a state `(batch, sequence, hidden)` to a state of the same shape and the attention weights."""
        attending = self.attention_norm(z) if self.pre_norm else z
        attended, weights = self.self_attn(
            attending, into_attention, positions, attention_mask, masks.weights, view, kernel_arguments
        )
        if into_residual is not None:
            z = z + into_residual
        z = z + apply_mask(attended, masks.attended)
        if not self.pre_norm:
            z = self.attention_norm(z)
        fed = self.feed_forward_norm(z) if self.pre_norm else z
        residual = fed if self.normalized_residual else z
        z = residual + apply_mask(self.down_proj(self.act_fn(self.up_proj(fed))), masks.fed)
        if not self.pre_norm:
            z = self.feed_forward_norm(z)
        return z, weights

    def remember(self, states: Tensor, injections: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return the keys and values of earlier states."""
        attending = self.attention_norm(states) if self.pre_norm else states
        _, key, value, _ = self.self_attn.project(attending, injections, positions)
        return key, value


class DEQTransformerLayer(DEQLayer):
    """f and its equilibrium. What f does not change is computed once per solve: injection, positions, masks."""

    def __init__(self, config: DEQTransformerConfig):
        super().__init__(config)
        self.into_attention = 3 * config.num_attention_heads * config.head_dim
        self.into_residual = config.hidden_size if config.inject_residual else 0
        self.input_size = config.hidden_size
        if config.memory_length:
            self.memory_sizes = (config.hidden_size, self.into_attention)
        self.injection = nn.Linear(config.hidden_size, self.into_attention + self.into_residual)
        self.injection.initializer_gain = _gain(config, "injection", usual=1.0)
        self.blocks = nn.ModuleList([DEQTransformerBlock(config, i) for i in range(config.num_hidden_layers)])
        # Without this norm, an f with norm_position="pre" commutes with shifts of all features: f(z + c) = f(z) + c.
        # Then it has no isolated fixed point.
        self.closing_norm = _norm(config, config.hidden_size) if config.norm_position == "pre" else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        dial: Dial,
        rows: Rows,
        cache: Cache | PagedTexts | None,
        memory: tuple[Tensor, Tensor] | None,
        positions: Positions,
        memory_positions: Positions | None,
        attention_mask: Tensor | None,
        kernel_arguments: dict,
    ) -> DEQLayerOutput:
        """Map the embedded input `(batch, sequence, hidden)` to its equilibrium."""
        sizes = [self.into_attention, self.into_residual]
        into_attention, into_residual = self.injection(hidden_states).split(sizes, -1)
        into_residual = into_residual if self.into_residual else None
        follows_cache = cache is not None and cache.get_seq_length() > 0
        if memory is not None:
            cache = self._remembered_keys(memory, memory_positions)
        view = view_of(cache)
        keys = hidden_states.shape[1] if cache is None else cache.get_mask_sizes(hidden_states.shape[1], 0)[0]
        layers = [
            (
                block,
                positions.of_layer(block.self_attn),
                DropoutMasks.draw(self.config, hidden_states, keys, self.training),
            )
            for block in self.blocks
        ]
        weights = None

        def f(z: Tensor) -> Tensor:
            nonlocal weights
            for block, of_layer, masks in layers:
                z, weights = block(
                    z, into_attention, into_residual, of_layer, masks, attention_mask, view, kernel_arguments
                )
            z = self.closing_norm(z)
            return z if rows.tokens is None else z.masked_fill(~rows.tokens, 0)

        solution, jacobian_loss = self.solve(f, torch.zeros_like(hidden_states), dial, rows)
        if view is not None and memory is None:
            view.commit()  # the last call of f was at the solution
        # A cache holds keys, not states. After a cache, only the states of this call are known: so there is no memory.
        memory = None if follows_cache else self._memory(memory, solution.value, into_attention)
        return DEQLayerOutput(solution.value, weights, solution, jacobian_loss, memory)

    def _remembered_keys(self, memory: tuple[Tensor, Tensor], positions: Positions) -> DynamicCache:
        """Return the keys and values of remembered states.

        The present weights compute these keys and values, and get gradients through them. If f has several transformer
        layers, each of them uses the remembered states of the last layer, as in torchdeq's DEQ-LM.
        """
        cache = DynamicCache(config=self.config)
        for layer_idx, block in enumerate(self.blocks):
            cache.update(*block.remember(*memory, positions), layer_idx)
        return cache

    def _memory(self, past, *new: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the last states and injections of this segment and the segments before it."""
        length = self.config.memory_length
        if length == 0:
            return None
        past = past or [state[:, :0] for state in new]
        return tuple(latest(old, state, length) for old, state in zip(past, new, strict=True))


class DEQTransformerPreTrainedModel(DEQPreTrainedModel):
    config: DEQTransformerConfig
    _no_split_modules = ["DEQTransformerLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(DEQTransformerLayer, index=0),
        "attentions": OutputRecorder(DEQTransformerLayer, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear | WeightNormLinear):
            std = getattr(module, "initializer_gain", 1.0) * module.in_features**-0.5
            init.normal_(module.weight, std=std) if isinstance(module, nn.Linear) else module.initialize(std)
        if isinstance(module, AdaptiveEmbedding | LogProbabilityHead):
            module.initialize(self.config.initializer_range)
        if isinstance(module, DEQTransformerAttention) and self.config.position_embedding_type == "relative":
            init.zeros_(module.content_bias)
            init.zeros_(module.position_bias)


class DEQTransformerModel(DEQTransformerPreTrainedModel, DEQModel):
    """The base model: it maps token ids to equilibrium states.

    The output field `attentions` (with eager attention only) has one entry: the attention weights of the last layer of
    f at the equilibrium.
    """

    layer_class = DEQTransformerLayer

    def __init__(self, config: DEQTransformerConfig):
        super().__init__(config)
        if config.final_norm:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        dropout = VariationalDropout if config.variational_dropout else nn.Dropout
        self.embedding_dropout, self.output_dropout = dropout(config.embedding_dropout), dropout(config.output_dropout)
        self.post_init()

    def _make_embedding(self, config: DEQTransformerConfig) -> nn.Module:
        if not config.is_adaptive:
            return super()._make_embedding(config)
        return AdaptiveEmbedding(*_vocabulary(config))

    def _embed(self, inputs_embeds: Tensor, input_ids: Tensor | None) -> Tensor:
        # The tied output layer needs small embeddings. This factor gives them unit size, like the states.
        return self.embedding_dropout(inputs_embeds * self.config.hidden_size**0.5)

    def _context(self, inputs_embeds, attention_mask, position_ids, cache, memory, rows, **kwargs) -> dict:
        if memory is not None:
            cache = _cache_as_long_as(memory, self.config)
        if position_ids is None:
            position_ids = positions_after(cache, inputs_embeds)
        # The library looks for packed texts in position_ids, which rows have found already.
        packed_ids = None if rows.texts is None else position_ids
        mask = self._make_mask(inputs_embeds, attention_mask, packed_ids, cache)
        if self.config.position_embedding_type == "relative":
            positions = memory_positions = self._relative_positions(inputs_embeds, cache, mask.shape[-1])
        else:
            positions = RotaryPositions.make(self.config, position_ids, inputs_embeds.dtype)
            memory_positions = None
            if memory is not None:
                before = position_ids[:, :1] + torch.arange(-memory[0].shape[1], 0, device=position_ids.device)
                memory_positions = RotaryPositions.make(self.config, before, inputs_embeds.dtype)
        if rows.texts is not None:
            kwargs["position_ids"] = position_ids  # flash attention needs them to separate packed texts
        return {
            "positions": positions,
            "memory_positions": memory_positions,
            "attention_mask": mask,
            "kernel_arguments": kwargs,
        }

    def _relative_positions(self, inputs_embeds, cache, keys: int) -> RelativePositions:
        """Return the relative positions of inputs that follow a cache, and so attend to this number of keys."""
        if isinstance(cache, PagedTexts):
            return RelativePositions.make(inputs_embeds, cache.places, keys)
        # A sliding cache has dropped the keys before its first key.
        first_key = 0 if cache is None else cache.get_mask_sizes(inputs_embeds.shape[1], 0)[1]
        return RelativePositions.make(inputs_embeds, positions_after(cache, inputs_embeds)[0] - first_key, keys)

    def _make_mask(self, inputs_embeds, attention_mask, position_ids, cache) -> Tensor | None:
        """Return the mask for the attention function; `None` if the attention function masks by itself.

        Raises:
            ValueError: if relative positions or dropout change the attention weights, and the attention function is
                neither `"sdpa"` nor `"eager"`: other functions do not support this.
        """
        config = self.config
        additive = config.position_embedding_type == "relative"
        additive |= self.layers[0].training and config.attention_dropout > 0
        if additive and attention_name(config) not in ("sdpa", "eager"):
            raise ValueError(
                'position_embedding_type="relative" and attention_dropout change the attention weights, which '
                f'{config._attn_implementation!r} cannot: use attn_implementation="sdpa" or "eager".'
            )
        return make_causal_mask(config, inputs_embeds, attention_mask, position_ids, cache, additive)


class DEQTransformerForCausalLM(DEQTransformerPreTrainedModel, DEQForCausalLM):
    """The language model. `logits` are log-probabilities if there are cutoffs, or if embedding_size != hidden_size."""

    model_class = DEQTransformerModel

    def _make_head(self, config: DEQTransformerConfig) -> nn.Module:
        if not config.is_adaptive:
            return nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        head = AdaptiveSoftmax(*_vocabulary(config))
        self._tied_weights_keys = _tied_names(head, config.tied_projections or [])
        return head


class DEQTransformerForSequenceClassification(DEQTransformerPreTrainedModel, DEQForSequenceClassification):
    """A classifier of texts; see `DEQForSequenceClassification`."""

    model_class = DEQTransformerModel


def _vocabulary(config: DEQTransformerConfig) -> tuple:
    """Return the arguments that `AdaptiveEmbedding` and `AdaptiveSoftmax` take."""
    return config.hidden_size, config.vocab_size, config.cutoffs or (), config.embedding_size, config.div_val


def _tied_names(head: AdaptiveSoftmax, tied_projections: list[int]) -> dict[str, str]:
    """Return which parameters of the output layer are those of the embeddings if they are tied: a map of names."""
    tables = [head.table_name(cluster) for cluster in range(1 if head.one_table else len(head.ends))]
    names = {table: table for table in tables}
    for cluster in tied_projections:
        names[head.projection_name(cluster)] = head.projection_name(0 if head.one_table else cluster)
    return {f"lm_head.{ours}": f"model.embed_tokens.{theirs}" for ours, theirs in names.items()}


def _cache_as_long_as(memory: tuple[Tensor, ...], config: DEQTransformerConfig) -> DynamicCache:
    """Return a cache of zeros with the length of the memory. It is used only to compute masks and positions."""
    cache, nothing = DynamicCache(config=config), memory[0].new_zeros(1, 1, memory[0].shape[1], 1)
    for layer_idx in range(config.num_hidden_layers):
        cache.update(nothing, nothing, layer_idx)
    return cache
