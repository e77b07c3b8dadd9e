"""What a model refuses before it solves: inputs, a memory, a cache or arguments that it cannot use."""

from torch import Tensor

from .configuration_deq import DEQConfig
from .layer_deq import DEQLayer, Dial
from .masking_deq import check_mask, token_mask
from .paging_deq import PagedTexts
from .softmax_heads import check_ids


def refuse_misspelt_dial(arguments: dict) -> None:
    """Refuse unknown arguments that look like a misspelt dial.

    Unknown arguments are passed on to the attention function, which would ignore a misspelt dial without an error.
    """
    for name in arguments:
        if name.startswith(("solver", "unroll")):
            raise TypeError(f"forward has no argument {name!r}; the dial is {', '.join(Dial.__dataclass_fields__)}.")


def refuse_growing_cache(layer: DEQLayer, cache) -> None:
    """Refuse a past that is reallocated in every call, if f is compiled for static shapes."""
    if layer.compile_options is None or cache.get_seq_length() == 0 or getattr(cache, "is_compileable", False):
        return
    if not isinstance(cache, PagedTexts) and all(hasattr(one, "past") for one in cache.layers):  # of constant size
        return
    raise ValueError(
        f"f is compiled for static shapes (compile_f), but {type(cache).__name__} grows with every token, so every "
        'token would compile it again: generate with cache_implementation="static", pass a StaticCache, or '
        "use_cache=False."
    )


def check_inputs(config: DEQConfig, input_size: int, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Refuse both kinds of input or none, an empty sequence, wrong shapes, and ids out of range."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    given, name, dims = (inputs_embeds, "inputs_embeds", 3) if input_ids is None else (input_ids, "input_ids", 2)
    if given.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, batch and sequence first; got {tuple(given.shape)}.")
    if given.shape[1] == 0:
        raise ValueError("The input is empty: give at least one token (a beginning-of-text token will do).")
    if inputs_embeds is not None and inputs_embeds.shape[-1] != input_size:
        raise ValueError(f"inputs_embeds must be (batch, sequence, {input_size}), got {tuple(inputs_embeds.shape)}.")
    if input_ids is not None:
        check_ids("input_ids", input_ids, config.vocab_size)


def check_position_ids(position_ids: Tensor, batch: int, length: int) -> None:
    """Refuse position ids that are not one for each token."""
    if position_ids.shape not in ((1, length), (batch, length)):
        raise ValueError(
            f"position_ids must be (batch, sequence) = ({batch}, {length}) or (1, {length}), got "
            f"{tuple(position_ids.shape)}. (If they come from cu_seq_lens_q: it must end with the length of the row.)"
        )


def check_memory(layer: DEQLayer, memory, batch: int, length: int, attention_mask: Tensor | None, cache) -> None:
    """Refuse a memory that comes with a cache or padding, or does not belong to this model and these rows.

    Args:
        layer: of the model.
        memory: as the caller gave it.
        batch: number of rows.
        length: number of new positions.
        attention_mask: as the caller gave it. A 2D mask may have columns for the memory.
        cache: as the caller gave it.
    """
    sizes = layer.memory_sizes
    if cache is not None:
        raise ValueError(
            "memory and cache both say what came before: pass one of them (generate makes a cache of its "
            "own; use_cache=False keeps it from doing so)."
        )
    if not sizes:
        remedy = "set memory_length in its configuration" if hasattr(layer.config, "memory_length") else "use a cache"
        raise ValueError(f"memory was given to a model that remembers nothing: {remedy}.")
    any_length = memory[0].shape[1] if len(memory) and memory[0].dim() == 3 else "positions"
    lengths = layer.memory_lengths or [any_length] * len(sizes)
    shapes = [(batch, positions, size) for positions, size in zip(lengths, sizes, strict=True)]
    if isinstance(memory, Tensor) or not memory or [tuple(state.shape) for state in memory] != shapes:
        raise ValueError(
            f"memory must be the output of this model for the same {batch} rows, a tuple of states of shapes {shapes}; "
            f"got {[tuple(state.shape) for state in memory]}."
        )
    if attention_mask is None:
        return
    if attention_mask.dim() == 4 and attention_mask.shape[-1] != length:
        raise ValueError(
            f"a 4D attention_mask after a memory is for the new positions only, ({batch}, heads, {length}, {length}): "
            f"every token sees the whole memory. Got {tuple(attention_mask.shape)}."
        )
    if not bool(_tokens(attention_mask, batch, length).all()):
        raise ValueError(
            "memory goes on where a text stopped, so there can be no padding: pass segments of one length, without "
            "zeros in attention_mask, or leave the mask out."
        )


def _tokens(attention_mask: Tensor, batch: int, length: int) -> Tensor:
    """Return which positions are tokens, those of the memory included if a 2D mask has columns for them."""
    if attention_mask.dim() == 2:
        return attention_mask
    return token_mask(check_mask(attention_mask, batch, length, 0), 0, length)
