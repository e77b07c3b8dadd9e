"""What a solver adds to generation: a report of every forward pass, and drafts by the same weights.

output = model.generate(**inputs, return_dict_in_generate=True)  # output.num_evaluations
output = model.generate(**inputs, assistant_model=model.draft(solver_tolerance=0.1))
"""

import copy
from contextvars import ContextVar

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .cache_deq import check_cacheable
from .layer_deq import Dial
from .weight_tying import keeping_weights

# What is said of every solve, in this order.
REPORTED = ("num_evaluations", "residual", "converged")
# The reports of the `generate` call that is running, `None` if it wants none. Calls may run in several threads.
_reports: ContextVar[list[dict] | None] = ContextVar("_reports", default=None)


class DEQGenerationMixin(GenerationMixin):
    """Transformers' `generate`, with reports and drafts."""

    def generate(self, inputs=None, generation_config: GenerationConfig | None = None, *args, **kwargs):
        """As in Transformers, and what the solves took.

        `solver_tolerance` and `solver_max_evaluations`, here or in the `generation_config`, override the model's
        configuration for this call. An `assistant_model` goes by its own configuration.

        Compiled, as by Transformers itself with a static cache on an accelerator, a solve cannot stop before its
        budget is spent: pass a small `solver_max_evaluations`, or `disable_compile=True`. The tokens are the same.

        Returns:
            The ids, `(batch, sequence)`; with `return_dict_in_generate` the library's output with three more fields.
            `num_evaluations`, `residual` and `converged` hold one tensor `(rows,)` for each forward pass, rows
            being sequences or beams: first the prompt's (its last chunk, with `prefill_chunk_size`), then one for
            every new token but the last. In assisted decoding a pass checks several tokens, and what
            the assistant took is not in it.

        Raises:
            ValueError, TypeError: as in Transformers and in the model's `forward`.
        """
        if generation_config is not None and generation_config.is_assistant:
            kwargs = _with_a_mask(**kwargs)
        previous = _reports.set([] if self._returns_dict(generation_config, kwargs) else None)
        try:
            with keeping_weights():
                output = super().generate(inputs, generation_config, *args, **kwargs)
            reports = _reports.get()
        finally:
            _reports.reset(previous)
        if reports and isinstance(output, ModelOutput):
            for name in REPORTED:
                output[name] = tuple(report[name] for report in reports)
        return output

    def _returns_dict(self, generation_config: GenerationConfig | None, kwargs: dict) -> bool:
        """Whether `generate` will return more than ids: the call says it, or its configuration, or the model's."""
        configs = [kwargs, *(vars(config) for config in (generation_config, self.generation_config) if config)]
        values = (config.get("return_dict_in_generate") for config in configs)
        return next((value for value in values if value is not None), False)

    def _prepare_generation_config(self, *args, **kwargs):
        """A generation configuration keeps any field, and with it the dial, which is for `forward`."""
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        dial = {name: getattr(generation_config, name, None) for name in Dial.__dataclass_fields__}
        return generation_config, model_kwargs | {name: value for name, value in dial.items() if value is not None}

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        """An assistant gets all but the dial, which is this model's."""
        of_both = {name: value for name, value in model_kwargs.items() if name not in Dial.__dataclass_fields__}
        return super()._get_candidate_generator(*args, model_kwargs=of_both, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, *args, **kwargs):
        """Every way of decoding comes by here after every pass, outside of what may be compiled."""
        reports = _reports.get()
        if reports is not None:  # copies, since a CUDA graph writes its next outputs into the same memory
            reports.append({name: outputs[name].clone() for name in REPORTED})
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def draft(self, solver_tolerance: float = 0.1, solver_max_evaluations: int | None = None):
        """This model at a looser dial, as an assistant of itself: `generate(..., assistant_model=model.draft())`.

        Assisted decoding (Leviathan et al. 2023, arXiv 2211.17192) lets it propose a few tokens, which one pass of
        the model then checks. Greedy text stays what it is, but for ties within the model's tolerance; sampled text
        keeps its distribution. The draft's parameters are the model's, not copies: training, moving or casting one
        does so to both. Modules, `config` and `generation_config` are its own. Make it after the model is on its
        device, and compile `forward`, if at all, after that.

        It proposes `generation_config.num_assistant_tokens` tokens at a time, 5 by default, whatever its
        confidence: what it is unsure of, the model is unsure of as well, and decides alike.

        Args:
            solver_tolerance: the draft's.
            solver_max_evaluations: the draft's; default: the model's.

        Returns:
            A model of the same class, for batches of one text (as assisted decoding has it).

        Raises:
            ValueError: the draft would be no looser than the model, a value is out of its range, or the model has no
                equilibrium to cache, without which there is no assisted decoding.
        """
        ours = self.config
        check_cacheable(ours)
        budget = ours.solver_max_evaluations if solver_max_evaluations is None else solver_max_evaluations
        if solver_tolerance <= ours.solver_tolerance and budget >= ours.solver_max_evaluations:
            raise ValueError(
                f"A draft with solver_tolerance={solver_tolerance} and solver_max_evaluations={budget} costs as much "
                f"as the model, which has {ours.solver_tolerance} and {ours.solver_max_evaluations}: raise the one "
                "or lower the other."
            )
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        draft = copy.deepcopy(self, shared)
        for compiled in (
            "_compiled_call",
            "_last_compile_config",
        ):  # a function of the model's modules, not the draft's
            vars(draft).pop(compiled, None)
        draft.config.solver_tolerance, draft.config.solver_max_evaluations = solver_tolerance, budget
        draft.config.validate_equilibrium()
        for name in Dial.__dataclass_fields__:  # a dial that stands there would go before the draft's own
            vars(draft.generation_config).pop(name, None)
        draft.generation_config.num_assistant_tokens = 5
        draft.generation_config.assistant_confidence_threshold = 0.0
        return draft

    def init_continuous_batching(self, *args, **kwargs):
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be batched continuously (generate_batch, cache_implementation='paged', a "
            "server's continuous batching). That puts the new tokens of many requests into one row, each with a past "
            "of its own in a paged cache, and a solve is told of packed texts only where there is no cache. Pass the "
            "requests to generate as a left-padded batch, whose rows are solved each on its own."
        )


def _with_a_mask(attention_mask=None, input_ids=None, **kwargs) -> dict:
    """What `generate` passes on to an assistant, with a mask where there is no padding.

    The library leaves a mask of ones out; the assistant would then take a padding token that was generated for padding.
    """
    if attention_mask is None and input_ids is not None:
        attention_mask = torch.ones_like(input_ids)
    return kwargs | {"attention_mask": attention_mask, "input_ids": input_ids}
