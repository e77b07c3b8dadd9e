"""What is remembered between calls: read without a trace, written once, of constant size where it can be."""

import pytest
import torch
from families import ATTRACTOR, TRANSFORMER, TRELLISNET, every_family, random_ids
from transformers import DynamicCache, StaticCache

from hf_deq.cache_deq import EquilibriumCacheView, TrellisStateLayer

WINDOWS = [{}, {"sliding_window": 4}]


@pytest.mark.parametrize("fields", WINDOWS)
@pytest.mark.parametrize("kind", ["dynamic", "static", "without config"])
@pytest.mark.parametrize("has_grad", [True, False])
def test_the_view_reads_as_the_cache_would_and_writes_nothing(fields, kind, has_grad):
    def make():
        config = None if kind == "without config" else TRANSFORMER.config(**fields)
        return StaticCache(config=config, max_cache_len=9) if kind == "static" else DynamicCache(config=config)

    cache, reference = make(), make()
    for length in (3, 1, 4, 1):
        new = [torch.randn(2, 2, length, 8) for _ in range(2)]
        view, before = EquilibriumCacheView(cache), int(cache.get_seq_length())
        with torch.set_grad_enabled(has_grad):
            for _ in range(3):  # three evaluations of f, of which the last one counts
                seen = view.update(new[0] + torch.randn(()), new[1], 0), view.update(*new, 0)
        assert int(cache.get_seq_length()) == before
        for ours, theirs in zip(seen[-1], reference.update(*new, 0), strict=True):
            assert torch.equal(ours, theirs)
        view.commit()
        assert torch.equal(cache.layers[0].keys, reference.layers[0].keys)
        assert int(cache.get_seq_length()) == before + length


@every_family
def test_an_offloaded_cache_is_refused(family):
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(ValueError, match="offloaded cache.*use a dynamic or a"):
        family.model()(random_ids(1, 3), cache=cache, use_cache=True)


def test_any_cache_made_for_the_model_holds_states():
    config = TRELLISNET.config()
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=4)):
        assert [type(layer) for layer in cache.layers] == [TrellisStateLayer]
    model, ids = TRELLISNET.model(), random_ids(1, 5)
    cache = DynamicCache()
    model(ids[:, :3], cache=cache, use_cache=True)
    assert type(cache.layers[0]) is TrellisStateLayer and cache.get_seq_length() == 3
    logits = model(ids[:, 3:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 3:], rtol=0, atol=1e-8)


def test_a_cache_of_keys_is_refused_by_a_trellisnet():
    cache = DynamicCache(config=TRANSFORMER.config())
    with pytest.raises(ValueError, match="cache of states, not of DynamicLayer.*DynamicCache\\(config=model.config\\)"):
        TRELLISNET.model()(random_ids(1, 3), cache=cache, use_cache=True)


@pytest.mark.parametrize("fields", [{}, {"kernel_size": 3, "dilation": 4}])
@torch.no_grad()
def test_the_state_cache_has_a_constant_size(fields):
    model = TRELLISNET.model(**fields, solver_tolerance=1e-2)
    cache, window = DynamicCache(config=model.config), (model.config.kernel_size - 1) * model.config.dilation
    for _ in range(3):
        for length in (1, 20):
            model(random_ids(2, length), cache=cache, use_cache=True)
            layer = cache.layers[0]
            assert layer.keys.shape == (2, window, 56) and layer.values.shape == (2, model.config.kernel_size - 1, 16)
            assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert cache.get_seq_length() == 63 and layer.get_max_length() == -1


def states(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States and inputs that say which token they belong to."""
    numbers = torch.arange(first, first + count, dtype=torch.float64)[None, :, None]
    return numbers.expand(2, -1, 4), -numbers.expand(2, -1, 3)


def filled(record: bool) -> TrellisStateLayer:
    """A layer that reaches three states and one input back and has seen tokens 1 to 5."""
    layer = TrellisStateLayer()
    if record:
        layer.activate_past_recording()
    start = torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 1, 3, dtype=torch.float64)
    layer.update(*states(1, 2), past=start)
    layer.update(*states(3, 3), past=layer.past)
    return layer


@pytest.mark.parametrize("record", [False, True])
def test_the_past_is_the_last_window(record):
    kept_states, kept_inputs = filled(record).past
    assert kept_states[0, :, 0].tolist() == [3, 4, 5] and kept_inputs[0, :, 0].tolist() == [-5]


@pytest.mark.parametrize("removed, expected", [(0, [3, 4, 5]), (1, [2, 3, 4]), (4, [0, 0, 1]), (5, [0, 0, 0])])
def test_crop_takes_tokens_back(removed, expected):
    layer = filled(record=True)
    layer.crop(-removed)
    assert layer.past[0][0, :, 0].tolist() == expected
    assert layer.past[1][0, 0, 0] == -expected[-1]
    assert layer.get_seq_length() == 5 - removed
    assert layer.keys.shape[1] == 3 and layer.values.shape[1] == 1  # trimmed, also by crop(0)


def test_crop_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="negative number, got 2"):
        filled(record=True).crop(2)
    with pytest.raises(ValueError, match="activate_past_recording"):
        filled(record=False).crop(-1)


def test_rows_can_be_selected_repeated_and_reordered():
    layer = filled(record=False)
    of_rows = torch.tensor([1.0, 10.0]).view(2, 1, 1)
    layer.keys, layer.values = layer.keys * of_rows, layer.values * of_rows

    def latest():
        return [[abs(number) for number in past[:, -1, 0].tolist()] for past in layer.past]

    layer.reorder_cache(torch.tensor([1, 0]))
    assert latest() == [[50, 5]] * 2
    layer.batch_repeat_interleave(2)
    assert latest() == [[50, 50, 5, 5]] * 2
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert latest() == [[50, 5]] * 2
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.past is None


def test_a_cache_that_was_reset_takes_another_number_of_rows():
    model, ids = TRELLISNET.model(), random_ids(3, 5)
    cache = DynamicCache(config=model.config)
    model(ids[:2], cache=cache, use_cache=True)
    cache.reset()
    torch.testing.assert_close(model(ids, cache=cache, use_cache=True).logits, model(ids).logits)


GIVEN = [("without config", {}), *((kind, fields) for kind in ("dynamic", "static") for fields in WINDOWS)]


@pytest.mark.parametrize("family", [TRANSFORMER, ATTRACTOR])
@pytest.mark.parametrize("gradient", ["implicit", "phantom", "reversible"])
@pytest.mark.parametrize(
    "kind, fields, checkpointing",  # under checkpointing, a model makes no new cache
    [("new", {}, False), *((kind, fields, each) for kind, fields in GIVEN for each in (False, True))],
)
def test_gradients_do_not_depend_on_a_cache_that_is_written(family, gradient, kind, fields, checkpointing):
    """Backward calls f again for some gradients. By then, the cache has the new keys already."""
    loose = dict(solver_tolerance=1e-2, backward_tolerance=1e-2, reversible_steps=8)
    model = family.model(gradient=gradient, **loose, **fields)
    ids, past = random_ids(2, 5), random_ids(2, 3)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()

    def loss(writes: bool) -> torch.Tensor:
        cache = {
            "new": lambda: None,
            "without config": DynamicCache,
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=9),
        }[kind]()
        if cache is not None:
            with torch.no_grad():
                model(past, cache=cache, use_cache=True)
        commit = EquilibriumCacheView.commit
        if not writes:
            EquilibriumCacheView.commit = lambda view: None
        try:
            return model(ids, labels=ids, cache=cache, use_cache=writes or cache is not None).loss
        finally:
            EquilibriumCacheView.commit = commit

    expected, found = loss(writes=False), loss(writes=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    exact = torch.autograd.grad(expected, model.parameters())
    for ours, theirs in zip(torch.autograd.grad(found, model.parameters()), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
