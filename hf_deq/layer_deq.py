"""The container of an equilibrium: the one module that solves, whatever f it holds.

class MyLayer(DEQLayer):
    def forward(self, hidden_states, dial, rows, cache, memory, **context):
        solution, jacobian_loss = self.solve(lambda z: ..., torch.zeros_like(hidden_states), dial, rows.texts)
        return DEQLayerOutput(solution.value, None, solution, jacobian_loss, None)
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .configuration_deq import DEQConfig
from .equilibrium import (
    GradientEstimator,
    ImplicitGradient,
    PhantomGradient,
    UnrolledGradient,
    equilibrium,
    evaluate_with_graph,
)
from .fixed_point import SOLVERS, FixedPointSolution, FixedPointSolver, SequenceMap
from .jacobian import jacobian_regularization
from .packed_texts import Texts
from .weight_tying import keeping_weights


@dataclass(frozen=True)
class Dial:
    """The quality/compute dial of one call; `None` leaves the configured value.

    Attributes:
        solver_tolerance, solver_max_evaluations: as in `DEQConfig`.
        unroll_steps: apply f that many times with ordinary backpropagation instead of solving, as
            in shallow pretraining.
    """

    solver_tolerance: float | None = None
    solver_max_evaluations: int | None = None
    unroll_steps: int | None = None

    def __post_init__(self):
        """Refuse values out of range.

        Raises:
            ValueError: naming the argument.
        """
        if self.solver_tolerance is not None and not 0 <= self.solver_tolerance < float("inf"):
            raise ValueError(f"solver_tolerance must be zero or positive, and finite; got {self.solver_tolerance}.")
        for name in ("solver_max_evaluations", "unroll_steps"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


def make_solver(config: DEQConfig, name: str, **settings) -> FixedPointSolver:
    """Return the solver of this name (see `SOLVERS`) as the configuration describes it.

    Args:
        config: gives the history, the damping and the scope, unless `settings` has them.
        settings: other arguments of the solver, such as `tolerance` and `max_evaluations`.
    """
    settings = {"damping": config.solver_damping, "scope": config.solver_scope} | settings
    if "history" in SOLVERS[name].__dataclass_fields__:
        settings = {"history": config.solver_history} | settings
    return SOLVERS[name](**settings)


class DEQLayerOutput(NamedTuple):
    """What the container of an equilibrium returns.

    Attributes:
        hidden_states: the part of the equilibrium that the output layer sees, `(batch, sequence, hidden_size)`.
        attentions: attention weights at the equilibrium, if there are any.
        solution: the equilibrium and how well it was solved.
        jacobian_loss: its Jacobian regularization, if this step has one.
        memory: for the next segment, as in `SolveReport`.
    """

    hidden_states: Tensor
    attentions: Tensor | None
    solution: FixedPointSolution
    jacobian_loss: Tensor | None
    memory: tuple[Tensor, ...] | None


class DEQLayer(nn.Module):
    """The container of one equilibrium: holds the modules of f and knows how to solve.

    It, not f, is called as a module: f runs many times and carries no hooks. Subclasses define
    `forward(hidden_states, dial, rows, cache, memory, **context) -> DEQLayerOutput`.

    Attributes:
        backward_evaluations: vector-Jacobian products per sequence of the most recent implicit backward
            solve, `(batch,)`, for logging.
        input_size: features of the embedded input.
        memory_sizes: features of each part of the memory; empty if nothing is remembered.
        gradient_checkpointing: what Transformers sets for activation checkpointing. Unrolled applications of f are
            then recomputed in backward; an implicit gradient has the activations of one, and keeps them.
    """

    input_size: int
    memory_sizes: tuple[int, ...] = ()
    gradient_checkpointing: bool = False

    def __init__(self, config: DEQConfig):
        super().__init__()
        self.config = config
        self.backward_evaluations: Tensor | None = None

    def solve(
        self, f: SequenceMap, z0: Tensor, dial: Dial, texts: Texts | None = None
    ) -> tuple[FixedPointSolution, Tensor | None]:
        """The differentiable equilibrium of f, and its Jacobian regularization if this step has one."""
        estimator = self.gradient_estimator(dial)
        # What is recomputed in backward finds no kept weights, so it must not have found them before.
        recomputed = isinstance(estimator, UnrolledGradient) and estimator.activation_checkpointing
        with nullcontext() if recomputed else keeping_weights():
            solution = equilibrium(f, z0, self.forward_solver(dial), estimator, texts)
            return solution, self._jacobian_loss(f, solution.value, dial)

    def forward_solver(self, dial: Dial) -> FixedPointSolver:
        """The configured solver."""
        config = self.config
        tolerance = config.solver_tolerance if dial.solver_tolerance is None else dial.solver_tolerance
        return make_solver(config, config.solver, tolerance=tolerance, max_evaluations=self._budget(dial))

    def gradient_estimator(self, dial: Dial) -> GradientEstimator:
        """The configured estimator, or the unrolled one where the dial asks for it."""
        config = self.config
        if dial.unroll_steps is not None or config.gradient == "unrolled":
            steps = self._budget(dial) if dial.unroll_steps is None else dial.unroll_steps
            return UnrolledGradient(steps, self.gradient_checkpointing and self.training)
        if config.gradient == "phantom":
            return PhantomGradient(config.phantom_steps, config.phantom_damping)
        limits = {"tolerance": config.backward_tolerance, "max_evaluations": config.backward_max_evaluations}
        return ImplicitGradient(make_solver(config, config.backward_solver, **limits), self._record_backward)

    def _budget(self, dial: Dial) -> int:
        budget = dial.solver_max_evaluations
        return self.config.solver_max_evaluations if budget is None else budget

    def _record_backward(self, solution: FixedPointSolution) -> None:
        self.backward_evaluations = solution.num_evaluations

    def _jacobian_loss(self, f: SequenceMap, value: Tensor, dial: Dial) -> Tensor | None:
        config = self.config
        wanted = self.training and torch.is_grad_enabled() and config.jacobian_loss_weight > 0
        if not wanted or dial.unroll_steps is not None or torch.rand(()).item() >= config.jacobian_loss_frequency:
            return None
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
            z, f_z = evaluate_with_graph(f, value)
            return jacobian_regularization(f_z, z)


def latest(past: Tensor, new: Tensor, length: int) -> Tensor:
    """The last `length` positions of two pieces `(batch, positions, size)`, detached, in storage of their own."""
    return torch.cat([past, new], 1)[:, -length:].detach().clone()
