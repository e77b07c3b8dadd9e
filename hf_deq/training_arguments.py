"""What a recipe may say: the names in recipe.yaml and the flags of `scripts/train.py`, besides the model's own."""

from dataclasses import dataclass, field
from typing import ClassVar

from .data import BUILT_IN_CORPUS


@dataclass
class DataArguments:
    """What text to train on, and how it is read."""

    task: ClassVar[str] = "language_modeling"
    corpus: str = field(
        default=BUILT_IN_CORPUS,
        metadata={"help": "cpython_docs (built in, no network), a local text file, or a Hub dataset."},
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    validation_file: str | None = field(default=None, metadata={"help": "Local text file to validate on."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "An existing tokenizer (folder or Hub name); default: train one of vocab_size."}
    )
    sequence_length: int = field(default=128, metadata={"help": "Predicted tokens per training sequence."})
    carry_memory: bool = field(
        default=False,
        metadata={
            "help": "Read the text as batch_size contiguous streams and hand the model's memory of each sequence on to "
            "the next (truncated backpropagation through time); validation does so too."
        },
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
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up; cosine decay to zero follows."})
    weight_decay: float = field(default=0.1, metadata={"help": "On weight matrices; not on norms, biases, embeddings."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Second-moment decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm to clip at; 0 does not clip."})
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each process; default: all cores, shared among the processes."}
    )
    train_solver_tolerance: float | None = field(
        default=None, metadata={"help": "Tolerance while training; default: the model's solver_tolerance."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between lines of metrics.jsonl."})
    eval_steps: int = field(default=0, metadata={"help": "Steps between validations; 0 validates at the end only."})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0 saves on interruption only."})
    report_to: str | None = field(default=None, metadata={"help": "An accelerate tracker: tensorboard, wandb, ..."})
    sample_prompt: str = field(default="The ", metadata={"help": "Prompt of the text sample at the end."})
    sample_tokens: int = field(default=80, metadata={"help": "Tokens of the text sample at the end."})

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "save_steps", "eval_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.sample_tokens and not self.sample_prompt:
            raise ValueError(
                "sample_prompt is empty: give the sample something to continue, or set sample_tokens to 0."
            )
        if self.train_solver_tolerance is not None and self.train_solver_tolerance < 0:
            raise ValueError(f"train_solver_tolerance must not be negative, got {self.train_solver_tolerance}.")


TASKS = {arguments.task: arguments for arguments in (DataArguments, CopyMemoryArguments)}
