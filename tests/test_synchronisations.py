"""How often a model makes the host wait for an accelerator. Every read of a number from a tensor is such a wait.

A CPU stands in for the accelerator: the solver is told to look as seldom as it does there, and a dispatch mode counts.
"""

import math

import pytest
import torch
from families import every_family, random_ids

from hf_deq import fixed_point
from hf_deq.evaluation.operation_counts import CountOperations

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal")


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    seldom = fixed_point.EVALUATIONS_BETWEEN_SYNCHRONISATIONS
    monkeypatch.setattr(fixed_point, "_may_look", lambda evaluation, z: evaluation % seldom == 0)


def waits(call) -> tuple[int, int]:
    """How often the host waits outside of the looks at a solve, and evaluations of the solve."""
    with CountOperations() as operations:
        output = call()
    total = sum(count for name, count in operations.names.items() if any(kind in name for kind in WAITING))
    evaluations = int(output.num_evaluations.max())
    looks = math.ceil(evaluations / fixed_point.EVALUATIONS_BETWEEN_SYNCHRONISATIONS)
    return total - looks, evaluations


@torch.no_grad()
@every_family
@pytest.mark.parametrize("tolerance", [1e-2, 1e-9])
def test_a_forward_pass_waits_twice_and_once_every_four_evaluations(family, tolerance):
    """Are the ids of the vocabulary, and is everything solved?

    With a padding mask, the model and Transformers each ask if there is padding.
    """
    model, ids = family.model(), random_ids(2, 9)
    dial = dict(solver_tolerance=tolerance, solver_max_evaluations=100)
    cache = model(ids, use_cache=True, **dial).cache
    assert waits(lambda: model(ids, use_cache=False, **dial))[0] <= 2
    assert waits(lambda: model(ids[:, :1], cache=cache, **dial))[0] <= 2
    mask = torch.ones_like(ids)
    assert waits(lambda: model(ids, attention_mask=mask, use_cache=False, **dial))[0] <= 4


@every_family
def test_a_training_step_waits_no_more_for_more_evaluations(family):
    """Forward and backward solves each look once every four evaluations, and once at their end."""
    model, ids = family.model().train(), random_ids(2, 9)

    def step(tolerance):
        model.config.solver_tolerance = model.config.backward_tolerance = tolerance
        model.config.solver_max_evaluations = model.config.backward_max_evaluations = 100
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        return output

    outside = {}
    for tolerance in (1e-2, 1e-8):
        rest, _ = waits(lambda tolerance=tolerance: step(tolerance))
        backward = int(model.model.layers[0].backward_evaluations.max())
        outside[tolerance] = rest - math.ceil(backward / fixed_point.EVALUATIONS_BETWEEN_SYNCHRONISATIONS)
    assert max(outside.values()) <= 3, outside
