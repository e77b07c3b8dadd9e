"""Generation with a solver: a report of every forward pass, and drafts with the same weights.

output = model.generate(**inputs, return_dict_in_generate=True)  # output.num_evaluations
output = model.generate(**inputs, assistant_model=model.draft(solver_tolerance=0.1))
"""

import copy
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import replace

import torch
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .cache_deq import check_cacheable
from .configuration_deq import attention_name
from .layer_deq import Dial
from .softmax_heads import check_ids
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
            with nullcontext() if self.training else keeping_weights():  # in training, every token drops other weights
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

    def _asks_for_cache(self, generation_config: GenerationConfig | None, kwargs: dict) -> bool:
        """Whether a call of `generate` asks for a cache.

        `use_cache` of a generation configuration does not count: one that was saved may have the default of another
        gradient.
        """
        if kwargs.get("use_cache") is not None:
            return kwargs["use_cache"]
        kind = getattr(generation_config, "cache_implementation", None)
        return kwargs.get("cache_implementation", kind) is not None

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """Pass the dial on to `forward`, and leave out the cache if there is nothing to cache.

        A generation configuration keeps unknown fields, so it may hold the dial.

        Raises:
            ValueError: if the call asks for a cache, and there is nothing to cache; if it asks for a draft of the first
                layers: all evaluations have the same layers.
        """
        asks_for_cache = self._asks_for_cache(generation_config, kwargs)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit drafts with the first layers of a stack, and an equilibrium has no stack: pass "
                "assistant_model=model.draft()."
            )
        if asks_for_cache:
            check_cacheable(self.config)
        elif not self.config.is_cacheable:
            generation_config.use_cache = False
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
        for compiled in ("_compiled_call", "_last_compile_config"):  # both refer to the modules of the model
            vars(draft).pop(compiled, None)
        draft.config.solver_tolerance, draft.config.solver_max_evaluations = solver_tolerance, budget
        draft.config.validate_equilibrium()
        for name in Dial.__dataclass_fields__:  # a dial here would override the draft's config
            vars(draft.generation_config).pop(name, None)
        draft.generation_config.num_assistant_tokens = 5
        draft.generation_config.assistant_confidence_threshold = 0.0
        return draft

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """Generate as in Transformers: continuous batching of requests, each equal to `generate` alone.

        Raises:
            TypeError: if the dial is passed: all requests are solved with the model's configuration.
            ValueError: as in `init_continuous_batching`; if a request is empty or has ids out of range; if `generate`
                passes on a mask of padded rows.
        """
        _refuse_dial(kwargs)
        self._check_has_pages()
        for input_ids in inputs:
            self._check_request(input_ids)
        if kwargs.get("attention_mask") is not None and not bool(kwargs["attention_mask"].all()):
            raise ValueError(
                "attention_mask has padding, but requests have none: call generate_batch with one list of ids for each "
                "request."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints=None,
    ) -> ContinuousBatchingManager:
        """Return Transformers' manager of continuous batching, with eager or scaled-dot-product attention.

        Each request is solved as if it were alone, and stops by itself. Its text is that of `generate` for the prompt
        alone, except for ties within the model's tolerance: a long prompt may be solved in parts, and requests may
        share the pages of a common beginning. `continuous_batching_config` is not changed. Flash attention, which
        Transformers would choose on a GPU, is left out. The manager's `add_request` refuses empty requests and ids out
        of range.

        Raises:
            TypeError: if the generation configuration sets the dial: all requests are solved with the model's
                configuration.
            ValueError: if the model has no keys and values, or no equilibrium to cache; if its attention is neither
                `"eager"` nor `"sdpa"`; if there is more than one beam; if the configuration asks for compilation or
                CUDA graphs, which cannot stop when every request has converged.
        """
        # A copy, because Transformers notes in it that there is no end-of-text token.
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        self._check_continuous_batching(generation_config)
        asked = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
        config = _without_graphs(asked or ContinuousBatchingConfig())
        manager = super().init_continuous_batching(generation_config, config, workload_hints)

        def add_request(input_ids: list[int], *args, **kwargs) -> str | None:
            self._check_request(input_ids)
            return ContinuousBatchingManager.add_request(manager, input_ids, *args, **kwargs)

        manager.add_request = add_request
        return manager

    def _check_continuous_batching(self, generation_config: GenerationConfig) -> None:
        """Refuse what `init_continuous_batching` says that it refuses, except for fields of its own configuration."""
        self._check_has_pages()
        check_cacheable(self.config)
        _refuse_dial(vars(generation_config))
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams={generation_config.num_beams}: continuous batching follows one beam for each request. "
                "Leave num_beams out, or pass the requests to generate."
            )
        if attention_name(self.config) not in ("eager", "sdpa"):
            raise ValueError(
                f"Continuous batching needs attn_implementation='sdpa' or 'eager', got "
                f"{self.config._attn_implementation!r}: call model.set_attn_implementation('sdpa')."
            )

    def _check_has_pages(self) -> None:
        """Refuse a model without keys and values."""
        if not self._supports_attention_backend:
            raise ValueError(
                f"{type(self).__name__} cannot be batched continuously (generate_batch, cache_implementation='paged', "
                "a server's continuous batching). Paged caches hold keys and values for every token, but this model "
                "keeps a state of constant size. Pass the requests to generate as a left-padded batch, whose rows are "
                "solved independently."
            )

    def _check_request(self, input_ids: list[int]) -> None:
        """Refuse a request that cannot be solved. In a shared row, its error would end the requests of everybody.

        Raises:
            ValueError: if it is empty, or has ids out of range.
        """
        if len(input_ids) == 0:
            raise ValueError("A request is empty: give at least one token (a beginning-of-text token will do).")
        check_ids("input_ids", torch.tensor(input_ids), self.config.vocab_size)


def _refuse_dial(arguments: dict) -> None:
    """Refuse arguments of the dial, which continuous batching does not pass on to `forward`."""
    given = [name for name in Dial.__dataclass_fields__ if arguments.get(name) is not None]
    if given:
        raise TypeError(
            f"Continuous batching solves all requests with the model's configuration, so it takes no {given[0]}: set "
            f"model.config.{given[0]}, or serve a model.draft()."
        )


def _without_graphs(config: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
    """Return the configuration without what Transformers would choose on a GPU: flash attention and CUDA graphs.

    Raises:
        ValueError: if the configuration asks for compilation or CUDA graphs.
    """
    fields = ("varlen_compile_config", "decode_compile_config", "default_compile_level", "use_cuda_graph")
    for name in fields:
        value = config.cuda_graph_booleans if name == "use_cuda_graph" else (getattr(config, name),)
        if any(value):
            raise ValueError(
                f"ContinuousBatchingConfig: {name}={getattr(config, name)!r} fixes the operations of a forward pass, "
                "but a solve goes on until every request has converged: leave this field out."
            )
    return replace(config, auto_switch_to_flash=False, use_cuda_graph=False)


def _with_a_mask(attention_mask=None, input_ids=None, **kwargs) -> dict:
    """Return the arguments of an assistant's `generate` call, with a mask of ones if there is no mask.

    Transformers leaves out a mask of ones. Without a mask, the assistant would treat a generated padding token as
    padding.
    """
    if attention_mask is None and input_ids is not None:
        attention_mask = torch.ones_like(input_ids)
    return kwargs | {"attention_mask": attention_mask, "input_ids": input_ids}
