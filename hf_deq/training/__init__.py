"""Training: the loop of `hf-deq train` and `scripts/train.py`, and a callback for Transformers' Trainer."""

from .arguments import RunArguments
from .callback import EquilibriumCallback
from .log import evaluations_over_training, parse_metrics
from .loop import Interrupted, train
from .models import SOLVER_ARGUMENTS, parameter_groups
from .optimizers import make_optimizer, make_schedule
from .step_guard import Diverged

__all__ = [
    "SOLVER_ARGUMENTS",
    "Diverged",
    "EquilibriumCallback",
    "Interrupted",
    "RunArguments",
    "evaluations_over_training",
    "make_optimizer",
    "make_schedule",
    "parameter_groups",
    "parse_metrics",
    "train",
]
