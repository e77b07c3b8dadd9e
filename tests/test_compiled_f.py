"""f compiled by itself: the same results, early stopping, one compilation for each shape."""

import pytest
import torch
from families import TRANSFORMER, TRELLISNET, every_family, random_ids
from torch._dynamo.utils import counters
from transformers import StaticCache

QUICK = {"backend": "eager"}  # traces and guards as any backend does, without a compiler


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model, ids):
    """Logits, evaluations and gradients of a training step."""
    output = model(ids, labels=ids, use_cache=False)
    model.zero_grad()
    output.loss.backward()
    return output.logits, output.num_evaluations, {name: p.grad.clone() for name, p in model.named_parameters()}


@every_family
def test_compiled_and_eager_agree_and_each_shape_is_compiled_once(family):
    ids, others = random_ids(2, 6), random_ids(2, 6)
    eager, compiled = family.model(), family.model()
    compiled.compile_f(**QUICK)
    for batch in (ids, others):
        expected, found = step(eager, batch), step(compiled, batch)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
        assert torch.equal(found[1], expected[1]) and found[1].max() < 100  # it stopped early, as before
        for name, exact in expected[2].items():
            torch.testing.assert_close(found[2][name], exact, rtol=1e-6, atol=1e-9)
        step(compiled, batch)
        graphs = counters["stats"]["unique_graphs"]
        step(compiled, batch)
        assert counters["stats"]["unique_graphs"] == graphs > 0


@every_family
def test_the_jacobian_loss_does_not_need_the_compiler(family):
    losses = []
    for compiles in (False, True):
        model = family.model(jacobian_loss_weight=1.0).train()
        if compiles:
            model.compile_f(backend="aot_eager")
        torch.manual_seed(0)
        ids = torch.arange(12).view(2, 6)
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        losses.append(output.jacobian_loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-9)


@every_family
def test_evaluations_stay_cheap_when_dropout_and_padding_vary(family):
    """What f closes over is an input of the compiled code, not a part of it."""
    model = family.model(**dict.fromkeys(family.dropouts, 0.1), solver_tolerance=1e-3, backward_tolerance=1e-2).train()
    model.compile_f(**QUICK)
    counts = []
    for seed in range(4):
        torch.manual_seed(seed)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, : 1 + seed % 3] = 0
        model(random_ids(2, 6), attention_mask=mask, labels=random_ids(2, 6), use_cache=False).loss.backward()
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[1] == counts[-1]


@pytest.mark.slow
def test_decoding_with_a_cache_that_does_not_grow():
    model, ids = TRANSFORMER.model(), random_ids(1, 5)
    how = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, disable_compile=True)
    expected = model.generate(ids, **how)
    model.compile_f(**QUICK)
    assert torch.equal(model.generate(ids, **how, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch.testing.assert_close(model(ids, cache=cache).logits, TRANSFORMER.model()(ids).logits, rtol=0, atol=1e-9)
    trellis = TRELLISNET.model()
    expected = trellis.generate(ids, **how)
    trellis.compile_f(**QUICK)
    assert torch.equal(trellis.generate(ids, **how), expected)  # its cache has a constant size


def test_a_cache_that_grows_is_refused():
    model = TRANSFORMER.model()
    model.compile_f(**QUICK)
    with pytest.raises(ValueError, match='DynamicCache grows with every token.*cache_implementation="static"'):
        model.generate(random_ids(1, 5), max_new_tokens=3, min_new_tokens=3)


def test_the_setting_is_not_saved(tmp_path):
    model = TRANSFORMER.model()
    model.compile_f()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.model.layers[0].compile_options is None


@pytest.mark.slow
@every_family
def test_with_a_compiler(family):
    model, ids = family.model(), random_ids(2, 6)
    expected = step(model, ids)
    model.compile_f()
    for a, b in zip(step(model, ids), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_a_whole_model_with_a_compiler(solver):
    """As `TrainingArguments(torch_compile=True)` does."""
    model, ids = TRANSFORMER.model(solver=solver, solver_max_evaluations=3), random_ids(2, 6)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = torch.compile(model)(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
