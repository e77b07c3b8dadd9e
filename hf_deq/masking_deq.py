"""Read the structure of rows from attention masks and positions: where the tokens are, and which texts are packed.

Transformers reads the same arguments to make attention masks. A deep equilibrium model needs more information from
them, because the solver must also know which positions belong together. Unsupported structures raise an error.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from .packed_texts import Texts


class Rows(NamedTuple):
    """The structure of the new positions of a call.

    Attributes:
        tokens: which positions are tokens, bool `(batch, sequence, 1)`; `None` if all positions are tokens.
        texts: which positions belong to the same text; `None` if every row is one text.
    """

    tokens: Tensor | None
    texts: Texts | None


def positions_of_texts(cumulative_lengths: Tensor) -> Tensor:
    """Return `position_ids` `(1, sequence)` of texts packed into one row, from `cu_seq_lens_q` `(texts + 1,)`."""
    starts, lengths = cumulative_lengths[:-1], cumulative_lengths.diff()
    positions = torch.arange(int(cumulative_lengths[-1]), device=cumulative_lengths.device)
    return (positions - starts.repeat_interleave(lengths))[None]


def check_mask(attention_mask: Tensor | None, batch: int, length: int, past_length: int | Tensor) -> Tensor | None:
    """Return the checked mask. A 2D mask is cut after column `past + sequence`: as in Llama, later columns are ignored.

    Raises:
        ValueError: if the mask has a wrong shape, or is a 4D mask of integers.
    """
    if attention_mask is None or (torch.compiler.is_compiling() and isinstance(past_length, Tensor)):
        return attention_mask
    shape, columns = tuple(attention_mask.shape), int(past_length) + length
    if attention_mask.dim() == 4:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise ValueError(
                f"a 4D attention_mask must be boolean (True attends) or additive floats, got {attention_mask.dtype}: "
                "as numbers to be added, 0 and 1 would mean something else. Pass attention_mask.bool()."
            )
        if shape[0] not in (1, batch) or shape[2] != length:
            raise ValueError(f"a 4D attention_mask must be ({batch}, heads, {length}, keys), got {shape}.")
        return attention_mask.expand(batch, -1, -1, -1)
    if attention_mask.dim() != 2 or shape[0] != batch or shape[1] < columns:
        raise ValueError(
            f"attention_mask must be (batch, past + sequence) = ({batch}, {columns}), or 4D for each query and key; "
            f"got {shape}."
        )
    return attention_mask[:, :columns]


def read_rows(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    has_past: bool,
    first_query: int | Tensor,
    length: int,
    sliding_window: int | None = None,
) -> Rows:
    """Return the structure that a checked mask and positions describe.

    Texts are packed if a 4D mask is block-diagonal. Without mask and past, texts are packed if `position_ids` start
    again, as in Transformers.

    Args:
        attention_mask: `(batch, past + sequence)`, or 4D.
        position_ids: `(batch, sequence)`, as the caller gave them.
        has_past: whether a cache or a memory precedes the new positions.
        first_query: column of the mask that belongs to the first new position.
        length: number of new positions.
        sliding_window: number of positions that a 4D mask lets each position attend to.

    Raises:
        ValueError: if a packed row follows a cache or memory, or if a 4D mask has an unsupported structure.
    """
    tokens = texts = None
    if attention_mask is None:
        texts = _restarts(position_ids, length)
    else:
        tokens = token_mask(attention_mask, first_query, length)
        if attention_mask.dim() == 4 and length > 1:
            texts = _blocks(attends(attention_mask)[..., first_query : first_query + length], tokens, sliding_window)
    if texts is not None and has_past:
        raise ValueError(
            "position_ids start again, or attention_mask has blocks: several texts are packed into a row. Such a row "
            "can have neither a cache nor a memory. Leave both out, or pass one text a row."
        )
    if tokens is not None and not torch.compiler.is_compiling() and bool(tokens.all()):
        tokens = None
    return Rows(None if tokens is None else tokens[..., None], texts)


def token_mask(attention_mask: Tensor, first_query: int | Tensor, length: int) -> Tensor:
    """Return which of the new positions are tokens, bool `(batch, length)`. Arguments as in `read_rows`."""
    if attention_mask.dim() == 4:  # a token attends to itself, padding does not
        return attends(attention_mask)[:, 0].diagonal(int(first_query), -2, -1)[:, :length]
    columns = first_query + torch.arange(length, device=attention_mask.device)
    return attention_mask.index_select(1, columns).bool()


def attends(mask: Tensor) -> Tensor:
    """Return a 4D mask, boolean or additive, as bool: True where a query attends to a key."""
    return mask if mask.dtype == torch.bool else mask == 0


INNER_PADDING = (
    "attention_mask has padding between tokens, which this model cannot skip: pad on the left, or on the right of the "
    "whole text (so prompts of generate are padded on the left)."
)


def refuse_inner_padding(rows: Rows, attention_mask: Tensor | None, past_length: int) -> None:
    """Refuse padding between tokens of one text, for models whose state passes through every position.

    Args:
        rows: the structure of the new positions.
        attention_mask: the checked mask of the past and the new positions.
        past_length: number of positions in the past.

    Raises:
        ValueError: if there is such padding.
    """
    if attention_mask is None:
        return
    tokens = None if rows.tokens is None else rows.tokens[..., 0]
    if past_length > 0 and not torch.compiler.is_compiling():  # compiled decoding has one graph
        seen = attention_mask.bool() if attention_mask.dim() == 2 else attends(attention_mask)[:, 0].any(1)
        new = seen[:, past_length:] if tokens is None else tokens
        tokens = torch.cat([seen[:, :past_length], new], 1)
    if tokens is not None and tokens.shape[1] > 1 and _has_inner_padding(tokens, rows.texts):
        raise ValueError(INNER_PADDING)


@torch.compiler.disable
def _has_inner_padding(tokens: Tensor, texts: Texts | None) -> bool:
    previous = _previous_token(tokens)
    same_text = previous >= 0
    if texts is not None:
        same_text &= texts.numbers.gather(1, previous.clamp_min(0)) == texts.numbers
    before = torch.arange(tokens.shape[1], device=tokens.device) - 1
    return bool((tokens & same_text & (previous != before)).any())


def _restarts(position_ids: Tensor | None, length: int) -> Texts | None:
    """Return the texts of rows without a mask, by the rule of Transformers; `None` if every row is one text."""
    return None if position_ids is None or length == 1 else _texts_of_positions(position_ids)


# The number of texts determines tensor shapes. So a compiled model leaves its graph to run the functions below.
@torch.compiler.disable
def _texts_of_positions(position_ids: Tensor) -> Texts | None:
    numbers = find_packed_sequence_indices(position_ids)
    return None if numbers is None else Texts(numbers)


@torch.compiler.disable
def _blocks(allowed: Tensor, tokens: Tensor, sliding_window: int | None) -> Texts | None:
    """Return the texts of a 4D mask `(batch, heads, sequence, sequence)`; `None` if every row is one text.

    Raises:
        ValueError: if a token does not attend to exactly the tokens of its text up to itself (within the window).
    """
    previous, length = _previous_token(tokens), tokens.shape[1]
    attends_previous = allowed[:, 0].gather(2, previous.clamp_min(0)[..., None])[..., 0]
    # A text starts at a token that does not attend to the token before it.
    numbers = (tokens & (previous >= 0) & ~attends_previous).cumsum(1)
    distance = torch.arange(length, device=tokens.device)[:, None] - torch.arange(length, device=tokens.device)
    expected = (distance >= 0) & (numbers[:, :, None] == numbers[:, None]) & tokens[:, None]
    if sliding_window is not None:
        expected &= distance < sliding_window
    if bool(((allowed != expected[:, None]) & tokens[:, None, :, None]).any()):
        window = "" if sliding_window is None else f" (of these, only the last sliding_window={sliding_window})"
        raise ValueError(
            f"a 4D attention_mask must let every token attend to all tokens of its text up to itself{window}, in every "
            "head. Other patterns cannot be honoured, because the solver weighs the positions of a text together."
        )
    return Texts(numbers) if bool(numbers.any()) else None


def _previous_token(tokens: Tensor) -> Tensor:
    """Return the index of the last token before each position, `(batch, sequence)`; -1 if there is none."""
    indices = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    latest = indices.where(tokens, -1).cummax(1).values
    return torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
