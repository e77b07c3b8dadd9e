"""The copy memory task: recall ten symbols after a long delay (Bai, Kolter & Koltun 2019, table 1).

A sequence has delay + 20 ids: ten symbols from 1 to 8, then zeros, and a sign to repeat the symbols. The target is zero
until then, and the ten symbols in the last ten positions. The loss is the cross-entropy over all positions, among ten
classes. A model that remembers nothing scores 10 ln 8 / (delay + 20). Two variants are published:

    "deq"    the sign is a single 9 at position delay + 10 (counted from 1), followed by zeros; 20,000 training
             and 2,000 test sequences
    "tcn"    the last eleven positions are 9 (Bai, Kolter & Koltun 2018); 10,000 and 1,000 sequences
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ..data import check_at_least
from .held_out_examples import HeldOutExamples
from .task import Task

SYMBOLS, CLASSES, BLANK, SIGN = 10, 10, 0, 9
VARIANTS = {"deq": (20_000, 2_000), "tcn": (10_000, 1_000)}


@dataclass
class CopyMemoryArguments:
    """The copy memory task: ten symbols to recall."""

    copy_delay: int = field(default=400, metadata={"help": "Positions from the last symbol to the sign, T."})
    copy_variant: str = field(
        default="deq",
        metadata={"help": "deq (a single sign; 20,000 sequences) or tcn (eleven signs; 10,000 sequences)."},
    )

    def __post_init__(self):
        check_at_least(1, copy_delay=self.copy_delay)
        if self.copy_variant not in VARIANTS:
            raise ValueError(f"copy_variant must be one of {sorted(VARIANTS)}, got {self.copy_variant!r}.")


@dataclass
class CopyMemoryEvaluation:
    """How the test sequences are scored."""

    batch_size: int = field(default=50, metadata={"help": "Test sequences per forward pass."})

    def __post_init__(self):
        check_at_least(1, batch_size=self.batch_size)


class CopyMemoryTask(Task):
    """Recall symbols after a delay."""

    name = "copy_memory"
    arguments = CopyMemoryArguments
    evaluation_arguments = CopyMemoryEvaluation
    recipe = "copy-memory"

    held_out: "HeldOutSequences"

    def __init__(self, arguments: CopyMemoryArguments, model_fields: dict):
        self.examples = CopyMemory(arguments.copy_delay, arguments.copy_variant, "train")
        self.held_out = HeldOutSequences(CopyMemory(arguments.copy_delay, arguments.copy_variant, "test"))
        self.model_fields = {"vocab_size": CLASSES}

    @classmethod
    def judge(cls, folder, recipe, arguments):
        trained = cls.arguments_of(recipe)
        return HeldOutSequences(CopyMemory(trained.copy_delay, trained.copy_variant, "test"), arguments.batch_size)

    def __str__(self) -> str:
        test = self.held_out.examples
        return (
            f"copy memory, variant {test.variant!r}, delay {test.delay}: "
            f"{len(self.examples):,} training and {len(test):,} test sequences"
        )

    def baselines(self):
        """The loss of a model that remembers nothing."""
        return {"memoryless_loss": self.held_out.examples.memoryless_loss}

    def describe(self, scores, baselines, config):
        return (
            f"loss {scores['loss']:.2e} nats per position (without a memory {baselines['memoryless_loss']:.2e}); "
            f"{scores['recalled']:.2%} of the symbols recalled"
        )

    def sample(self, model):
        """One test sequence: the symbols to recall, and the recalled ones."""
        example = self.held_out.examples[0]
        answer = model(example["input_ids"][None].to(model.device)).logits[0].argmax(-1)
        wanted, given = (ids[-SYMBOLS:].tolist() for ids in (example["labels"], answer))
        return f"to recall {wanted}\nrecalled  {given}"


class HeldOutSequences(HeldOutExamples):
    """The test sequences of the task: the loss over all positions, and the share of the symbols recalled."""

    examples: "CopyMemory"
    dataset = "copy_memory"
    metrics = measured = ("loss", "recalled")
    headline = "loss"

    def measure(self, logits, labels):
        nats = cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
        recalled = (logits[:, -SYMBOLS:].argmax(-1) == labels[:, -SYMBOLS:]).double().mean(1)
        return torch.stack([nats, recalled])

    def describe(self, scores, config):
        return (
            f"copy memory, variant {self.examples.variant!r}, delay {self.examples.delay}: "
            f"{len(self.examples):,} test sequences"
        )


class CopyMemory(Dataset):
    """Sequences of the task, made from a seed.

    Args:
        delay: positions from the last symbol to the first sign, the paper's T; at least 1.
        variant: `"deq"` or `"tcn"`.
        split: `"train"` or `"test"`.
        size: number of sequences; by default that of the variant.
        seed: of the symbols. With the same seed the splits differ.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, delay: int, variant: str = "deq", split: str = "train", size: int | None = None, seed: int = 0):
        if variant not in VARIANTS:
            raise ValueError(f"copy_variant must be one of {sorted(VARIANTS)}, got {variant!r}.")
        if delay < 1:
            raise ValueError(f"copy_delay must be at least 1, got {delay}.")
        self.delay, self.variant = delay, variant
        is_test = split == "test"
        size = VARIANTS[variant][is_test] if size is None else size
        generator = torch.Generator().manual_seed(2 * seed + is_test)
        self.symbols = torch.randint(1, CLASSES - 1, (size, SYMBOLS), generator=generator)

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels` of the same positions, each `(delay + 20,)`."""
        inputs = torch.full((self.delay + 2 * SYMBOLS,), BLANK)
        labels = inputs.clone()
        inputs[:SYMBOLS] = labels[-SYMBOLS:] = self.symbols[index]
        sign = self.delay + SYMBOLS - 1
        if self.variant == "deq":
            inputs[sign] = SIGN
        else:
            inputs[sign:] = SIGN
        return {"input_ids": inputs, "labels": labels}

    @property
    def memoryless_loss(self) -> float:
        """Nats per position of a model that knows when to answer, but not what to answer."""
        return SYMBOLS * math.log(8) / (self.delay + 2 * SYMBOLS)
