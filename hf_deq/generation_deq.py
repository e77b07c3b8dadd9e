"""What a solver adds to generation: a report of every forward pass, and drafts by the same weights.

output = model.generate(**inputs, return_dict_in_generate=True)  # output.num_evaluations
output = model.generate(**inputs, assistant_model=model.draft(solver_tolerance=0.1))
"""

import copy
from contextvars import ContextVar

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .layer_deq import Dial

# What `generate` reports of every pass.
REPORTED = ("num_evaluations", "residual", "converged")
# The reports of the `generate` call that is running, `None` if it wants none. Calls may run in several threads.
_reports: ContextVar[list[dict] | None] = ContextVar("_reports", default=None)


class DEQGenerationMixin(GenerationMixin):
    """Transformers' `generate`, with reports and drafts."""

    def generate(self, inputs=None, generation_config: GenerationConfig | None = None, *args, **kwargs):
        """As in Transformers, and what the solves took.

        `solver_tolerance` and `solver_max_evaluations` override the configuration for this call. With an
        `assistant_model` they are for the model alone: the assistant goes by its own configuration.

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
            kwargs = _for_the_assistant(**kwargs)
        previous = _reports.set([] if self._returns_dict(generation_config, kwargs) else None)
        try:
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
        device and before `forward` is compiled.

        It proposes `generation_config.num_assistant_tokens` tokens at a time, 5 by default, whatever its
        confidence: what it is unsure of, the model is unsure of as well, and decides alike.

        Args:
            solver_tolerance: the draft's.
            solver_max_evaluations: the draft's; default: the model's.

        Returns:
            A model of the same class, for batches of one text (as assisted decoding has it).

        Raises:
            ValueError: the draft would be no looser than the model, or a value is out of its range.
        """
        ours = self.config
        budget = ours.solver_max_evaluations if solver_max_evaluations is None else solver_max_evaluations
        if solver_tolerance <= ours.solver_tolerance and budget >= ours.solver_max_evaluations:
            raise ValueError(
                f"A draft with solver_tolerance={solver_tolerance} and solver_max_evaluations={budget} costs as much "
                f"as the model, which has {ours.solver_tolerance} and {ours.solver_max_evaluations}: raise the one "
                "or lower the other."
            )
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        draft = copy.deepcopy(self, shared)
        draft.config.solver_tolerance, draft.config.solver_max_evaluations = solver_tolerance, budget
        draft.config.validate_equilibrium()
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
            "server's continuous batching): that packs the texts of many requests into one row, and the positions of "
            "a row are solved together, so that requests would change each other's tokens. Pass them to generate as "
            "a left-padded batch, whose rows are solved each on its own."
        )


def _for_the_assistant(attention_mask=None, input_ids=None, **kwargs) -> dict:
    """What `generate` passes on to an assistant, without the model's dial, and with a mask where there is no padding.

    The library leaves a mask of ones out; the assistant would then take a padding token that was generated for padding.
    """
    if attention_mask is None and input_ids is not None:
        attention_mask = torch.ones_like(input_ids)
    kwargs = {name: value for name, value in kwargs.items() if name not in Dial.__dataclass_fields__}
    return kwargs | {"attention_mask": attention_mask, "input_ids": input_ids}
