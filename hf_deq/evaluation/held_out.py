"""What a model is judged on: a held-out text, or the test sequences of a synthetic task.

Every task of `hf_deq.tasks` has one. Training validates on it, and `evaluate_dial` scores it at several settings of the
dial. Figures are drawn from it.
"""

from dataclasses import asdict, dataclass

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..data import TokenStream
from .convergence import held_out_windows
from .protocol import Protocol, solver_settings
from .scoring import evaluate_perplexity


class HeldOut:
    """What a model is judged on.

    Attributes:
        dataset, split: what they are called in a model card.
        metrics: which metrics a table shows, of those in `reports.METRICS`.
        headline: the metric of figures.
    """

    dataset: str
    split: str
    metrics: tuple[str, ...]
    headline: str

    def score(self, model: PreTrainedModel, accelerator=None, progress: bool = False, **dial) -> dict[str, float]:
        """Score a model; the metrics, and the means of `num_evaluations`, `residual` and `converged`."""
        raise NotImplementedError

    def describe(self, scores: dict[str, float], config: PreTrainedConfig) -> str:
        """Say what was measured, and how."""
        raise NotImplementedError

    def windows(self, count: int) -> Tensor:
        """Inputs `(count, length)` to look at solves; fewer rows if there are no more."""
        raise NotImplementedError

    @property
    def carries_memory(self) -> bool:
        """Whether scoring hands the model's memory on."""
        return False


@dataclass(frozen=True)
class HeldOutText(HeldOut):
    """A text that a language model has not seen.

    Args:
        dataset, split: the corpus and its split.
        stream: the tokens to predict.
        start_id: the token from which the first one is predicted.
        protocol: how the stream is read.
    """

    dataset: str
    split: str
    stream: TokenStream
    start_id: int
    protocol: Protocol
    metrics = ("bits_per_byte", "perplexity", "word_perplexity")
    headline = "perplexity"

    def score(self, model, accelerator=None, progress=False, **dial):
        return asdict(
            evaluate_perplexity(model, self.stream, self.start_id, self.protocol, accelerator, progress, **dial)
        )

    def describe(self, scores, config):
        unknown = f", {self.stream.num_unknown:,} of them read as <unk>" if self.stream.num_unknown else ""
        return (
            f"the {self.split} split: {scores['num_tokens']:,} of {len(self.stream.ids):,} tokens counted "
            f"({self.stream.num_words:,} words{unknown}, {self.stream.num_bytes:,} bytes), "
            f"{self.how(config)}, unless a row says otherwise"
        )

    @property
    def carries_memory(self):
        return self.protocol.carry_memory

    def how(self, config: PreTrainedConfig) -> str:
        """Say how the stream is read and how the model is solved."""
        memory_length = getattr(config, "memory_length", None)
        return f"{self.protocol.in_words(memory_length)}; {solver_settings(config)}"

    def windows(self, count):
        return held_out_windows(self.stream.ids, count, min(self.protocol.length, len(self.stream.ids)))
