"""Generation with a solver: a report of every forward pass, and drafts with the same weights.

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

# The reported fields of every solve, in this order.
REPORTED = ("num_evaluations", "residual", "converged")
# The reports of the running `generate` call, or `None` if it needs no reports. Calls may run in several threads.
_reports: ContextVar[list[dict] | None] = ContextVar("_reports", default=None)


class DEQGenerationMixin(GenerationMixin):
    """Transformers' `generate`, extended by reports and drafts."""

    def generate(self, inputs=None, generation_config: GenerationConfig | None = None, *args, **kwargs):
        """Generate as in Transformers, with a report of the solves.

        `solver_tolerance` and `solver_max_evaluations`, given here or in the `generation_config`, override the model's
        configuration for this call. An `assistant_model` uses its own configuration.

        A compiled solve always spends its full budget. (Transformers itself compiles with a static cache on an
        accelerator.) Pass a small `solver_max_evaluations`, or `disable_compile=True`. The tokens are the same with
        and without compilation.

        Returns:
            The ids, `(batch, sequence)`. With `return_dict_in_generate`, Transformers' output with three more fields:
            `num_evaluations`, `residual` and `converged`. Each holds one tensor `(rows,)` for each forward pass; rows
            are sequences or beams. The first pass is that of the prompt (with `prefill_chunk_size`, its last chunk).
            Then every new token except the last has one pass. In assisted decoding, a pass checks several tokens, and
            the assistant's own solves are not reported.

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
        """Return whether `generate` returns a dict.

        The first setting found decides: in the call, in its generation configuration, or in the model's.
        """
        configs = [kwargs, *(vars(config) for config in (generation_config, self.generation_config) if config)]
        values = (config.get("return_dict_in_generate") for config in configs)
        return next((value for value in values if value is not None), False)

    def _prepare_generation_config(self, *args, **kwargs):
        """Pass the dial on to `forward`.

        A generation configuration keeps unknown fields, so it may hold the dial.
        """
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        dial = {name: getattr(generation_config, name, None) for name in Dial.__dataclass_fields__}
        return generation_config, model_kwargs | {name: value for name, value in dial.items() if value is not None}

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        """Pass all arguments to the assistant, except the dial: it is set for this model only."""
        of_both = {name: value for name, value in model_kwargs.items() if name not in Dial.__dataclass_fields__}
        return super()._get_candidate_generator(*args, model_kwargs=of_both, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, *args, **kwargs):
        """Record the report of a pass. Every decoding method calls this after every pass, outside of compiled code."""
        reports = _reports.get()
        if reports is not None:  # copies, because a CUDA graph writes its next outputs to the same memory
            reports.append({name: outputs[name].clone() for name in REPORTED})
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def draft(self, solver_tolerance: float = 0.1, solver_max_evaluations: int | None = None):
        """Return a draft: this model with a looser dial. Use it as `generate(..., assistant_model=model.draft())`.

        In assisted decoding (Leviathan et al. 2023, arXiv 2211.17192), the draft proposes a few tokens. Then one pass
        of the model checks them. Greedy text does not change, except for ties within the model's tolerance. Sampled
        text keeps its distribution. Draft and model share their parameters: training, moving or casting one of them
        changes both. The draft has its own modules, `config` and `generation_config`. Move the model to its device
        before you make the draft, and compile `forward` only afterwards.

        The draft proposes `generation_config.num_assistant_tokens` tokens at a time, 5 by default, regardless of its
        confidence: where the draft is unsure, the model is unsure too, and makes the same choice.

        Args:
            solver_tolerance: tolerance of the draft.
            solver_max_evaluations: budget of the draft; default: that of the model.

        Returns:
            A model of the same class, for batches of one text (a limit of assisted decoding).

        Raises:
            ValueError: if the draft would not be looser than the model, if a value is out of its range, or if the
                model has no equilibrium to cache, because assisted decoding needs a cache.
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
        ):  # refers to the model's modules, not the draft's
            vars(draft).pop(compiled, None)
        draft.config.solver_tolerance, draft.config.solver_max_evaluations = solver_tolerance, budget
        draft.config.validate_equilibrium()
        for name in Dial.__dataclass_fields__:  # a dial here would override the draft's config
            vars(draft.generation_config).pop(name, None)
        draft.generation_config.num_assistant_tokens = 5
        draft.generation_config.assistant_confidence_threshold = 0.0
        return draft

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse continuous batching, which is not supported.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be batched continuously (generate_batch, cache_implementation='paged', a "
            "server's continuous batching). It puts the new tokens of many requests into one row. Each request has its "
            "own past in a paged cache, but a solve supports packed texts only without a cache. Pass the requests to "
            "generate as a left-padded batch, whose rows are solved independently."
        )


def _with_a_mask(attention_mask=None, input_ids=None, **kwargs) -> dict:
    """Return the arguments of an assistant's `generate` call, with a mask of ones if there is no mask.

    Transformers leaves out a mask of ones. Without a mask, the assistant would treat a generated padding token as
    padding.
    """
    if attention_mask is None and input_ids is not None:
        attention_mask = torch.ones_like(input_ids)
    return kwargs | {"attention_mask": attention_mask, "input_ids": input_ids}
