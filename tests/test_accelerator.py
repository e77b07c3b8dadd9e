"""The laws on a GPU: it computes what a CPU does. Skipped where there is none."""

import pytest
import torch
from families import every_family, random_ids

from hf_deq.fixed_point import EVALUATIONS_BETWEEN_SYNCHRONISATIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GRADIENTS = {
    "implicit": {},
    "phantom": {"phantom_steps": 3},
    "unrolled": {"solver_max_evaluations": 12},
    "reversible": {"solver_max_evaluations": 12},
}


def step(model, ids, mask=None):
    """Logits, evaluations and gradients of a training step, on the CPU."""
    output = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    return output.logits.cpu(), output.num_evaluations.cpu(), gradients


@every_family
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_a_training_step_is_that_of_a_cpu(family, gradient):
    model, ids = family.model(gradient=gradient, **GRADIENTS[gradient]), random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = step(model, ids, mask)
    found = step(family.model(gradient=gradient, **GRADIENTS[gradient]).cuda(), ids.cuda(), mask.cuda())
    torch.testing.assert_close(found[0][mask > 0], expected[0][mask > 0], rtol=0, atol=1e-8)
    assert (found[1] - expected[1]).abs().max() <= 1
    for name, exact in expected[2].items():
        torch.testing.assert_close(found[2][name], exact, rtol=1e-6, atol=1e-8)


@every_family
def test_packed_texts_are_separate(family):
    model, first, second = family.model().cuda(), random_ids(1, 5).cuda(), random_ids(1, 4).cuda()
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None].cuda()
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(text, use_cache=False).logits for text in (first, second)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)


@every_family
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_that_of_a_cpu(family, cache):
    ids, how = random_ids(2, 6), dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, disable_compile=True)
    expected = family.model().generate(ids, **how)
    found = family.model().cuda().generate(ids.cuda(), **how, cache_implementation=cache)
    assert torch.equal(found.cpu(), expected)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_solves_and_has_finite_gradients(family, dtype):
    model = family.model(solver_tolerance=3e-2, backward_tolerance=3e-2).float().cuda().train()
    with torch.autocast("cuda", dtype):
        output = model(random_ids(4, 16).cuda(), labels=random_ids(4, 16).cuda(), use_cache=False)
    output.loss.backward()
    assert output.converged.all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_family
def test_the_solver_looks_seldom(family):
    """A look is a wait of the host: once every few evaluations, and a constant number besides."""
    model, ids = family.model().cuda(), random_ids(2, 9).cuda()
    waits = {}
    for tolerance in (1e-2, 1e-9):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output = model(ids, use_cache=False, solver_tolerance=tolerance)
        reads = sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")
        waits[tolerance] = reads - int(output.num_evaluations.max()) // EVALUATIONS_BETWEEN_SYNCHRONISATIONS
    assert max(waits.values()) <= 5, waits
