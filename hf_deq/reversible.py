"""The reversible gradient: the exact gradient of a number of steps, at the memory of one (RevDEQ, arXiv 2509.12917)."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .equilibrium import measured
from .fixed_point import FixedPointSolution, FixedPointSolver, SequenceMap, check_count, image_of
from .packed_texts import Texts
from .position_algebra import widest_dtype

# Undoing all steps multiplies rounding errors by (1 - beta) ** -steps. On trained blocks, gradients are within 4e-4 of
# backpropagation up to this growth, and not a number from a hundred times this growth on.
LARGEST_GROWTH = 1e12


def most_steps(beta: float, dtype: torch.dtype = torch.float64) -> int:
    """Return the number of steps that can be undone with states of this dtype, for a beta in (0, 1)."""
    growth = LARGEST_GROWTH * torch.finfo(torch.float64).eps / torch.finfo(dtype).eps
    return int(-math.log(growth) / math.log1p(-beta))


@dataclass(frozen=True)
class ReversibleGradient:
    """Backpropagation through reversible steps: backward finds every state again, so none is kept.

    Two states y and z start at z0. A step calls f twice:

        y <- (1 - beta) y + beta f(z)
        z <- (1 - beta) z + beta f(y)

    Backward undoes the steps, from the last one on: z <- (z - beta f(y)) / (1 - beta), and y likewise. It evaluates f
    once more for each call, with a graph. The value is z after the last step. Without gradients, the solver runs
    instead. So training and inference agree as far as the steps have converged.

    Undoing a step divides rounding errors by 1 - beta. The two states are therefore in double precision (single on
    MPS), whatever the precision of f. Even so, only `most_steps(beta)` steps can be undone.

    Args:
        steps: steps of two applications of f each, at least 1.
        beta: fraction of each step that is taken, in (0, 1). Larger values converge faster, and lose precision faster:
            0.5 allows 39 steps, 0.8 allows 17, 0.9 allows 11.

    Raises:
        ValueError: if a field is out of its range, or there are too many steps for this beta (on MPS, when it is
            called: single precision can undo 10 steps of 0.5, 4 of 0.8, and 3 of 0.9).
    """

    steps: int = 8
    beta: float = 0.5

    def __post_init__(self):
        check_count("steps", self.steps)
        if not 0 < self.beta < 1:
            raise ValueError(f"ReversibleGradient needs beta in (0, 1), got {self.beta}.")
        self._check_steps(torch.float64)

    def _check_steps(self, dtype: torch.dtype) -> None:
        if self.steps > (most := most_steps(self.beta, dtype)):
            raise ValueError(
                f"ReversibleGradient needs steps <= {most} with beta={self.beta} and states of {dtype}, got "
                f"{self.steps}: rounding errors would spoil the gradient when the steps are undone."
            )

    def __call__(
        self, f: SequenceMap, z0: Tensor, solver: FixedPointSolver, texts: Texts | None = None
    ) -> FixedPointSolution:
        if not torch.is_grad_enabled():
            solution = solver(f, z0, texts)
            return replace(solution, value=solution.image)
        dtype = widest_dtype(z0.device)
        self._check_steps(dtype)
        tape = _Tape(f, z0.dtype, self.beta)
        y = z = z0.to(dtype)
        for _ in range(self.steps):
            y = torch.lerp(y, tape.image(z), self.beta)
            image = tape.image(y)
            z = torch.lerp(z, image, self.beta)
        tape.end(y.detach(), z.detach())
        count = z0.shape[0] if texts is None else len(texts.lasts)
        num_evaluations = torch.full((count,), 2 * self.steps, device=z0.device)
        return measured(y.to(z0.dtype), image, z.to(z0.dtype), num_evaluations, solver, texts)


class _Tape:
    """Calls of f whose activations, and whose arguments, are computed again in backward.

    `checkpoint` drops the activations of a call, and keeps its argument. Here a hook keeps the number of the call
    instead of the argument. Backward starts at the last call. Two steps have four calls:

        call    argument    update
        4       y2          z1 -> z2
        3       z1          y1 -> y2
        2       y1          z0 -> z1
        1       z0          y0 -> y1

    The image of a call undoes its update. The state before the update is the argument of the call before, and the
    argument is the state that the call before has made.

    Attributes:
        present: the number of the call that backward has come to.
        argument: the argument of this call.
        updated: the state that this call has made.
    """

    def __init__(self, f: SequenceMap, dtype: torch.dtype, beta: float):
        self.f, self.dtype, self.beta = f, dtype, beta
        self.calls = 0
        self.last: tuple[Tensor, Tensor] | None = None

    def image(self, state: Tensor) -> Tensor:
        """Return f(state), in the dtype of the state, with a graph that holds no activations."""
        self.calls += 1
        number = self.calls

        def call(state: Tensor) -> Tensor:
            image = image_of(self.f, state.to(self.dtype)).to(state.dtype)
            if self.last is not None and number == self.present:  # in backward
                self._undo(image.detach())
            return image

        # Only the argument passes through these hooks: `checkpoint` has hooks of its own for the activations.
        with saved_tensors_hooks(lambda _: number, self._argument), set_checkpoint_early_stop(False):
            return checkpoint(call, state, use_reentrant=False, preserve_rng_state=False)

    def end(self, y: Tensor, z: Tensor) -> None:
        """Keep the final states. The last call had the argument y, and updated z."""
        self.last = y, z
        self._rewind()

    def _rewind(self) -> None:
        self.argument, self.updated = self.last
        self.present = self.calls

    @torch.no_grad()
    def _argument(self, number: int) -> Tensor:
        """Return the argument of a call. Backward asks for the arguments of later calls first."""
        if number > self.present:  # backward runs once more
            self._rewind()
        while number < self.present:  # autograd needed no activation of the calls between
            self._undo(self.f(self.argument.to(self.dtype)).to(self.argument.dtype))
        return self.argument

    def _undo(self, image: Tensor) -> None:
        """Undo the update of the present call, and go on to the call before it."""
        before = (self.updated - self.beta * image) / (1 - self.beta)
        self.argument, self.updated = before, self.argument
        self.present -= 1
