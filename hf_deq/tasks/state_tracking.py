"""State tracking: multiply the elements of a word over a finite group, one after the other.

A word is a sequence of group elements, drawn at random. The target at each position is the product of all elements up
to this position. So the model must keep a state, and the answer at the last position depends on every token. If the
group is not solvable, such as S5, a model of fixed depth can do this only up to some length (Merrill, Petty & Sabharwal
2024, arXiv 2404.08819). So the task is used to study models that iterate until a fixed point (implicit language models,
arXiv 2502.07827).

    "parity"    the two elements 0 and 1; the product is the parity of the ones
    "s3"        the six permutations of three things
    "s5"        the 120 permutations of five things
"""

from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ..data import check_at_least
from .held_out_examples import HeldOutExamples
from .task import Task

MOVED = {"parity": 2, "s3": 3, "s5": 5}  # how many things the permutations of each group move
TRAINING_WORDS, TEST_WORDS = 100_000, 100
LONGER = (2, 4, 8)  # test words are so many times as long as training words
ACCURACIES = ("accuracy", *(f"accuracy_{times}x" for times in LONGER))


@dataclass
class StateTrackingArguments:
    """Words over a finite group: which group, and how long they are."""

    group: str = field(default="s3", metadata={"help": "parity (2 elements), s3 (6) or s5 (120)."})
    word_length: int = field(default=32, metadata={"help": "Elements in a training word."})

    def __post_init__(self):
        check_at_least(1, word_length=self.word_length)
        if self.group not in MOVED:
            raise ValueError(f"group must be one of {', '.join(MOVED)}, got {self.group!r}.")


@dataclass
class StateTrackingEvaluation:
    """How test words are scored."""

    batch_size: int = field(default=50, metadata={"help": "Test words per forward pass."})
    words: int = field(default=TEST_WORDS, metadata={"help": "Number of test words."})

    def __post_init__(self):
        check_at_least(1, batch_size=self.batch_size, words=self.words)


class StateTracking(Task):
    """Multiply the elements of a word."""

    name = "state_tracking"
    arguments = StateTrackingArguments
    evaluation_arguments = StateTrackingEvaluation
    recipe = "state-tracking"

    held_out: "HeldOutWords"

    def __init__(self, arguments: StateTrackingArguments, model_fields: dict):
        self.examples = Words(arguments.group, arguments.word_length, TRAINING_WORDS, seed=0)
        self.held_out = HeldOutWords.longer(arguments)
        self.model_fields = {"vocab_size": self.examples.order}

    @classmethod
    def judge(cls, folder, recipe, arguments):
        return HeldOutWords.longer(cls.arguments_of(recipe), arguments.words, arguments.batch_size)

    def __str__(self) -> str:
        words = self.examples
        return f"state tracking over {words.group} ({words.order} elements), words of {words.length} elements"

    def baselines(self):
        """The accuracy of guessing."""
        return {"guessed_accuracy": 1 / self.examples.order}

    def describe(self, scores, baselines, config):
        said = ", ".join(
            f"{scores[name]:.1%} at {length}" for name, length in zip(ACCURACIES, self.held_out.lengths, strict=True)
        )
        return f"right products in the last quarter of a word: {said} (guessed {baselines['guessed_accuracy']:.1%})"

    @property
    def sample_length(self):
        return self.held_out.lengths[-1]

    def sample(self, model):
        """A test word, its products and those of the model."""
        example = self.held_out.examples[0]
        given = model(example["input_ids"][None].to(model.device)).logits[0].argmax(-1)
        shown = slice(self.examples.length)
        return "\n".join(
            f"{what:<9}{' '.join(map(str, ids[shown].tolist()))}"
            for what, ids in (("word", example["input_ids"]), ("products", example["labels"]), ("given", given))
        )


@dataclass(frozen=True)
class HeldOutWords(HeldOutExamples):
    """Test words that are longer than those of training.

    Measured are the loss over the positions of a training word, and the share of right products in the last quarter of
    each length.

    Args:
        trained_length: elements in a training word.
    """

    examples: "Words"
    trained_length: int = 32
    dataset = "state_tracking"
    measured = ("loss", *ACCURACIES)
    metrics = ACCURACIES
    headline = "accuracy"

    @classmethod
    def longer(cls, trained: StateTrackingArguments, words: int = TEST_WORDS, batch_size: int = 50) -> "HeldOutWords":
        """Make the test words for a training."""
        test = Words(trained.group, trained.word_length * max(LONGER), words, seed=1)
        return cls(test, batch_size, trained.word_length)

    @property
    def lengths(self) -> list[int]:
        """The lengths at which accuracy is measured."""
        return tested_lengths(self.trained_length)

    def measure(self, logits, labels):
        nats = cross_entropy(logits.transpose(1, 2), labels, reduction="none")[:, : self.trained_length].mean(1)
        right = (logits.argmax(-1) == labels).double()
        quarters = [right[:, length - max(1, length // 4) : length].mean(1) for length in self.lengths]
        return torch.stack([nats, *quarters])

    def describe(self, scores, config):
        return (
            f"state tracking over {self.examples.group}: {len(self.examples):,} test words of up to "
            f"{self.lengths[-1]} elements, trained on words of {self.trained_length}; the accuracies are those of the "
            f"last quarter of the lengths {', '.join(map(str, self.lengths))}"
        )


def tested_lengths(word_length: int) -> list[int]:
    """The lengths at which accuracy is measured, after training with words of `word_length` elements."""
    return [word_length * times for times in (1, *LONGER)]


class Words(Dataset):
    """Random words over a group, made from a seed.

    Args:
        group: `"parity"`, `"s3"` or `"s5"`.
        length: elements in a word.
        size: number of words.
        seed: of the elements.
    """

    def __init__(self, group: str, length: int, size: int, seed: int):
        self.group, self.length = group, length
        self.table = multiplication_table(MOVED[group])
        self.order = len(self.table)
        generator = torch.Generator().manual_seed(seed)
        self.elements = torch.randint(self.order, (size, length), generator=generator)
        products = [self.elements[:, 0]]
        for position in range(1, length):
            products.append(self.table[products[-1], self.elements[:, position]])
        self.products = torch.stack(products, 1)

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids`, and the products up to each position as `labels`, both `(length,)`."""
        return {"input_ids": self.elements[index], "labels": self.products[index]}


def multiplication_table(moved: int) -> Tensor:
    """Return the products of all pairs of permutations, `(order, order)`. Element 0 is the identity.

    `table[a, b]` is the permutation that first applies a, then b.
    """
    elements = list(permutations(range(moved)))
    ids = {element: index for index, element in enumerate(elements)}
    return torch.tensor([[ids[tuple(b[i] for i in a)] for b in elements] for a in elements])
