"""How a stream of tokens is read when a model is scored on it, and how the model is solved."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..data import check_at_least


@dataclass(frozen=True)
class Protocol:
    """How a stream is read. `str(protocol)` says it in words.

    Without `carry_memory`, windows of `length` tokens advance by `stride` tokens. A token counts in the window in which
    it has the longest context. With `carry_memory`, `batch_size` contiguous streams are read side by side in segments
    of `length` tokens, and the model's memory of a segment is handed on to the next one.

    Args:
        length: tokens in a window or segment.
        stride: tokens by which a window advances, at most `length` (no overlap); by default half of `length`.
        batch_size: windows in a forward pass; with `carry_memory` the number of streams, which then is part of the
            protocol, because each stream starts without a memory.
        carry_memory: read streams instead of windows.
        drop_remainder: with `carry_memory`: the streams have equal length, and the first token of each stream and the
            remainder are not predicted. This is the protocol of Transformer-XL and of the papers after it.

    Raises:
        ValueError: if a field is out of its range, or is for the other way of reading.
    """

    length: int = 128
    stride: int | None = None
    batch_size: int = 16
    carry_memory: bool = False
    drop_remainder: bool = False

    def __post_init__(self):
        check_at_least(1, length=self.length, batch_size=self.batch_size)
        if self.carry_memory and self.stride is not None:
            raise ValueError(f"stride={self.stride} is for windows: with carry_memory segments follow each other.")
        if self.drop_remainder and not self.carry_memory:
            raise ValueError("drop_remainder is for streams: set carry_memory, or leave it out.")
        if self.stride is not None and not 1 <= self.stride <= self.length:
            raise ValueError(f"stride must lie in 1 to length={self.length}, got {self.stride}.")

    @property
    def advance(self) -> int:
        """Tokens by which a window advances."""
        return self.stride or max(1, self.length // 2)

    def in_words(self, memory_length: int | None = None) -> str:
        """Say the protocol in words.

        Args:
            memory_length: how many tokens the model remembers at most, if its memory has such a limit.
        """
        if not self.carry_memory:
            return f"windows of {self.length}, stride {self.advance}"
        words = f"{self.batch_size} streams in segments of {self.length}, memory carried"
        if memory_length is not None:
            words += f" (at most {memory_length} tokens)"
        return words + (", remainder dropped" if self.drop_remainder else "")

    def __str__(self) -> str:
        return self.in_words()


def solver_settings(config: PreTrainedConfig) -> str:
    """Say which settings of a model's solver decide a result."""
    if not hasattr(config, "solver_scope"):
        return "no solver"
    if config.gradient == "unrolled":
        return f"no solver, {config.solver_max_evaluations} unrolled applications of f"
    return (
        f"solver {config.solver}, scope {config.solver_scope}, tolerance {config.solver_tolerance:g}, at most "
        f"{config.solver_max_evaluations} evaluations"
    )
