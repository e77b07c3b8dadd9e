"""DEQ-TrellisNet: the equilibrium of a weight-tied convolution with LSTM gates (Bai et al. 2019, section 4.2).

The state z = [hidden | cell] has intermediate_size + hidden_size channels in each half. One application of f:

    [i | o | g | e]_t = injection_t + sum_q W_q hidden_{t - (kernel_size - 1 - q) dilation}
    cell'_t           = sigmoid(e_t) cell_{t-1} + sigmoid(i_t) tanh(g_t)
    hidden'_t         = sigmoid(o_t) tanh(cell'_t)

Here i, o, g and e are the input gate, the output gate, the candidate and the forget gate.

The injection is a causal convolution of the embedded input. The output is the last `hidden_size` channels of hidden
(TrellisNet: Bai et al. 2019, arXiv 1810.06682). From the past, a later token needs only the states and inputs that the
convolutions reach. So the memory has constant size.

In the paper, cell_{t-1} comes from the previous iterate. So the content of a cell moves only one position per
evaluation. At the equilibrium, cell_{t-1} equals cell'_{t-1}. Once the gates are known, the recurrence is linear, so
every evaluation can solve it for all positions by a scan (`cell_scan`, the default). The equilibrium and its gradient
stay the same, and the number of evaluations no longer depends on how many positions a cell remembers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from .adaptive import AdaptiveSoftmax
from .cache_deq import TrellisStateLayer, refuse_offloaded
from .classification_deq import DEQForSequenceClassification
from .configuration_deq_trellisnet import DEQTrellisNetConfig
from .layer_deq import DEQLayer, DEQLayerOutput, Dial, latest
from .masking_deq import Rows, refuse_inner_padding
from .modeling_deq import DEQForCausalLM, DEQModel, DEQPreTrainedModel
from .packed_texts import Texts, within_text
from .softmax_heads import LogProbabilityHead, MixtureOfSoftmaxes
from .weight_tying import CausalConvolution, VariationalDropout, apply_mask, draw_dropout_mask

# Standard deviation of the initial recurrent weights, relative to fan_in ** -0.5.
STATE_GAIN = 0.5


class DEQTrellisNetLayer(DEQLayer):
    """f and its equilibrium. What f does not change is computed once per solve: injection, weights, masks, the past."""

    def __init__(self, config: DEQTrellisNetConfig):
        super().__init__(config)
        self.channels = config.intermediate_size + config.hidden_size
        self.input_size = config.embedding_size
        self.memory_sizes = (2 * self.channels, config.embedding_size)
        # The tied output layer needs small embeddings. This gain gives the gates inputs of unit size.
        self.injection = CausalConvolution(
            config.embedding_size,
            4 * self.channels,
            config.kernel_size,
            weight_norm=config.weight_norm,
            gain=1 / config.initializer_range,
        )
        self.recurrence = CausalConvolution(
            self.channels,
            4 * self.channels,
            config.kernel_size,
            config.dilation,
            weight_norm=config.weight_norm,
            gain=STATE_GAIN,
        )
        # Read here, because an adapter may wrap the convolutions later.
        self.memory_lengths = self.recurrence.reach, self.injection.reach
        self.recurrent_shape = 4 * self.channels, self.channels * config.kernel_size

    def forward(
        self,
        hidden_states: Tensor,
        dial: Dial,
        rows: Rows,
        cache: Cache | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> DEQLayerOutput:
        """Map the embedded input `(batch, sequence, embedding size)` to its equilibrium."""
        if rows.tokens is not None:
            hidden_states = hidden_states.masked_fill(~rows.tokens, 0)
        state_layer = None if cache is None else _state_layer(cache)
        past = self._start_of_text(hidden_states) if memory is None else memory
        if state_layer is not None and state_layer.past is not None:
            past = state_layer.past
        past_states, past_inputs = past
        f = self._map(self.injection(hidden_states, past_inputs, rows.texts), past_states, rows)
        start = hidden_states.new_zeros(*hidden_states.shape[:2], 2 * self.channels)
        solution, jacobian_loss = self.solve(f, start, dial, rows)
        states, inputs = solution.value.detach(), hidden_states.detach()
        if state_layer is not None:
            cache.update(states, inputs, 0, past=past)
        memory = tuple(
            latest(before, new, before.shape[1]) for before, new in ((past_states, states), (past_inputs, inputs))
        )
        # Not a view: FSDP2 would lose its hook if anybody changed the output in place.
        output = solution.value[..., self.config.intermediate_size : self.channels].contiguous()
        return DEQLayerOutput(output, None, solution, jacobian_loss, memory)

    def _map(self, injection: Tensor, past_states: Tensor, rows: Rows):
        """Return the map f for this injection and these past states."""
        tokens, texts = rows
        config = self.config
        past_hidden, past_cell = past_states.chunk(2, -1)
        weight_mask = draw_dropout_mask(injection, config.weight_dropout, self.training, self.recurrent_shape)
        mask = draw_dropout_mask(injection[:, :1, : self.channels], config.hidden_dropout, self.training)
        past_hidden, last_cell = apply_mask(past_hidden, mask), past_cell[:, -1:]

        def f(z: Tensor) -> Tensor:
            hidden, cell = z.chunk(2, -1)
            gates = injection + self.recurrence(apply_mask(hidden, mask), past_hidden, texts, weight_mask)
            input_gate, output_gate, candidate, forget_gate = gates.chunk(4, -1)
            new, keep = input_gate.sigmoid() * candidate.tanh(), forget_gate.sigmoid()
            if tokens is not None:  # on padding, the cell is zero
                new, keep = new.masked_fill(~tokens, 0), keep.masked_fill(~tokens, 0)
            if config.cell_scan:
                cell = linear_recurrence(keep, new, last_cell, texts)
            else:
                cell = keep * torch.cat([last_cell, within_text(cell[:, :-1], 1, texts)], 1) + new
            return torch.cat([output_gate.sigmoid() * cell.tanh(), cell], -1)

        return f

    def _start_of_text(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return zero states and zero inputs, as many as the convolutions reach back."""
        batch, (state_reach, input_reach) = like.shape[0], self.memory_lengths
        states = like.new_zeros(batch, state_reach, 2 * self.channels)
        return states, like.new_zeros(batch, input_reach, self.config.embedding_size)


class DEQTrellisNetPreTrainedModel(DEQPreTrainedModel):
    config: DEQTrellisNetConfig
    _no_split_modules = ["DEQTrellisNetLayer"]
    _can_record_outputs = {"hidden_states": OutputRecorder(DEQTrellisNetLayer, index=0)}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CausalConvolution):
            module.initialize()
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, LogProbabilityHead):
            module.initialize(self.config.initializer_range)


class DEQTrellisNetModel(DEQTrellisNetPreTrainedModel, DEQModel):
    """The base model: it maps token ids to equilibrium states. `last_hidden_state` is the output part of the state."""

    layer_class = DEQTrellisNetLayer

    def __init__(self, config: DEQTrellisNetConfig):
        super().__init__(config)
        self.input_dropout = VariationalDropout(config.input_dropout)
        self.output_dropout = VariationalDropout(config.output_dropout)
        self.post_init()

    def _embed(self, inputs_embeds: Tensor, input_ids: Tensor | None) -> Tensor:
        if input_ids is not None:
            each_type = self.config.vocab_size, 1
            kept_types = draw_dropout_mask(inputs_embeds, self.config.embedding_dropout, self.training, each_type)
            inputs_embeds = inputs_embeds if kept_types is None else inputs_embeds * kept_types[input_ids]
        return self.input_dropout(inputs_embeds)

    def _context(self, inputs_embeds, attention_mask, position_ids, cache, memory, rows, **kwargs) -> dict:
        refuse_inner_padding(rows, attention_mask, 0 if cache is None else cache.get_seq_length())
        return {}


class DEQTrellisNetForCausalLM(DEQTrellisNetPreTrainedModel, DEQForCausalLM):
    """The language model. With an adaptive softmax or a mixture of softmaxes, `logits` are log-probabilities."""

    model_class = DEQTrellisNetModel

    def _get_static_cache_init_shape(self, *args, **kwargs) -> None:
        """Return `None`: the cache holds no keys of heads, and is made in the first call."""

    def _make_head(self, config: DEQTrellisNetConfig) -> nn.Module:
        if config.cutoffs:
            return AdaptiveSoftmax(config.hidden_size, config.vocab_size, config.cutoffs)
        if config.num_softmax_experts:
            return MixtureOfSoftmaxes(
                config.hidden_size, config.vocab_size, config.num_softmax_experts, config.embedding_size
            )
        return nn.Linear(config.hidden_size, config.vocab_size)


class DEQTrellisNetForSequenceClassification(DEQTrellisNetPreTrainedModel, DEQForSequenceClassification):
    """A classifier of texts; see `DEQForSequenceClassification`."""

    model_class = DEQTrellisNetModel


def linear_recurrence(keep: Tensor, new: Tensor, start: Tensor, texts: Texts | None = None) -> Tensor:
    """Return c_t = keep_t c_{t-1} + new_t for all t, by a scan of log2(sequence) steps (Hillis & Steele 1986).

    Args:
        keep, new: `(batch, sequence, channels)`.
        start: the value c before the first position, `(batch, 1, channels)`.
        texts: the texts of packed rows; `None` if every row is one text. Every text except the first of a row starts
            with c = 0.
    """
    from_start = F.pad(keep[:, :1] * start, (0, 0, 0, new.shape[1] - 1))
    return _Scan.apply(keep, new + from_start, texts, False)


class _Scan(torch.autograd.Function):
    """The recurrence c_t = v_t + keep_t c_{t-1}, or backwards: c_t = v_t + keep_{t+1} c_{t+1}.

    The gradient of each direction is the other direction. So the steps of the scan are not saved.
    """

    @staticmethod
    def forward(ctx, keep, values, texts, backwards):
        result, factors = values.clone(), keep[:, 1:]
        reach, longest = 1, values.shape[1] if texts is None else texts.longest
        while reach < longest:
            # `result` combines `reach` positions, and `factors` leads from each position to the one `reach` later.
            earlier, later = result[:, :-reach], result[:, reach:]
            source, target = (later, earlier) if backwards else (earlier, later)
            target += within_text(factors * source, reach, texts)
            factors = factors[:, :-reach] * factors[:, reach:]
            reach *= 2
        ctx.save_for_backward(keep, result)
        ctx.texts, ctx.backwards = texts, backwards
        return result

    @staticmethod
    def backward(ctx, grad):
        keep, result = ctx.saved_tensors
        of_values = _Scan.apply(keep, grad, ctx.texts, not ctx.backwards)
        earlier, later = (of_values, result) if ctx.backwards else (result, of_values)
        of_keep = F.pad(within_text(earlier[:, :-1] * later[:, 1:], 1, ctx.texts), (0, 0, 1, 0))
        return of_keep, of_values, None, None


def _state_layer(cache: Cache) -> TrellisStateLayer:
    """Return the cache layer that holds our state. A cache that was made without a config gets such a layer.

    Raises:
        ValueError: if the cache was made for another kind of model, or keeps its layers on another device.
    """
    refuse_offloaded(cache)
    if not cache.layers:
        cache.layers.append(TrellisStateLayer())
    if not hasattr(cache.layers[0], "past"):  # no isinstance: a Hub folder may bring a second copy of the class
        raise ValueError(
            f"A DEQ-TrellisNet needs a cache of states, not of {type(cache.layers[0]).__name__}: make it by "
            "DynamicCache(config=model.config)."
        )
    return cache.layers[0]
