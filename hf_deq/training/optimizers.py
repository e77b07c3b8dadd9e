"""The optimizer and the learning rate of a training run.

    optimizer = make_optimizer(model, run)
    schedule = make_schedule(optimizer, run)

Call `schedule.step()` once after every step of the optimizer.
"""

from bisect import bisect_right

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers.utils import logging

from .arguments import RunArguments
from .models import parameter_groups

logger = logging.get_logger(__name__)

MILESTONE_FACTOR = 0.1  # at every milestone, the learning rate is multiplied by this factor


def make_optimizer(
    model: PreTrainedModel, run: RunArguments, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """Return AdamW (with `weight_decay` 0 it is Adam), or plain stochastic gradient descent without momentum.

    The weight decay of AdamW is decoupled from the gradient. The weight decay of SGD is part of the gradient.
    """
    groups = parameter_groups(model, run.weight_decay)
    # Only fused kernels skip a bad step without waiting for the device. The model may move there later.
    fused = (device or model.device).type != "cpu"
    if run.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=run.learning_rate, fused=fused)
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(0.9, run.adam_beta2), fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, run: RunArguments) -> LambdaLR:
    """Return the schedule of the learning rate: a linear warm-up, then a schedule by `run.lr_scheduler_type`.

    `"cosine"` follows a cosine to zero at `max_steps`. `"constant"` keeps the rate. `"multistep"` divides it by ten at
    every milestone. A warning says what lies beyond the last step.
    """
    if run.warmup_steps >= run.max_steps:
        logger.warning(
            f"warmup_steps={run.warmup_steps} covers all of max_steps={run.max_steps}: no step has the full "
            "learning_rate. Lower warmup_steps."
        )
    if beyond := [milestone for milestone in run.lr_milestones or () if milestone >= run.max_steps]:
        logger.warning(f"lr_milestones={beyond} lie beyond max_steps={run.max_steps}, and have no effect. Lower them.")
    if run.lr_scheduler_type == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, run.warmup_steps, run.max_steps)
    if run.lr_scheduler_type == "constant":
        return get_constant_schedule_with_warmup(optimizer, run.warmup_steps)

    def factor(step: int) -> float:
        warm = min(1.0, step / run.warmup_steps) if run.warmup_steps else 1.0
        return warm * MILESTONE_FACTOR ** bisect_right(run.lr_milestones, step)

    return LambdaLR(optimizer, factor)
