"""What a task is: something to learn, with examples, a judgement of the result, and words for it."""

from dataclasses import fields
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import ContiguousBatches, StepBatches
from ..evaluation import HeldOut


class Examples(Protocol):
    """A dataset whose length is known."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class Task:
    """Something to learn. Subclasses set what has no value here, and are listed in `TASKS`.

    Attributes:
        name: in a recipe and on the command line, `task: name`.
        arguments: a dataclass; its fields are names of a recipe and flags of training.
        evaluation_arguments: a dataclass; its fields are flags of evaluation.
        recipe: the default recipe of a model type is the one of this name, such as `{model_type}-tiny`.
        examples: a dataset of `input_ids` and the `labels` of the same positions, all of one length.
        held_out: what validation scores.
        model_fields: fields that the configuration of a model must have to learn this.
        tokenizer: `None` if ids are not made from a text.
        recorded: what the recipe of the trained model says besides all arguments.
        carries_memory: whether a batch continues the one before it, so that the model's memory is handed on.
    """

    name: ClassVar[str]
    arguments: ClassVar[type]
    evaluation_arguments: ClassVar[type]
    recipe: ClassVar[str]

    examples: Examples
    held_out: HeldOut
    model_fields: dict
    tokenizer: PreTrainedTokenizerBase | None = None
    recorded: dict = {}
    carries_memory: bool = False

    def __init__(self, arguments, model_fields: dict):
        """Prepare the task.

        Args:
            arguments: an instance of the class `arguments`.
            model_fields: fields of the model's configuration that were asked for.
        """
        raise NotImplementedError

    @classmethod
    def arguments_of(cls, recipe: dict):
        """The arguments that a model was trained with. What its recipe does not name is at its default."""
        return cls.arguments(**{one.name: recipe[one.name] for one in fields(cls.arguments) if one.name in recipe})

    @classmethod
    def judge(cls, folder: str, recipe: dict, arguments) -> HeldOut:
        """What to evaluate a trained model on.

        Args:
            folder: of the model.
            recipe: that it was trained by.
            arguments: an instance of the class `evaluation_arguments`.
        """
        raise NotImplementedError

    def batches(self, steps: range, rows: int, pieces: int, seed: int) -> StepBatches | ContiguousBatches:
        """Indices of the examples of every micro-batch: by default shuffled anew in each epoch.

        Args:
            steps: the optimizer steps.
            rows: examples in a step.
            pieces: micro-batches that a step is split into.
            seed: of the order.
        """
        first, last = steps.start * pieces, steps.stop * pieces
        return StepBatches(len(self.examples), rows // pieces, seed, first, last)

    def baselines(self) -> dict[str, float]:
        """Scores to compare with, for the last line of metrics.jsonl."""
        return {}

    def describe(self, scores: dict[str, float], baselines: dict[str, float], config: PreTrainedConfig) -> str:
        """Say scores and baselines in a sentence or two."""
        raise NotImplementedError

    def save(self, folder: Path, config: PreTrainedConfig) -> None:
        """Write what a model needs besides itself, such as a tokenizer. By default nothing."""

    @property
    def sample_length(self) -> int:
        """Tokens of the longest text that `sample` makes; 0 if it makes none."""
        return 0

    def sample(self, model: PreTrainedModel) -> str | None:
        """An example of what the model does; `None` for no example."""
        return None
