"""What all deep equilibrium language models share: the report of the solve, and the base classes.

`DEQModel` maps token ids to equilibrium states. `DEQForCausalLM` maps token ids to logits. A model family adds its f
(a `DEQLayer`, see `layer_deq`), and computes what f needs in each call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_deq import check_cacheable
from .configuration_deq import DEQConfig
from .generation_deq import DEQGenerationMixin
from .inputs_deq import check_inputs, check_memory, check_position_ids, refuse_growing_cache, refuse_misspelt_dial
from .layer_deq import DEQLayer, Dial
from .masking_deq import Rows, check_mask, positions_of_texts, read_rows
from .paging_deq import PagedTexts
from .softmax_heads import LogProbabilityHead

logger = logging.get_logger(__name__)

# Before version 5.24, Transformers called the cache `past_key_values`. Older callers still use this name.
FORMER_CACHE_NAME = {"old_name": "past_key_values", "new_name": "cache", "version": "5.40.0"}


JACOBIAN_LOSS_LEFT_OUT = (
    "jacobian_loss_weight is set, but the loss is computed outside of the model (labels were not passed to forward, as "
    "with label_smoothing_factor or compute_loss_func of Trainer). The regularization is not part of it: add "
    "config.jacobian_loss_weight * outputs.jacobian_loss yourself, or set jacobian_loss_weight to 0."
)


@dataclass
class SolveReport:
    """The report of the solve. The outputs of these models have these fields in addition to those of Transformers.

    Attributes:
        residual: relative residual of each sequence, `(batch,)`, or `(texts,)` for packed rows.
        num_evaluations: calls of f for each sequence, same shape.
        converged: whether each sequence reached the tolerance, same shape.
        jacobian_loss: unweighted Jacobian regularization, scalar. Only in training, and only if it is on.
        memory: states to pass as `memory` with the next segment of the same text, detached tensors
            `(batch, positions, size)`. `None` if the configuration sets no memory, if the segment has padding or
            packed texts, or if a key/value cache precedes the segment.
    """

    residual: Tensor | None = None
    num_evaluations: Tensor | None = None
    converged: Tensor | None = None
    jacobian_loss: Tensor | None = None
    memory: tuple[Tensor, ...] | None = None


# SolveReport is the first base class, so its fields come last: dataclasses collect fields from the last base class on.
@dataclass
class DEQModelOutputWithPast(SolveReport, BaseModelOutputWithPast):
    """Transformers' output, and the report of the solve."""

    def passed_on(self) -> dict:
        """Return the fields that a model with an output layer passes on to its caller: all except the states."""
        return {name: value for name, value in self.items() if name != "last_hidden_state"}


@dataclass
class DEQCausalLMOutputWithPast(SolveReport, CausalLMOutputWithPast):
    """Transformers' output, and the report of the solve."""


class DEQPreTrainedModel(PreTrainedModel):
    """The base class of all models. Loading, saving and initialisation are those of Transformers."""

    config: DEQConfig
    base_model_prefix = "model"
    _no_split_modules = []
    supports_gradient_checkpointing = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Return True. Transformers would look for the attention function in the file of the model class."""
        return True

    def compile_f(self, **options) -> None:
        """Compile f alone, by `torch.compile`. The loop of the solver stays in Python, so it still stops early.

        Every shape of the state is compiled once (static shapes), in the first call that has it. So give batches of one
        size, and generate with a cache that does not grow (`cache_implementation="static"`). The setting is not saved.

        Args:
            options: arguments for `torch.compile`, such as `backend` and `mode`. `dynamic` is False by default.
        """
        for layer in self.modules():
            if isinstance(layer, DEQLayer):
                layer.compile_options = {"dynamic": False} | options

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs
    ) -> nn.Module:
        """Resize as in Transformers, if the embeddings are an `nn.Embedding` and the output layer is linear.

        Other embeddings and output layers accept only their present size, and stay as they are.

        Raises:
            ValueError: if such embeddings, or such an output layer, would get another size.
        """
        embeddings, head = self.get_input_embeddings(), getattr(self, "lm_head", None)
        if isinstance(embeddings, nn.Embedding) and not isinstance(head, LogProbabilityHead):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        size, step = new_num_tokens or self.config.vocab_size, pad_to_multiple_of or 1
        size = -(-size // step) * step
        if size != self.config.vocab_size:
            clustered = type(head if isinstance(head, LogProbabilityHead) else embeddings).__name__
            raise ValueError(
                f"The {clustered} of this model cannot be resized: make a model of vocab_size={size} and load the "
                "weights that stay."
            )
        return embeddings


def no_useless_cache(forward: Callable) -> Callable:
    """Change the default of `use_cache` to False where no cache is given and nobody could use a new one.

    With unrolled steps and in sequence scope, there is nothing to cache. And nobody reads a cache that a training step
    makes, except a wrapper that calls a module again in backward (as torch's `checkpoint_wrapper` does): it would solve
    after a past that has the same tokens already.
    """

    names = [*signature(forward).parameters][1:]

    @wraps(forward)
    def with_default(self, *args, **kwargs):
        if self.config.is_cacheable and not (self.training and torch.is_grad_enabled()):
            return forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("use_cache") is None and given.get("cache") is None:
            given["use_cache"] = False
        return forward(self, **given)

    return with_default


class DEQModel(DEQPreTrainedModel):
    """Maps token ids to equilibrium states: embed, solve, normalise.

    Subclasses set `layer_class` and define `_embed` and `_context`. They may replace `norm` and `output_dropout`.
    These two modules are applied to the equilibrium, and do nothing by default. The output field `hidden_states` has
    two entries, unless a subclass records more: the embedded input, which f injects, and `last_hidden_state`.
    """

    layer_class: type[DEQLayer]

    def __init__(self, config: DEQConfig):
        config.validate()  # its fields may have changed since it was constructed
        super().__init__(config)
        self.embed_tokens = self._make_embedding(config)
        self.layers = nn.ModuleList([self.layer_class(config)])
        self.norm, self.output_dropout = nn.Identity(), nn.Identity()

    def _make_embedding(self, config: DEQConfig) -> nn.Module:
        """Return the module that maps ids `(batch, sequence)` to the `inputs_embeds` of `_embed`."""
        return nn.Embedding(config.vocab_size, config.embedding_size)

    def _embed(self, inputs_embeds: Tensor, input_ids: Tensor | None) -> Tensor:
        """Return the embedded input that f injects, `(batch, sequence, input size)`, from the token embeddings."""
        raise TypeError(f"{type(self).__name__} must define _embed.")

    def _context(self, inputs_embeds, attention_mask, position_ids, cache, memory, rows: Rows, **kwargs) -> dict:
        """Return further arguments for the layer's `forward`. They are computed once per call."""
        raise TypeError(f"{type(self).__name__} must define _context.")

    def _read_rows(self, inputs_embeds, attention_mask, position_ids, cache, memory) -> tuple[Tensor | None, Rows]:
        """Return the checked mask, and the structure of the new positions, see `read_rows`."""
        batch, length = inputs_embeds.shape[:2]
        first_query = 0 if cache is None else cache.get_seq_length()
        attention_mask = check_mask(attention_mask, batch, length, first_query)
        if cache is not None and attention_mask is not None and attention_mask.dim() == 4:
            first_query = first_query - cache.get_mask_sizes(length, 0)[1]  # a sliding cache has dropped some keys
        if position_ids is not None:
            check_position_ids(position_ids, batch, length)
            position_ids = position_ids.expand(batch, -1)
        has_past, window = cache is not None or memory is not None, getattr(self.config, "sliding_window", None)
        return attention_mask, read_rows(attention_mask, position_ids, has_past, first_query, length, window)

    def _cache_of_call(self, cache, use_cache: bool, dial: Dial) -> Cache | PagedTexts | None:
        """Return the cache that this call reads and writes: the one that was given, or a new one if it is wanted."""
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            check_cacheable(self.config, dial.unroll_steps)
            refuse_growing_cache(self.layers[0], cache)
        return cache

    @deprecate_kwarg(**FORMER_CACHE_NAME)
    @no_useless_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        memory: tuple[Tensor, ...] | None = None,
        solver_tolerance: float | None = None,
        solver_max_evaluations: int | None = None,
        unroll_steps: int | None = None,
        **kwargs,
    ) -> DEQModelOutputWithPast:
        """Solve for the equilibrium states of the given tokens.

        Args:
            input_ids: `(batch, sequence)`. Alternatively pass `inputs_embeds`, the output of `embed_tokens`.
            attention_mask: `(batch, past + sequence)`, 0 on padding (left or right), or a prepared 4D mask, boolean or
                additive. Padded positions get the zero state and do not influence other positions. A block-diagonal
                4D mask packs several texts into a row. Tokens in a cache should stay as they were masked: a
                DEQ-TrellisNet remembers a state and not its tokens, so it cannot hide them later.
            position_ids: `(batch, sequence)`. By default, positions are counted from the start of the cache. Without
                attention_mask, cache and memory, a new text starts wherever position ids do not rise by one (as in
                Transformers). A row may then hold several packed texts. Each text is solved as if it were alone and
                has its own report, so the fields of the report have shape `(texts,)`. Then the model returns neither a
                cache nor a memory.
            cache: the cache that the previous call returned. Only the new positions are solved.
            use_cache: whether to return the cache; default: `config.use_cache`, but False without a `cache` in a
                training step, with `gradient="unrolled"` and in sequence scope. In training with activation
                checkpointing, no cache is returned, as in Transformers.
            memory: the `memory` that the previous segment of the same text returned: its last states, without
                gradients (truncated backpropagation through time). It replaces a cache in training, with unrolled
                steps, and in sequence scope. A segment with a memory must not be padded, and no cache is returned.
            solver_tolerance, solver_max_evaluations: override the configuration for this call.
            unroll_steps: apply f this number of times with ordinary backpropagation instead of solving. Then no cache
                is returned.

        Returns:
            `last_hidden_state`, the normalised equilibrium `(batch, sequence, hidden_size)`; the cache; and the fields
            of `SolveReport`.

        Raises:
            ValueError: if there is no input or both kinds of input; if the sequence is empty; if ids are out of range;
                if there is a cache, but the model has no equilibrium to cache; if a memory comes with a cache or with
                padding, or belongs to another model; if the mask has a wrong shape or an unsupported structure; if
                packed texts follow a cache or memory, or `cu_seq_lens_q` comes with a mask; if position_ids have a
                wrong shape; if a value of the dial is out of its range, or `unroll_steps` comes with a budget.
            TypeError: if the name of an argument looks like a misspelt argument of the dial.
        """
        refuse_misspelt_dial(kwargs)
        check_inputs(self.config, self.layers[0].input_size, input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        dial = Dial(solver_tolerance, solver_max_evaluations, unroll_steps)
        if memory is not None:
            check_memory(self.layers[0], memory, *inputs_embeds.shape[:2], attention_mask, cache)
        if isinstance(cache, PagedAttentionCache):
            cache, kwargs = PagedTexts(cache, **kwargs), {}
            mask, rows = attention_mask, cache.rows
        else:
            if kwargs.get("cu_seq_lens_q") is not None:
                if attention_mask is not None:
                    raise ValueError("cu_seq_lens_q packs texts into a row without padding: leave attention_mask out.")
                position_ids = positions_of_texts(kwargs["cu_seq_lens_q"]) if position_ids is None else position_ids
            mask, rows = self._read_rows(inputs_embeds, attention_mask, position_ids, cache, memory)
        if memory is not None:
            mask = None  # every token sees the whole memory, and every token of the segment before it
        recomputes = self.layers[0].gradient_checkpointing and self.training
        use_cache = use_cache and not recomputes and unroll_steps is None and memory is None and rows.texts is None
        cache = self._cache_of_call(cache, use_cache, dial)
        context = self._context(inputs_embeds, mask, position_ids, cache, memory, rows, **kwargs)
        hidden_states = self._embed(inputs_embeds, input_ids)
        output = self.layers[0](hidden_states, dial, rows, cache=cache, memory=memory, **context)
        return DEQModelOutputWithPast(
            last_hidden_state=self.output_dropout(self.norm(output.hidden_states)),
            cache=cache if use_cache else None,
            residual=output.solution.residual,
            num_evaluations=output.solution.num_evaluations,
            converged=output.solution.converged,
            jacobian_loss=output.jacobian_loss,
            memory=output.memory if rows == Rows(None, None) else None,
        )


class DEQForCausalLM(DEQPreTrainedModel, DEQGenerationMixin):
    """A language model on a `DEQModel`. Subclasses set `model_class` and may define `_make_head`."""

    model_class: type[DEQModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Trainer and pipelines recognise causal models by the names in this mapping. Label smoothing shifts labels only
        # for these models. The key is the class name, too: so two classes with the same configuration keep two entries.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.__name__] = cls.__name__

    def __init__(self, config: DEQConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = self._make_head(config)
        self.post_init()
        if not config.use_cache:
            self.generation_config.use_cache = False

    def _make_head(self, config: DEQConfig) -> nn.Linear | LogProbabilityHead:
        """Return the output layer."""
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    # Repeats the parameters of `DEQModel.forward`: `generate` and `Trainer` read this signature to select arguments.
    @deprecate_kwarg(**FORMER_CACHE_NAME)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        memory: tuple[Tensor, ...] | None = None,
        logits_to_keep: int | Tensor = 0,
        solver_tolerance: float | None = None,
        solver_max_evaluations: int | None = None,
        unroll_steps: int | None = None,
        **kwargs,
    ) -> DEQCausalLMOutputWithPast:
        """Return the logits of the next tokens, and the loss if there are labels.

        Other arguments are those of `DEQModel.forward`.

        Args:
            labels: `(batch, sequence)`, shifted by this method, -100 ignored. The loss is the mean cross-entropy in
                nats, plus the weighted Jacobian regularization in training.
            logits_to_keep: number of last positions whose logits are returned (0: all positions), or the indices of
                these positions.

        Returns:
            `loss`, a scalar, if there are labels; `logits`, `(batch, positions kept, vocab_size)`; the other fields as
            in `DEQModel.forward`. If the output layer is an adaptive softmax or a mixture of softmaxes, `logits` are
            log-probabilities. In training with labels they are then `None`, because the loss does not need all of them.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            solver_tolerance=solver_tolerance,
            solver_max_evaluations=solver_max_evaluations,
            unroll_steps=unroll_steps,
            **kwargs,
        )
        logits = loss = None
        by_likelihood = isinstance(self.lm_head, LogProbabilityHead)
        if labels is None or not (by_likelihood and self.training):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(outputs.last_hidden_state[:, keep])
        if labels is not None and by_likelihood:
            loss = self._likelihood_loss(outputs.last_hidden_state, labels, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if outputs.jacobian_loss is not None:
            if loss is None:
                logger.warning_once(JACOBIAN_LOSS_LEFT_OUT)
            else:
                loss = loss + self._jacobian_share(labels, **kwargs) * outputs.jacobian_loss
        return DEQCausalLMOutputWithPast(loss=loss, logits=logits, **outputs.passed_on())

    def _logits(self, states: Tensor) -> Tensor:
        """Return the logits `(..., vocab_size)` of states `(..., hidden_size)`."""
        return self.lm_head(states)

    def _likelihood_loss(self, states, labels, shift_labels=None, num_items_in_batch=None, **kwargs) -> Tensor:
        """Return the loss as Transformers' loss function defines it, for output layers that return likelihoods."""
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
        counted = targets != -100
        nats = self.lm_head(states[counted], targets[counted])
        return nats.sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)

    def _jacobian_share(self, labels, shift_labels=None, num_items_in_batch=None, **kwargs) -> Tensor | float:
        """Return the weight of the Jacobian regularization.

        Under gradient accumulation, a micro-batch has the same share of the regularization as of the tokens.
        """
        if num_items_in_batch is None:
            return self.config.jacobian_loss_weight
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        return self.config.jacobian_loss_weight * (targets != -100).sum() / num_items_in_batch
