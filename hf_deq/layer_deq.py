"""The layer that contains an equilibrium: the module that solves, for any f.

class MyLayer(DEQLayer):
    def forward(self, hidden_states, dial, rows, cache, memory, **context):
        solution, jacobian_loss = self.solve(lambda z: ..., torch.zeros_like(hidden_states), dial, rows)
        return DEQLayerOutput(solution.value, None, solution, jacobian_loss, None)
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .configuration_deq import GRADIENTS, DEQConfig, require_one_of
from .equilibrium import (
    GradientEstimator,
    ImplicitGradient,
    PhantomGradient,
    UnrolledGradient,
    equilibrium,
    evaluate_with_graph,
)
from .fixed_point import SOLVERS, FixedPointSolution, FixedPointSolver, SequenceMap, check_count
from .jacobian import jacobian_regularization
from .masking_deq import Rows
from .reversible import ReversibleGradient
from .weight_tying import keeping_weights


@dataclass(frozen=True)
class Dial:
    """The quality/compute dial of one call. `None` means the configured value.

    Attributes:
        solver_tolerance, solver_max_evaluations: as in `DEQConfig`.
        unroll_steps: apply f this number of times with ordinary backpropagation instead of solving, as in shallow
            pretraining. `None` means to solve, unless the configured gradient is `"unrolled"`.
    """

    solver_tolerance: float | None = None
    solver_max_evaluations: int | None = None
    unroll_steps: int | None = None

    def __post_init__(self):
        """Refuse values out of range, and a budget together with `unroll_steps`.

        Raises:
            ValueError: if there is such a value. The message names the argument.
        """
        if self.solver_tolerance is not None and not 0 <= self.solver_tolerance < float("inf"):
            raise ValueError(f"solver_tolerance must be zero or positive, and finite; got {self.solver_tolerance}.")
        for name in ("solver_max_evaluations", "unroll_steps"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        if self.unroll_steps is not None and self.solver_max_evaluations is not None:
            raise ValueError(
                f"unroll_steps={self.unroll_steps} does not solve, so solver_max_evaluations="
                f"{self.solver_max_evaluations} would have no effect: pass one of them."
            )


def make_solver(config: DEQConfig, name: str, **settings) -> FixedPointSolver:
    """Return the solver with this name (see `SOLVERS`) and the settings of the configuration.

    Args:
        config: supplies the history, the damping and the scope, unless `settings` contains them.
        name: a key of `SOLVERS`.
        settings: other arguments of the solver, such as `tolerance` and `max_evaluations`.

    Raises:
        ValueError: if there is no solver with this name.
    """
    require_one_of("solver", name, SOLVERS)
    settings = {"damping": config.solver_damping, "scope": config.solver_scope} | settings
    if "history" in SOLVERS[name].__dataclass_fields__:
        settings = {"history": config.solver_history} | settings
    return SOLVERS[name](**settings)


class DEQLayerOutput(NamedTuple):
    """The output of a `DEQLayer`.

    Attributes:
        hidden_states: the part of the equilibrium that the output layer reads, `(batch, sequence, hidden_size)`.
        attentions: attention weights at the equilibrium, or `None`.
        solution: the equilibrium, and the report of its solve.
        jacobian_loss: Jacobian regularization at the equilibrium, or `None` if this step has none.
        memory: memory for the next segment, as in `SolveReport`.
    """

    hidden_states: Tensor
    attentions: Tensor | None
    solution: FixedPointSolution
    jacobian_loss: Tensor | None
    memory: tuple[Tensor, ...] | None


class DEQLayer(nn.Module):
    """The layer that contains one equilibrium: it holds the modules of f and solves for the fixed point.

    Only this layer is a module with hooks. f is a plain function: it runs many times, and has no hooks. Subclasses
    define `forward(hidden_states, dial, rows, cache, memory, **context) -> DEQLayerOutput`.

    Attributes:
        backward_evaluations: vector-Jacobian products per sequence in the most recent implicit backward solve,
            `(batch,)`, for logging.
        input_size: features of the embedded input.
        memory_sizes: features of each part of the memory; empty if the model has no memory.
        memory_lengths: positions of each part of the memory; empty if they may differ from segment to segment, and are
            the same for all parts.
        compile_options: arguments for `torch.compile`, which then compiles f alone; `None` does not compile. See
            `DEQPreTrainedModel.compile_f`.
        gradient_checkpointing: Transformers sets this field for activation checkpointing. Then unrolled applications
            of f are recomputed in backward. An implicit gradient holds the activations of only one application, and
            keeps them.
    """

    input_size: int
    memory_sizes: tuple[int, ...] = ()
    memory_lengths: tuple[int, ...] = ()
    compile_options: dict | None = None
    gradient_checkpointing: bool = False

    def __init__(self, config: DEQConfig):
        super().__init__()
        self.config = config
        self.backward_evaluations: Tensor | None = None

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"solver={config.solver}, scope={config.solver_scope}, tolerance={config.solver_tolerance:g}, "
            f"max_evaluations={config.solver_max_evaluations}, gradient={config.gradient}"
        )

    def solve(self, f: SequenceMap, z0: Tensor, dial: Dial, rows: Rows) -> tuple[FixedPointSolution, Tensor | None]:
        """Return the differentiable equilibrium of f, and its Jacobian regularization (`None` if this step has none).

        Args:
            f: maps a state `(batch, sequence, features)` to a state of the same shape.
            z0: the state from which the solver starts.
            dial: overrides the configuration.
            rows: where the tokens are, and which texts are packed.
        """
        plain = f  # the regularization differentiates f twice, which compiled code cannot do
        if self.compile_options is not None and not torch.compiler.is_compiling():
            f = torch.compile(f, **self.compile_options)  # the code of f is the same in every call, and compiled once
        estimator = self.gradient_estimator(dial)
        # Backward recomputes f without kept weights. So the first computation must not use kept weights either.
        recomputes = getattr(estimator, "activation_checkpointing", isinstance(estimator, ReversibleGradient))
        with nullcontext() if recomputes and torch.is_grad_enabled() else keeping_weights():
            solution = equilibrium(f, z0, self.forward_solver(dial), estimator, rows.texts)
            return solution, self._jacobian_loss(plain, solution.value, dial, rows)

    def forward_solver(self, dial: Dial) -> FixedPointSolver:
        """Return the configured solver, with the tolerance and the budget of the dial."""
        config = self.config
        tolerance = config.solver_tolerance if dial.solver_tolerance is None else dial.solver_tolerance
        return make_solver(config, config.solver, tolerance=tolerance, max_evaluations=self._budget(dial))

    def gradient_estimator(self, dial: Dial) -> GradientEstimator:
        """Return the configured gradient estimator, or the unrolled one if the dial sets `unroll_steps`.

        Raises:
            ValueError: if the configuration was changed, and names no gradient.
        """
        config = self.config
        require_one_of("gradient", config.gradient, GRADIENTS)
        if dial.unroll_steps is not None or config.gradient == "unrolled":
            steps = self._budget(dial) if dial.unroll_steps is None else dial.unroll_steps
            return UnrolledGradient(steps, self.gradient_checkpointing and self.training)
        if config.gradient == "phantom":
            return PhantomGradient(config.phantom_steps, config.phantom_damping)
        if config.gradient == "reversible":
            return ReversibleGradient(config.reversible_steps, config.reversible_beta)
        limits = {"tolerance": config.backward_tolerance, "max_evaluations": config.backward_max_evaluations}
        return ImplicitGradient(make_solver(config, config.backward_solver, **limits), self._record_backward)

    def _budget(self, dial: Dial) -> int:
        budget = dial.solver_max_evaluations
        return self.config.solver_max_evaluations if budget is None else budget

    def _record_backward(self, solution: FixedPointSolution) -> None:
        self.backward_evaluations = solution.num_evaluations

    def _jacobian_loss(self, f: SequenceMap, value: Tensor, dial: Dial, rows: Rows) -> Tensor | None:
        config = self.config
        wanted = self.training and torch.is_grad_enabled() and config.jacobian_loss_weight > 0
        if not wanted or dial.unroll_steps is not None or torch.rand(()).item() >= config.jacobian_loss_frequency:
            return None
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
            z, f_z = evaluate_with_graph(f, value)
            return jacobian_regularization(f_z, z, tokens=rows.tokens)


def latest(past: Tensor, new: Tensor, length: int) -> Tensor:
    """Return the last `length` positions of `past` followed by `new`, both `(batch, positions, size)`.

    The result is detached, and is a copy.
    """
    return torch.cat([past, new], 1)[:, -length:].detach().clone()
