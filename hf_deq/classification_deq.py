"""Sequence classification on a `DEQModel`: one score per label, read off the equilibrium of the last token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_deq import DEQConfig
from .masking_deq import check_mask, token_mask
from .modeling_deq import FORMER_CACHE_NAME, DEQModel, DEQPreTrainedModel, SolveReport


@dataclass
class DEQSequenceClassifierOutputWithPast(SolveReport, SequenceClassifierOutputWithPast):
    """Transformers' output and the report of the solve."""


class DEQForSequenceClassification(DEQPreTrainedModel):
    """A classifier on a `DEQModel`; subclasses set `model_class`. `config.num_labels` is the number of scores."""

    model_class: type[DEQModel]

    def __init__(self, config: DEQConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

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
        """Scores of the labels at the last token of each row; arguments and dial as in `DEQModel.forward`, and:

        Args:
            attention_mask: says which token is the last; without it that is the last one in `input_ids` other than
                `config.pad_token_id`, or the last position of `inputs_embeds`.
            labels: classes `(batch,)`, -100 ignored; with one label or `problem_type="regression"` numbers `(batch,)`
                or `(batch, num_labels)`; for several labels a row 0 and 1 as floats `(batch, num_labels)`. Their loss
                is Transformers' for `config.problem_type`, plus the weighted Jacobian regularization in training.
            num_items_in_batch: labels in all micro-batches of a step: the loss is then this micro-batch's share.

        Returns:
            `loss`, a scalar, with labels; `logits` `(batch, num_labels)`, for a row without tokens those of the zero
            state; the rest as there.

        Raises:
            ValueError: several rows, and neither an attention_mask nor a pad_token_id; or as there.
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
        rows = torch.arange(len(states), device=states.device)
        cache = outputs.cache if cache is None else cache
        past_length = 0 if cache is None else cache.get_seq_length() - states.shape[1]  # it has taken these tokens in
        attention_mask = check_mask(attention_mask, *states.shape[:2], past_length)
        logits = self.score(states[rows, self._last_tokens(states, attention_mask, input_ids)])
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, outputs.jacobian_loss, num_items_in_batch)
        return DEQSequenceClassifierOutputWithPast(loss=loss, logits=logits, **outputs.passed_on())

    def _last_tokens(self, states: Tensor, attention_mask: Tensor | None, input_ids: Tensor | None) -> Tensor:
        """Index of the last token of each row, `(batch,)`, among the `(batch, sequence, hidden)` states."""
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
        """The mean over the labels and the penalty; of a micro-batch, its share of both."""
        loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        if jacobian_loss is not None:
            loss = loss + self.config.jacobian_loss_weight * jacobian_loss
        if num_items_in_batch is None:
            return loss
        # Not left to the loss function, which knows of it for single labels only: regression would count every
        # micro-batch in full.
        counted = (labels != -100).sum()
        # The mean over no labels is not a number.
        return loss * (counted / num_items_in_batch) if counted else 0.0 * logits.sum()
