"""A differentiable equilibrium: a solver finds it, and a gradient estimator differentiates it.

    solution = equilibrium(f, z0, solver=AndersonSolver(), gradient=ImplicitGradient())
    loss(solution.value).backward()      # gradients for everything that f closes over

The estimators differ in what they backpropagate through:

    ImplicitGradient    the equilibrium itself, by the implicit function theorem
    PhantomGradient     the last few damped applications of f (one of them: "Jacobian-free")
    UnrolledGradient    every application: an explicit stack with tied weights, no solver
    ReversibleGradient  every application of reversible steps, which backward undoes (see `reversible`)

With `ImplicitGradient`, the value is f(z) at the state z that the solver returns, with and without gradients. So
training and inference use the same value. With gradients, the value of `PhantomGradient` and of `ReversibleGradient` is
the end of their own steps. The value of `UnrolledGradient` is always that of its steps. `ImplicitGradient` needs one
more call of f, with a graph.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .fixed_point import (
    AndersonSolver,
    FixedPointSolution,
    FixedPointSolver,
    SequenceMap,
    check_count,
    check_state,
    image_of,
)
from .packed_texts import Texts
from .position_algebra import Scopes, own_residuals

# Returns a solution with gradients: (f, z0, solver, texts) -> solution.
GradientEstimator = Callable[[SequenceMap, Tensor, FixedPointSolver, Texts | None], FixedPointSolution]


def equilibrium(
    f: SequenceMap,
    z0: Tensor,
    solver: FixedPointSolver | None = None,
    gradient: GradientEstimator | None = None,
    texts: Texts | None = None,
) -> FixedPointSolution:
    """Solve z = f(z) and return f(z) with gradients to everything that f closes over.

    Args:
        f: maps a state `(batch, sequence, features)` to a state of the same shape. f must be
            deterministic (draw dropout masks outside of f), and causal: its output at a position depends on z at this
            and earlier positions only. An f that looks ahead needs solvers with `scope="sequence"`: this one, and that
            of `ImplicitGradient`.
        z0: the state from which the solver starts. It receives gradients only from
            `UnrolledGradient` and `ReversibleGradient`.
        solver: how the equilibrium is found. Default: `AndersonSolver()`.
        gradient: how the equilibrium is differentiated. Default: `ImplicitGradient()`.
        texts: the texts of packed rows; `None` if every row is one text.

    Returns:
        `FixedPointSolution` whose `value` is f(z) for the state z that the solver returns; `image` is the same tensor.
        (With gradients, `PhantomGradient` and `ReversibleGradient` return the end of their own steps.) `residual` is
        the largest ||f(z) - z|| / ||f(z)|| over the positions of a text, measured at z. `num_evaluations` counts all
        calls of f, also those with a graph.

    Raises:
        ValueError: if z0 is not a floating point state of three dimensions, or is empty, or f changes its shape.
    """
    check_state(z0)
    return (gradient or ImplicitGradient())(f, z0, solver or AndersonSolver(), texts)


@dataclass(frozen=True)
class ImplicitGradient:
    """The exact gradient at the equilibrium (Bai et al. 2019, theorem 1).

    f is evaluated once at z with a graph. For the incoming gradient g, backward solves w = J'w + g
    with vector-Jacobian products on this graph. Then it passes w on to the graph. Memory is that of
    one application of f, for any number of iterations in either direction.

    The value is the image of the solver's last z. In the same way, backward uses the image of the solver's last w, that
    is J'w + g. So a solver that starts at g and makes k products gives the Neumann sum g + J'g + ... + J'^k g. This is
    `PicardSolver(tolerance=0, max_evaluations=k)`, as long as the residual of every position falls in every step
    (k = 1, the "one-step" gradient, needs no such condition).

    Args:
        solver: solves for w. J' runs backwards in time, so `"causal"` scope becomes `"anticausal"`.
        on_backward: called with the solution for w after every backward solve, for logging.
    """

    solver: FixedPointSolver = field(default_factory=AndersonSolver)
    on_backward: Callable[[FixedPointSolution], None] | None = None

    def __call__(
        self, f: SequenceMap, z0: Tensor, solver: FixedPointSolver, texts: Texts | None = None
    ) -> FixedPointSolution:
        solution = solver(f, z0, texts)
        if not torch.is_grad_enabled():
            return replace(solution, value=solution.image)
        z, f_z = evaluate_with_graph(f, solution.value)
        value = f_z
        if f_z.requires_grad:
            value = _ImplicitFunction.apply(f_z, z, self._transposed_solver(z), texts, self.on_backward)
        # The residual comes from the solver, which measured it at the same z.
        return replace(solution, value=value, image=value, num_evaluations=solution.num_evaluations + 1)

    def _transposed_solver(self, z: Tensor) -> FixedPointSolver:
        scope = "anticausal" if self.solver.scope == "causal" else self.solver.scope
        # The tolerance is set here, because backward runs outside of the autocast context of the forward pass.
        # A tolerance of zero stays: it asks for the whole budget, as a Neumann sum does. (The solver ends earlier only
        # when a step changes nothing that the dtype can show.)
        tolerance = self.solver.tolerance and self.solver.attainable_tolerance(z)
        return replace(self.solver, scope=scope, tolerance=tolerance)


@dataclass(frozen=True)
class PhantomGradient:
    """Backpropagation through a few damped steps that start at the equilibrium (Geng et al. 2021).

    The step z <- (1 - damping) z + damping f(z) is applied `steps` times to the solver's iterate.
    `steps=1` with `damping=1` is Jacobian-free backpropagation (Fung et al. 2022). Memory grows with `steps`.

    Args:
        steps: applications of f with a graph, at least 1.
        damping: fraction of each step that is taken, in (0, 1].
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self):
        check_count("steps", self.steps)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}.")

    def __call__(
        self, f: SequenceMap, z0: Tensor, solver: FixedPointSolver, texts: Texts | None = None
    ) -> FixedPointSolution:
        solution = solver(f, z0, texts)
        if not torch.is_grad_enabled():
            return replace(solution, value=solution.image)
        value = solution.value
        for _ in range(self.steps):
            z = value
            f_z = f(z)
            value = torch.lerp(z, f_z.to(z.dtype), self.damping)
        return measured(z, f_z, value, solution.num_evaluations + self.steps, solver, texts)


@dataclass(frozen=True)
class UnrolledGradient:
    """Ordinary backpropagation through `steps` applications of f from z0: the explicit weight-tied stack.

    The solver does not run, but its tolerance still decides whether the result counts as converged.
    Memory grows with `steps`. With activation checkpointing, only the states are kept.

    Args:
        steps: applications of f, at least 1.
        activation_checkpointing: recompute f in backward instead of keeping its activations.
    """

    steps: int
    activation_checkpointing: bool = False

    def __post_init__(self):
        check_count("steps", self.steps)

    def __call__(
        self, f: SequenceMap, z0: Tensor, solver: FixedPointSolver, texts: Texts | None = None
    ) -> FixedPointSolution:
        value = z0
        for _ in range(self.steps):
            z = value
            recompute = self.activation_checkpointing
            value = checkpoint(image_of, f, z, use_reentrant=False) if recompute else image_of(f, z)
        count = z0.shape[0] if texts is None else len(texts.lasts)
        num_evaluations = torch.full((count,), self.steps, device=z0.device)
        return measured(z, value, value, num_evaluations, solver, texts)


def evaluate_with_graph(f: SequenceMap, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return (z, f(z)). z is a new leaf with the value of `state`, for products with the Jacobian of f."""
    z = state.detach().requires_grad_()
    return z, f(z)


class _ImplicitFunction(torch.autograd.Function):
    """Forward is the identity on f(z). Backward replaces the gradient g by the solution w of w = J'w + g.

    This is a Function, not a tensor hook. A hook deadlocks when it differentiates the graph to which
    it belongs. Also, wrappers that shard parameters run their own hooks at an unsuitable moment.
    """

    @staticmethod
    def forward(ctx, f_z, z, solver, texts, on_backward):
        ctx.f_z, ctx.z, ctx.solver, ctx.texts, ctx.on_backward = f_z, z, solver, texts, on_backward
        return f_z.clone()

    @staticmethod
    def backward(ctx, grad):
        def transposed(w: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(ctx.f_z, ctx.z, w, retain_graph=True, materialize_grads=True)
            return product + grad

        solution = ctx.solver(transposed, grad, ctx.texts)
        if ctx.on_backward is not None:
            ctx.on_backward(solution)
        w = solution.image
        if torch.is_grad_enabled():  # create_graph=True
            w = _NoSecondDerivative.apply(w, grad, ctx.f_z)
        return w, None, None, None, None


class _NoSecondDerivative(torch.autograd.Function):
    """The solution w. It depends on the gradient and on everything that f depends on, but no graph records how."""

    @staticmethod
    def forward(ctx, w, gradient, f_z):
        return w.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            "An implicit gradient cannot be differentiated again: the solve for it is not part of the graph. For "
            'second derivatives use UnrolledGradient(steps), or gradient="unrolled" in a configuration.'
        )


def measured(z, f_z, value, num_evaluations, solver: FixedPointSolver, texts: Texts | None) -> FixedPointSolution:
    """Return the solution with this value, and with the residual measured at the last z and f(z)."""
    with torch.no_grad():
        residual = Scopes(z.shape[1], solver.scope, texts).residuals(own_residuals(z, f_z))
    converged = residual <= solver.attainable_tolerance(z)
    return FixedPointSolution(value, value, residual, num_evaluations, converged)
