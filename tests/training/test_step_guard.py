"""Steps that are not finite: skipped by the host, or by a fused kernel that the host does not wait for."""

import json
from types import SimpleNamespace

import pytest
import torch
from families import TRANSFORMER

from hf_deq.evaluation.operation_counts import CountOperations
from hf_deq.training import RunArguments, make_optimizer
from hf_deq.training.step_guard import MOST_IN_A_ROW, StepGuard


def accelerator(scaler=None):
    return SimpleNamespace(scaler=scaler, device=torch.device("cpu"))


@pytest.mark.parametrize("waits", [True, False], ids=["host", "fused kernel"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_bad_step_changes_neither_weights_nor_the_state(waits, kind):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1, weight_decay=0.1, fused=not waits)
    guard = StepGuard(accelerator(), optimizer)
    guard.waits = waits
    for gradient, moves in ((1.0, True), (torch.nan, False), (torch.inf, False), (2.0, True)):
        weight.grad = torch.full((3,), gradient)
        before, state = weight.detach().clone(), [t.clone() for s in optimizer.state.values() for t in s.values()]
        guard.step(weight.grad.norm())
        after = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        assert torch.equal(weight, before) != moves
        assert moves or all(torch.equal(one, other) for one, other in zip(after, state, strict=True))
    assert guard.skipped == 2 and guard.in_a_row == 0 and torch.isfinite(weight).all()


def test_the_fused_way_does_not_wait_for_the_device():
    weight = torch.nn.Parameter(torch.ones(3))
    guard = StepGuard(accelerator(), torch.optim.AdamW([weight], fused=True))
    guard.waits = False
    weight.grad = torch.ones(3)
    with CountOperations() as operations:
        guard.step(weight.grad.norm())
    assert not [name for name in operations.names if "item" in name or "local_scalar" in name or "nonzero" in name]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_model_that_will_move_to_an_accelerator_gets_a_fused_optimizer(kind):
    """When the optimizer is made, the model is still on the CPU."""
    model, run = TRANSFORMER.model(), RunArguments(optimizer=kind)
    for device, fused in ((torch.device("cuda"), True), (torch.device("cpu"), False), (None, False)):
        assert make_optimizer(model, run, device).defaults["fused"] is fused


def test_too_many_bad_steps_end_the_run():
    weight = torch.nn.Parameter(torch.ones(1))
    guard = StepGuard(accelerator(), torch.optim.SGD([weight], lr=0.1))
    for _ in range(MOST_IN_A_ROW):
        guard.step(torch.tensor(torch.nan))
    guard.check(MOST_IN_A_ROW, None)
    guard.step(torch.tensor(torch.nan))
    with pytest.raises(ValueError, match=r"last 6 steps, up to step 6.*the last checkpoint is not there \(see save"):
        guard.check(6, None)


def test_a_run_that_goes_on_remembers_its_bad_steps():
    weight = torch.nn.Parameter(torch.ones(1))
    guard, resumed = (StepGuard(accelerator(), torch.optim.SGD([weight], lr=0.1)) for _ in range(2))
    guard.watch(2.0, 1)
    for _ in range(MOST_IN_A_ROW):
        guard.step(torch.tensor(torch.nan))
    resumed.resume(json.loads(json.dumps(guard.state())))
    assert resumed.state() == guard.state() == {"skipped": 5.0, "in_a_row": 5.0, "best_loss": 2.0}
    resumed.step(torch.tensor(torch.nan))
    with pytest.raises(ValueError, match="last 6 steps"):
        resumed.check(6, None)
    new = StepGuard(accelerator(), None)
    new.resume(json.loads(json.dumps(new.state())))
    new.resume({})  # a checkpoint of an earlier version
    assert new.best_loss == float("inf") and new.skipped == 0


def test_a_gradient_scaler_skips_by_itself_and_may_do_so_for_longer():
    steps = []
    optimizer = SimpleNamespace(step=lambda: steps.append(1))
    guard = StepGuard(accelerator(scaler=object()), optimizer)
    for _ in range(16):  # from 65,536 to 1
        guard.step(torch.tensor(torch.inf))
    guard.check(16, None)
    assert len(steps) == 16


def test_a_loss_that_grows_tenfold_is_said_once(caplog):
    guard = StepGuard(accelerator(), None)
    for step, loss in enumerate((3.0, 2.0, 19.0, 21.0, 50.0)):
        guard.watch(loss, step)
    assert caplog.text.count("its best was") == 1 and "At step 3 the loss is 21; its best was 2." in caplog.text
