"""What the equilibrium adds to its start, whether it depends on it, and what each evaluation would predict."""

import numpy as np
import pytest
import torch
from families import ATTRACTOR, TRANSFORMER, every_family, random_ids

from hf_deq.data import TokenStream
from hf_deq.evaluation import HeldOutText, Protocol, dial_settings, evaluate_dial
from hf_deq.evaluation.starts import distances_from_start, logit_lens, path_independence, starts_at_zero, unsolved


@every_family
def test_distances_from_the_start(family):
    model, ids = family.model(), random_ids(3, 6)
    distances = distances_from_start(model, ids)
    assert distances.shape == (3,) and distances.dtype == np.float64
    assert starts_at_zero(model, ids) == family.starts_at_zero
    if family.starts_at_zero:
        np.testing.assert_allclose(distances, 1, rtol=1e-12)
        return
    layer, states = model.model.layers[0], []
    layer.prelude[-1].register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    layer.register_forward_hook(lambda module, inputs, output: states.append(output.hidden_states))
    model(ids)
    start, equilibrium = states[-2:]
    expected = (equilibrium - start).flatten(1).norm(dim=1) / equilibrium.flatten(1).norm(dim=1)
    np.testing.assert_allclose(distances, expected.detach().numpy(), rtol=1e-7)
    assert (distances > 0.01).all()


@every_family
def test_an_equilibrium_that_does_not_depend_on_its_start(family):
    model, ids = family.model(), random_ids(3, 6)
    assert path_independence(model, ids) == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match="at least two rows"):
        path_independence(model, ids[:1])


def test_an_f_with_many_equilibria_depends_on_its_start(monkeypatch):
    """Where nothing moves, every state is a fixed point, and two texts keep what they started with."""
    model, ids = TRANSFORMER.model(), random_ids(2, 6)
    states = torch.randn(2, 6, 16, dtype=torch.float64)
    monkeypatch.setattr("hf_deq.evaluation.starts.captured_map", lambda model, ids: (lambda z: z.clone(), states))
    assert path_independence(model, ids) < 0.9


@torch.no_grad()
def test_the_start_can_be_scored():
    model, ids = ATTRACTOR.model(), random_ids(2, 6)
    solved = model(ids, use_cache=False).logits
    with unsolved(model):
        output = model(ids, use_cache=False)
    assert output.num_evaluations.tolist() == [0, 0] and not output.converged.any()
    states = []
    hook = model.model.layers[0].prelude[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
    assert torch.equal(model(ids, use_cache=False).logits, solved)
    hook.remove()
    expected = model.lm_head(model.model.norm(states[0][0]))
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-12)
    assert (expected - solved).abs().max() > 1e-3


@every_family
def test_the_table_has_a_row_of_the_start_where_it_says_something(family):
    stream = TokenStream(random_ids(1, 80)[0], num_words=20, num_bytes=200)
    held_out = HeldOutText("random", "test", stream, 1, Protocol(length=8))
    model = family.model(solver_tolerance=1e-3)
    evaluation = evaluate_dial(model, held_out, dial_settings(model.config, [1, 2], [1e-3]))
    labels = [row["dial"] for row in evaluation.table()]
    if family.starts_at_zero:
        assert labels == ["1 evaluation", "2 evaluations", "tolerance 0.001"]
    else:
        assert labels == ["no evaluation, the start", "1 evaluation", "2 evaluations", "tolerance 0.001"]
        assert evaluation.rows[0]["num_evaluations"] == 0
        assert evaluation.rows[0]["perplexity"] != evaluation.rows[1]["perplexity"]
    assert evaluation.path_independence > 0.99 and 0 < evaluation.distance_from_start <= 1 + 1e-9


@every_family
def test_the_lens_sees_what_each_budget_predicts(family):
    model, ids = family.model(), random_ids(1, 7)[0]
    seen = logit_lens(model, ids, 5)
    assert seen.shape == (5, 7, model.config.vocab_size)
    for evaluations in (1, 3, 5):
        logits = model(ids[None], use_cache=False, solver_tolerance=0.0, solver_max_evaluations=evaluations).logits[0]
        torch.testing.assert_close(seen[evaluations - 1], logits.log_softmax(-1).detach(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="solver_max_evaluations must be a whole number of at least 1"):
        logit_lens(model, ids, 0)
