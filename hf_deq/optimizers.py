"""The optimizer and the learning rate of a training run, as its `TrainingArguments` say.

    optimizer = make_optimizer(model, training)
    schedule = make_schedule(optimizer, training)

The schedule is stepped once after every step of the optimizer.
"""

from bisect import bisect_right

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from .training_arguments import TrainingArguments
from .training_models import parameter_groups

MILESTONE_FACTOR = 0.1  # of the learning rate, at every milestone


def make_optimizer(model: PreTrainedModel, training: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW (with `weight_decay` 0 it is Adam), or plain stochastic gradient descent without momentum.

    AdamW's weight decay is decoupled from the gradient, SGD's is part of it.
    """
    groups = parameter_groups(model, training.weight_decay)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, training.adam_beta2))


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingArguments) -> LambdaLR:
    """Linear warm-up, then a cosine to zero at `max_steps`, nothing, or a tenth at every milestone."""
    if training.lr_scheduler_type == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, training.warmup_steps, training.max_steps)
    if training.lr_scheduler_type == "constant":
        return get_constant_schedule_with_warmup(optimizer, training.warmup_steps)

    def factor(step: int) -> float:
        warm = min(1.0, step / training.warmup_steps) if training.warmup_steps else 1.0
        return warm * MILESTONE_FACTOR ** bisect_right(training.lr_milestones, step)

    return LambdaLR(optimizer, factor)
