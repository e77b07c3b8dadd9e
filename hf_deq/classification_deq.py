"""Sequence classification with a `DEQModel`: one score per label, from the equilibrium at the last token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_deq import DEQConfig
from .masking_deq import check_mask, token_mask
from .modeling_deq import (
    FORMER_CACHE_NAME,
    JACOBIAN_LOSS_LEFT_OUT,
    DEQModel,
    DEQPreTrainedModel,
    SolveReport,
    logger,
)


@dataclass
class DEQSequenceClassifierOutputWithPast(SolveReport, SequenceClassifierOutputWithPast):
    """Transformers' output, and the report of the solve."""


class DEQForSequenceClassification(DEQPreTrainedModel):
    """A classifier on a `DEQModel`. Subclasses set `model_class`. `config.num_labels` is the number of scores."""

    model_class: type[DEQModel]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Pipelines recognise classifiers by the names in this mapping.
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[cls.__name__] = cls.__name__

    def __init__(self, config: DEQConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    # `generate` and `Trainer` read this signature to decide which arguments they pass, so the list is repeated here.
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
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> DEQSequenceClassifierOutputWithPast:
        """Return the scores of the labels at the last token of each row.

        Other arguments and the dial are those of `DEQModel.forward`.

        Args:
            attention_mask: determines the last token of each row. Without a mask, it is the last token in `input_ids`
                that is not `config.pad_token_id`, or the last position of `inputs_embeds`.
            labels: classes `(batch,)`, -100 ignored. For regression, numbers: `(batch,)` with one label, which is
                always regression, and `(batch, num_labels)` with `problem_type="regression"`. For several labels per
                row: 0 and 1 as floats `(batch, num_labels)`. The loss is that of Transformers for
                `config.problem_type`, plus the weighted Jacobian regularization in training.
            num_items_in_batch: number of labels in all micro-batches of a step. The loss is then the share of this
                micro-batch.

        Returns:
            `loss`, a scalar, if there are labels; `logits` `(batch, num_labels)`, computed from the zero state for a
            row without tokens; the other fields as in `DEQModel.forward`.

        Raises:
            ValueError: if `input_ids` has several rows, and there is neither an attention_mask nor a pad_token_id; if
                several texts are packed into a row; or as in `DEQModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            **kwargs,
        )
        states = outputs.last_hidden_state
        if len(outputs.residual) != len(states):
            raise ValueError(
                "position_ids start again, or attention_mask has blocks: several texts are packed into a row. A "
                "classifier returns one score for each row: pass one text a row."
            )
        rows = torch.arange(len(states), device=states.device)
        cache = outputs.cache if cache is None else cache
        past_length = 0 if cache is None else cache.get_seq_length() - states.shape[1]  # it holds these tokens already
        attention_mask = check_mask(attention_mask, *states.shape[:2], past_length)
        logits = self.score(states[rows, self._last_tokens(states, attention_mask, input_ids)])
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, outputs.jacobian_loss, num_items_in_batch)
        elif outputs.jacobian_loss is not None:
            logger.warning_once(JACOBIAN_LOSS_LEFT_OUT)
        return DEQSequenceClassifierOutputWithPast(loss=loss, logits=logits, **outputs.passed_on())

    def _last_tokens(self, states: Tensor, attention_mask: Tensor | None, input_ids: Tensor | None) -> Tensor:
        """Return the index of the last token of each row, `(batch,)`; states are `(batch, sequence, hidden)`."""
        batch, length = states.shape[:2]
        tokens, pad_token_id = None, self.config.pad_token_id
        if attention_mask is not None:
            tokens = token_mask(attention_mask, attention_mask.shape[-1] - length, length)
        elif input_ids is not None and pad_token_id is not None:
            tokens = input_ids != pad_token_id
        elif input_ids is not None and batch > 1:
            raise ValueError(
                f"pad_token_id is not set, so the last token of each of {batch} rows is unknown: set "
                "config.pad_token_id, or pass attention_mask."
            )
        positions = torch.arange(length, device=states.device).expand(batch, -1)
        return (positions if tokens is None else positions * tokens).argmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor, jacobian_loss: Tensor | None, num_items_in_batch) -> Tensor:
        """Return the mean loss over the labels plus the penalty, or the share of a micro-batch in this sum."""
        loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        if jacobian_loss is not None:
            loss = loss + self.config.jacobian_loss_weight * jacobian_loss
        if num_items_in_batch is None:
            return loss
        # The loss function would use num_items_in_batch for single labels only. Regression would count every
        # micro-batch in full. So the share is computed here.
        counted = (labels != -100).sum()
        # Without labels, the mean is not a number.
        return loss * (counted / num_items_in_batch) if counted else 0.0 * logits.sum()
