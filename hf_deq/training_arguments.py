"""What a recipe may say: the names in recipe.yaml and the flags of `scripts/train.py`, besides the model's own."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from .data import BUILT_IN_CORPUS
from .word_level import ID_ORDERS

OPTIMIZERS = ("adamw", "sgd")
LR_SCHEDULER_TYPES = ("cosine", "constant", "multistep")
MIXED_PRECISIONS = ("no", "fp16", "bf16")


@dataclass
class DataArguments:
    """What text to train on, and how it is read."""

    task: ClassVar[str] = "language_modeling"
    corpus: str = field(
        default=BUILT_IN_CORPUS,
        metadata={
            "help": "cpython_docs (built in, no network), a local text file, or a Hub dataset; with word_level a local "
            "folder of train.txt, valid.txt and test.txt, or a Hub dataset of lines."
        },
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    validation_file: str | None = field(default=None, metadata={"help": "Local text file to validate on."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "An existing tokenizer (folder or Hub name); default: train one of vocab_size."}
    )
    word_level: bool = field(
        default=False,
        metadata={
            "help": "Whitespace-separated words as tokens, one <eos> a line, vocabulary of the training files, as the "
            "paper reads Penn Treebank and WikiText-103."
        },
    )
    id_order: str = field(
        default="frequency",
        metadata={"help": "Ids of words by falling frequency (as Transformer-XL) or by appearance (as TrellisNet)."},
    )
    sequence_length: int = field(default=128, metadata={"help": "Predicted tokens per training sequence."})
    carry_memory: bool = field(
        default=False,
        metadata={
            "help": "Read the text as batch_size contiguous streams and hand the model's memory of each sequence on to "
            "the next (truncated backpropagation through time); validation does so too."
        },
    )

    def __post_init__(self):
        if self.id_order not in ID_ORDERS:
            raise ValueError(f"id_order must be one of {', '.join(ID_ORDERS)}, got {self.id_order!r}.")
        if self.word_level and self.validation_file:
            raise ValueError(
                f"validation_file={self.validation_file!r} goes with a single text file: with word_level put valid.txt "
                "into the folder that corpus names."
            )


@dataclass
class CopyMemoryArguments:
    """The copy memory task: ten symbols to recall."""

    task: ClassVar[str] = "copy_memory"
    copy_delay: int = field(default=400, metadata={"help": "Positions from the last symbol to the sign, T."})
    copy_variant: str = field(
        default="deq",
        metadata={"help": "deq (a single sign; 20,000 sequences) or tcn (eleven signs; 10,000 sequences)."},
    )


@dataclass
class TrainingArguments:
    """How to train."""

    output_dir: str = field(
        default="deq-model", metadata={"help": "Folder for the model, metrics.jsonl and checkpoints."}
    )
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint in output_dir."})
    seed: int = field(default=0, metadata={"help": "Seed of initialisation, data order and dropout."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=16, metadata={"help": "Sequences per optimizer step, over all processes."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches that a batch is split into."})
    optimizer: str = field(
        default="adamw", metadata={"help": "adamw (with weight_decay 0 it is Adam) or sgd, without momentum."}
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up; lr_scheduler_type follows."})
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={"help": "cosine (to zero at max_steps), constant, or multistep (a tenth at each of lr_milestones)."},
    )
    lr_milestones: list[int] | None = field(
        default=None, metadata={"help": "Steps at which multistep divides the learning rate by ten, rising."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "On weight matrices; not on norms, biases, embeddings."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Second-moment decay of adamw."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm to clip at; 0 does not clip."})
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each process; default: all cores, shared among the processes."}
    )
    train_solver_tolerance: float | None = field(
        default=None, metadata={"help": "Tolerance while training; default: the model's solver_tolerance."}
    )
    shallow_steps: int = field(
        default=0, metadata={"help": "Steps of shallow pretraining before f is solved for its equilibrium."}
    )
    shallow_depth: int = field(default=2, metadata={"help": "Applications of f that shallow pretraining unrolls."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between lines of metrics.jsonl."})
    eval_steps: int = field(default=0, metadata={"help": "Steps between validations; 0 validates at the end only."})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0 saves on interruption only."})
    report_to: str | None = field(default=None, metadata={"help": "An accelerate tracker: tensorboard, wandb, ..."})
    sample_prompt: str = field(default="The ", metadata={"help": "Prompt of the text sample at the end."})
    sample_tokens: int = field(default=80, metadata={"help": "Tokens of the text sample at the end."})

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps", "shallow_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "save_steps",
            "eval_steps",
            "shallow_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        self._check_choice("optimizer", OPTIMIZERS)
        self._check_choice("lr_scheduler_type", LR_SCHEDULER_TYPES)
        self._check_choice("mixed_precision", MIXED_PRECISIONS)  # in YAML it is "no" in quotes: a bare no is false
        self._check_milestones()
        if self.sample_tokens and not self.sample_prompt:
            raise ValueError(
                "sample_prompt is empty: give the sample something to continue, or set sample_tokens to 0."
            )
        if self.train_solver_tolerance is not None and self.train_solver_tolerance < 0:
            raise ValueError(f"train_solver_tolerance must not be negative, got {self.train_solver_tolerance}.")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

    def _check_milestones(self) -> None:
        milestones, kind = self.lr_milestones, self.lr_scheduler_type
        if kind == "multistep" and not milestones:
            raise ValueError('lr_scheduler_type="multistep" needs lr_milestones: the steps at which it decays.')
        if kind != "multistep" and milestones:
            raise ValueError(
                f"lr_milestones={milestones} are for lr_scheduler_type='multistep', which is {kind!r}: set it, or omit "
                "lr_milestones."
            )
        if any(start >= end for start, end in pairwise([0, *(milestones or ())])):
            raise ValueError(f"lr_milestones must rise strictly from 1 or more, got {milestones}.")


TASKS = {arguments.task: arguments for arguments in (DataArguments, CopyMemoryArguments)}
