"""Attractor models: explicit layers propose a state, and the equilibrium of a small head refines it (arXiv 2605.12466).

The prelude maps the embedded input to a context c. The head is a stack of the same layers, with gates. With
h(x) = head(x) - x, the sum of what the layers of the head add to x, the solver finds

    y = f(y, c) = c + h(y + c),        started at y = c

The output is RMSNorm(y). The prelude runs once in each call.
"""

from math import log

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.output_capturing import OutputRecorder

from .attention_deq import attend, contain_failures, let_fail, make_causal_mask, positions_after
from .classification_deq import DEQForSequenceClassification
from .configuration_deq_attractor import DEQAttractorConfig
from .layer_deq import DEQLayer, DEQLayerOutput, Dial
from .masking_deq import Rows
from .modeling_deq import DEQForCausalLM, DEQModel, DEQPreTrainedModel
from .paging_deq import CacheView, PagedTexts, view_of
from .positions_deq import RotaryPositions
from .weight_tying import apply_mask, draw_dropout_mask

# Standard deviation of the initial weights that write to the residual stream, relative to fan_in ** -0.5.
RESIDUAL_GAIN = 0.5


def _qk_norm(config: DEQAttractorConfig) -> nn.Module:
    """Make the norm of queries, or of keys."""
    if config.qk_norm is None:
        return nn.Identity()
    if config.qk_norm == "plain":
        return nn.RMSNorm(config.head_dim, elementwise_affine=False)  # its epsilon is the rounding step of the dtype
    return nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)


class DEQAttractorAttention(nn.Module):
    """Causal attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: DEQAttractorConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        width, all_heads = self.num_heads * config.head_dim, self.num_heads + 2 * self.num_key_value_heads
        self.qkv_proj = nn.Linear(config.hidden_size, all_heads * config.head_dim, bias=config.attention_bias)
        self.q_norm, self.k_norm = _qk_norm(config), _qk_norm(config)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.o_proj.initializer_gain = RESIDUAL_GAIN

    def forward(
        self,
        x: Tensor,
        positions: RotaryPositions,
        attention_mask: Tensor | None,
        view: CacheView | None,
        kernel_arguments: dict,
    ) -> tuple[Tensor, Tensor | None]:
        """Map normalised states `(batch, sequence, hidden)` to an output of the same shape and the weights."""
        heads, holds = contain_failures(self.qkv_proj(x).unflatten(-1, (-1, self.config.head_dim)))
        query, key, value = heads.split([self.num_heads, self.num_key_value_heads, self.num_key_value_heads], 2)
        query, key = positions.rotate(self.q_norm(query)), positions.rotate(self.k_norm(key))
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if view is not None:
            key, value = view.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, kernel_arguments)
        return self.o_proj(let_fail(output, holds).flatten(2)), weights


class DEQAttractorMLP(nn.Module):
    """The feed-forward sub-layer, gated or plain."""

    def __init__(self, config: DEQAttractorConfig):
        super().__init__()
        self.gated = config.gated_mlp
        inner = config.intermediate_size * (2 if self.gated else 1)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.initializer_gain = RESIDUAL_GAIN

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised states `(batch, sequence, hidden)` to an output of the same shape."""
        if not self.gated:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        gate, up = self.up_proj(x).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


class LayerScale(nn.Module):
    """A gate for each channel, between 0 and an upper limit.

    The parameter starts where the gate has its initial value (at a gate of the upper limit, it would be infinite, so
    the gate starts 1e-6 of the limit below).
    """

    def __init__(self, config: DEQAttractorConfig):
        super().__init__()
        self.largest, self.initial = config.layer_scale_max, config.layer_scale_init_value
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, mask: Tensor | None) -> Tensor:
        """Return the gates `(hidden)`, multiplied with a dropout mask `(batch, sequence, hidden)` if there is one."""
        return apply_mask(self.largest * self.weight.sigmoid(), mask)

    def initialize(self) -> None:
        """Initialise the parameter that was not loaded."""
        share = min(self.initial / self.largest, 1 - 1e-6)
        init.constant_(self.weight, log(share / (1 - share)))


class DEQAttractorBlock(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a root-mean-square norm.

    The layers of the head have gates if the configuration sets `layer_scale_init_value`.
    """

    def __init__(self, config: DEQAttractorConfig, layer_idx: int):
        super().__init__()
        gated = layer_idx >= config.num_prelude_layers and config.layer_scale_init_value is not None
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DEQAttractorAttention(config, layer_idx)
        self.attention_scale = LayerScale(config) if gated else nn.Identity()
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DEQAttractorMLP(config)
        self.feed_forward_scale = LayerScale(config) if gated else nn.Identity()
        self.dropout = config.hidden_dropout

    def draw_factors(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the factors of the two sub-layers in one solve: gates, and dropout masks of the shape of the states.

        A factor is `None` if there is neither.
        """
        attended, fed = (
            scale(draw_dropout_mask(like, self.dropout, self.training))
            for scale in (self.attention_scale, self.feed_forward_scale)
        )
        return attended, fed

    def forward(
        self, x: Tensor, factors: tuple[Tensor | None, Tensor | None], *arguments
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the layer adds to the states x `(batch, sequence, hidden)`, and the attention weights.

        `factors` are those of `draw_factors`, and `arguments` those of the attention.
        """
        attended, weights = self.self_attn(self.attention_norm(x), *arguments)
        attended = apply_mask(attended, factors[0])
        fed = apply_mask(self.mlp(self.feed_forward_norm(x + attended)), factors[1])
        return attended + fed, weights


class DEQAttractorPreludeLayer(DEQAttractorBlock):
    """A layer of the prelude: the same module, but its output is the sum."""

    def forward(self, x: Tensor, *arguments) -> tuple[Tensor, Tensor | None]:
        """Map states `(batch, sequence, hidden)` to states of the same shape and the attention weights."""
        added, weights = super().forward(x, self.draw_factors(x), *arguments)
        return x + added, weights


class DEQAttractorLayer(DEQLayer):
    """The prelude, and the equilibrium of the head."""

    def __init__(self, config: DEQAttractorConfig):
        super().__init__(config)
        self.input_size = config.hidden_size
        explicit, all_layers = config.num_prelude_layers, config.num_hidden_layers
        self.prelude = nn.ModuleList([DEQAttractorPreludeLayer(config, i) for i in range(explicit)])
        self.head = nn.ModuleList([DEQAttractorBlock(config, i) for i in range(explicit, all_layers)])

    def forward(
        self,
        hidden_states: Tensor,
        dial: Dial,
        rows: Rows,
        cache: Cache | PagedTexts | None,
        memory: None,
        positions: RotaryPositions,
        attention_mask: Tensor | None,
        kernel_arguments: dict,
    ) -> DEQLayerOutput:
        """Map the embedded input `(batch, sequence, hidden)` to the equilibrium of the head."""
        view = view_of(cache)
        arguments = positions, attention_mask, view, kernel_arguments
        context = self._propose(hidden_states, *arguments)
        if rows.tokens is not None:
            context = context.masked_fill(~rows.tokens, 0)
        layers = [(block, block.draw_factors(context)) for block in self.head]
        weights = None

        def f(y: Tensor) -> Tensor:
            nonlocal weights
            image = context
            for block, factors in layers:  # head(y + context) - y would be the same, but rounded more coarsely
                added, weights = block(y + image, factors, *arguments)
                image = image + added
            return image if rows.tokens is None else image.masked_fill(~rows.tokens, 0)

        solution, jacobian_loss = self.solve(f, context, dial, rows)
        if view is not None:
            view.commit()  # the last call of f was at the solution
        return DEQLayerOutput(solution.value, weights, solution, jacobian_loss, None)

    def _propose(self, hidden_states: Tensor, *arguments) -> Tensor:
        """Return the context, the output of the prelude. With activation checkpointing, backward recomputes it."""
        recompute = self.gradient_checkpointing and self.training
        for layer in self.prelude:
            if recompute:
                hidden_states, _ = checkpoint(layer, hidden_states, *arguments, use_reentrant=False)
            else:
                hidden_states, _ = layer(hidden_states, *arguments)
        return hidden_states


class DEQAttractorPreTrainedModel(DEQPreTrainedModel):
    config: DEQAttractorConfig
    _no_split_modules = ["DEQAttractorLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": [OutputRecorder(DEQAttractorPreludeLayer), OutputRecorder(DEQAttractorLayer)],
        "attentions": [OutputRecorder(DEQAttractorPreludeLayer, index=1), OutputRecorder(DEQAttractorLayer, index=1)],
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            gain = getattr(module, "initializer_gain", 1.0)
            init.normal_(module.weight, std=gain * module.in_features**-0.5)
        if isinstance(module, LayerScale):
            module.initialize()


class DEQAttractorModel(DEQAttractorPreTrainedModel, DEQModel):
    """The base model: it maps token ids to equilibrium states.

    The output field `hidden_states` has the embedded input, the output of each layer of the prelude, and
    `last_hidden_state`. The field `attentions` (with eager attention only) has the attention weights of each layer of
    the prelude, and those of the last layer of the head at the equilibrium.
    """

    layer_class = DEQAttractorLayer

    def __init__(self, config: DEQAttractorConfig):
        super().__init__(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.post_init()

    def _make_embedding(self, config: DEQAttractorConfig) -> nn.Embedding:
        return nn.Embedding(config.vocab_size, config.hidden_size)

    def _embed(self, inputs_embeds: Tensor, input_ids: Tensor | None) -> Tensor:
        return self.embedding_dropout(inputs_embeds * self.config.embedding_multiplier)

    def _context(self, inputs_embeds, attention_mask, position_ids, cache, memory, rows, **kwargs) -> dict:
        if position_ids is None:
            position_ids = positions_after(cache, inputs_embeds)
        # The library looks for packed texts in position_ids, which rows have found already.
        packed_ids = None if rows.texts is None else position_ids
        if rows.texts is not None:
            kwargs["position_ids"] = position_ids  # flash attention needs them to separate packed texts
        return {
            "positions": RotaryPositions.make(self.config, position_ids, inputs_embeds.dtype),
            "attention_mask": make_causal_mask(self.config, inputs_embeds, attention_mask, packed_ids, cache),
            "kernel_arguments": kwargs,
        }


class DEQAttractorForCausalLM(DEQAttractorPreTrainedModel, DEQForCausalLM):
    """The language model."""

    model_class = DEQAttractorModel

    def _logits(self, states: Tensor) -> Tensor:
        # The states are scaled, not the logits, because there are fewer of them.
        logits = super()._logits(states * self.config.logit_scale)
        limit = self.config.final_logit_softcapping
        return logits if limit is None else limit * torch.tanh(logits / limit)


class DEQAttractorForSequenceClassification(DEQAttractorPreTrainedModel, DEQForSequenceClassification):
    """A classifier of texts; see `DEQForSequenceClassification`."""

    model_class = DEQAttractorModel
