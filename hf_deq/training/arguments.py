"""How a run trains: names of a recipe and flags of `hf-deq train`, besides those of the task and of the model."""

from dataclasses import dataclass, field
from itertools import pairwise

from ..data import check_at_least

OPTIMIZERS = ("adamw", "sgd")
LR_SCHEDULER_TYPES = ("cosine", "constant", "multistep")
MIXED_PRECISIONS = ("no", "fp16", "bf16")


@dataclass
class RunArguments:
    """How to train.

    Raises:
        ValueError: if an argument is out of its range, or arguments do not go together.
    """

    output_dir: str = field(
        default="deq-model", metadata={"help": "Folder for the model, metrics.jsonl and checkpoints."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Begin anew in an output_dir that holds another run."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint in output_dir."})
    init_from: str | None = field(
        default=None,
        metadata={"help": "A model folder (or Hub name) whose weights and tokenizer training starts from."},
    )
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
    keep_checkpoints: int = field(default=2, metadata={"help": "Checkpoints to keep, the newest ones."})
    report_to: str | None = field(default=None, metadata={"help": "An accelerate tracker: tensorboard, wandb, ..."})

    def __post_init__(self):
        positive = [
            *("max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps", "shallow_depth"),
            *("keep_checkpoints", "num_threads"),
        ]
        not_negative = [
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "save_steps", "eval_steps"),
            *("shallow_steps", "train_solver_tolerance", "seed"),
        ]
        for smallest, names in ((1, positive), (0, not_negative)):
            check_at_least(smallest, **{name: getattr(self, name) for name in names})
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2 must lie in [0, 1), got {self.adam_beta2}.")
        self._check_choice("optimizer", OPTIMIZERS)
        self._check_choice("lr_scheduler_type", LR_SCHEDULER_TYPES)
        self._check_choice("mixed_precision", MIXED_PRECISIONS)  # in YAML it is "no" in quotes: a bare no is false
        self._check_milestones()

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
