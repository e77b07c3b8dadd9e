"""What the equilibrium adds to the state from which a solve starts, and whether it depends on that state.

    distances_from_start(model, windows)     # ||z* - z0|| / ||z*|| of every row
    path_independence(model, windows)        # 1 if other starts lead to the same equilibrium
    with unsolved(model): ...                # predictions from z0 itself
    logit_lens(model, ids, budget=12)        # what each number of evaluations would predict

A measurement does not change the model's weights and mode.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..fixed_point import FixedPointSolution
from ..layer_deq import Dial
from ..modeling_deq import DEQForCausalLM, DEQPreTrainedModel
from ..position_algebra import widest_dtype
from .convergence import captured_map, solved_by, unconverged_on_purpose
from .scoring import evaluating


@torch.no_grad()
def distances_from_start(model: DEQPreTrainedModel, input_ids: Tensor) -> np.ndarray:
    """Return how far the equilibrium is from the state where the solve starts: `||z* - z0|| / ||z*||`.

    The number is 1 for models that start at the zero state. For models that start at a proposal of explicit layers
    (Attractor models), it says how much the equilibrium changes this proposal.

    Args:
        model: a deep equilibrium model. It solves as configured.
        input_ids: `(batch, sequence)`, without padding.

    Returns:
        Float64 `(batch,)`.
    """
    f, start = captured_map(model, input_ids)
    solution = model.base_model.layers[0].forward_solver(Dial())(f, start)
    distance = (solution.image - start).flatten(1).norm(dim=1) / solution.image.flatten(1).norm(dim=1)
    return distance.cpu().double().numpy()


@torch.no_grad()
def path_independence(model: DEQPreTrainedModel, input_ids: Tensor) -> float:
    """Return the asymptotic alignment score (Anil et al. 2022, arXiv 2211.09961, section 3).

    Every row is solved from its usual start, and again from the equilibrium of another row. The score is the cosine
    similarity of both results, the mean over rows. It is 1 if the equilibrium does not depend on the start.

    Args:
        model: a deep equilibrium model. It solves as configured.
        input_ids: `(batch, sequence)`, without padding, at least two rows.

    Raises:
        ValueError: if there is only one row.
    """
    if len(input_ids) < 2:
        raise ValueError("path_independence starts each row at the equilibrium of another one: give at least two rows.")
    f, start = captured_map(model, input_ids)
    solver = model.base_model.layers[0].forward_solver(Dial())
    with unconverged_on_purpose():
        usual = solver(f, start).image
        other = solver(f, usual.roll(1, 0)).image
    return F.cosine_similarity(usual.flatten(1), other.flatten(1)).cpu().double().mean().item()


@torch.no_grad()
def starts_at_zero(model: DEQPreTrainedModel, input_ids: Tensor) -> bool:
    """Return whether the solve starts at the zero state, which says nothing of the input."""
    return not bool(captured_map(model, input_ids)[1].any())


@contextmanager
def unsolved(model: DEQPreTrainedModel) -> Iterator[None]:
    """Within this context the model does not solve: its state is the one from which the solve would start.

    The report says so: no evaluation, an infinite residual, not converged.
    """

    def solve(f, z0, dial, rows):
        count = z0.shape[0] if rows.texts is None else len(rows.texts.lasts)
        residual = torch.full((count,), float("inf"), dtype=widest_dtype(z0.device), device=z0.device)
        evaluations = torch.zeros(count, dtype=torch.long, device=z0.device)
        return FixedPointSolution(z0, z0, residual, evaluations, evaluations.bool()), None

    with solved_by(model, solve):
        yield


@torch.no_grad()
def logit_lens(model: DEQForCausalLM, input_ids: Tensor, budget: int) -> Tensor:
    """Return what the model predicts after each number of evaluations of f.

    Args:
        model: a deep equilibrium language model.
        input_ids: `(tokens,)`, one text.
        budget: largest number of evaluations, at least 1. The tolerance is zero.

    Returns:
        Log-probabilities `(budget, tokens, vocab_size)`: of the next token, after 1, 2, ... evaluations, from the best
        iterate so far.

    Raises:
        ValueError: if there is no token, or the budget is not positive.
    """
    ids = input_ids[None].to(model.device)
    with evaluating(model), unconverged_on_purpose():
        logits = [
            model(ids, use_cache=False, solver_tolerance=0.0, solver_max_evaluations=evaluations).logits[0]
            for evaluations in range(1, Dial(solver_max_evaluations=budget).solver_max_evaluations + 1)
        ]
    return torch.stack(logits).log_softmax(-1)
