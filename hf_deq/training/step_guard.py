"""Steps that must not be taken: a gradient that is not finite would destroy the weights.

The guard skips such steps and counts them, without waiting for the device. It reads its counts back when a line is
logged or a checkpoint is saved. It ends a run whose steps are no longer finite.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging

from .checkpoints import Checkpoints

logger = logging.get_logger(__name__)

MOST_IN_A_ROW = 5  # skipped steps, before the run ends
# A gradient scaler of fp16 begins with a large scale. It skips steps itself, and halves the scale every time.
MOST_IN_A_ROW_WITH_SCALER = 30
GROWN_LOSS = 10.0  # times the best loss: a warning


class Diverged(ValueError):
    """Training ended, because its steps were no longer finite."""

    exit_status = 3  # of the command


class StepGuard:
    """Takes the steps of an optimizer whose gradients are finite.

    Args:
        accelerator: of the run.
        optimizer: prepared by it; on an accelerator device it must be a fused one (see `make_optimizer`), because only
            its kernels can skip a step that the host does not know to be bad.
    """

    def __init__(self, accelerator: Accelerator, optimizer):
        self.optimizer, self.scales = optimizer, accelerator.scaler is not None
        self.waits = accelerator.device.type == "cpu"  # where reading a number back costs nothing
        self.skipped, self.in_a_row = (torch.zeros((), device=accelerator.device) for _ in range(2))
        self.best_loss, self.has_grown = math.inf, False

    def step(self, gradient_norm: Tensor) -> None:
        """Take the step, unless the norm of its gradient is not finite."""
        is_bad = ~torch.isfinite(gradient_norm.detach())
        self.skipped = self.skipped + is_bad
        self.in_a_row = torch.where(is_bad, self.in_a_row + 1, 0)
        if self.scales:
            self.optimizer.step()
        elif not self.waits:
            self._step_on_device(is_bad)
        elif not is_bad:
            self.optimizer.step()

    def _step_on_device(self, is_bad: Tensor) -> None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # without the wrapper of accelerate
        inner.grad_scale, inner.found_inf = None, is_bad.float()
        self.optimizer.step()
        del inner.grad_scale, inner.found_inf

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps. `best_loss` is `None` before there is one."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"skipped": float(self.skipped), "in_a_row": float(self.in_a_row), "best_loss": best}

    def resume(self, state: dict) -> None:
        """Continue from the `state` of a checkpoint. What it does not have begins anew."""
        self.skipped = self.skipped + state.get("skipped", 0)
        self.in_a_row = self.in_a_row + state.get("in_a_row", 0)
        self.best_loss = math.inf if state.get("best_loss") is None else state["best_loss"]

    def check(self, step: int, checkpoints: Checkpoints | None) -> None:
        """Refuse to go on if the last steps were not finite.

        Args:
            step: how many steps were taken.
            checkpoints: of the run; the message names the last one.

        Raises:
            Diverged: if there were too many in a row.
        """
        in_a_row = int(self.in_a_row)
        if in_a_row > (MOST_IN_A_ROW_WITH_SCALER if self.scales else MOST_IN_A_ROW):
            last = checkpoints and checkpoints.last
            raise Diverged(
                f"The gradient was not finite in the last {in_a_row} steps, up to step {step}. They were skipped, so "
                "the weights are still finite. Lower learning_rate or max_grad_norm, or raise warmup_steps; the last "
                f"checkpoint is {last or 'not there (see save_steps)'}."
            )

    def watch(self, loss: float, step: int) -> None:
        """Say once if the loss has grown tenfold over its best."""
        self.best_loss = min(self.best_loss, loss)
        if not self.has_grown and loss > GROWN_LOSS * self.best_loss:
            self.has_grown = True
            logger.warning(f"At step {step} the loss is {loss:.3g}; its best was {self.best_loss:.3g}.")
