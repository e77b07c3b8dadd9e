"""Attention: what one position holds, however large, reaches no position that may not see it."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from families import ATTRACTOR, TRANSFORMER, random_ids
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_deq.attention_deq import additive_mask, attend, contain_failures, let_fail
from hf_deq.positions_deq import RelativePositions, RotaryPositions

LENGTH, HEADS, SIZE, BAD = 6, 2, 8, 4
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()[None, None]


def relative_positions(dtype):
    bias = torch.ones(HEADS, SIZE, dtype=dtype)
    distances = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).clamp_min(0)
    attention = SimpleNamespace(position_bias=bias, content_bias=bias, scaling=SIZE**-0.5)
    return RelativePositions(torch.empty(0), distances, attention, torch.ones(HEADS, SIZE, LENGTH, dtype=dtype))


def attention_of(heads, implementation, mask, relative=False):
    """The output for queries, keys and values `(1, sequence, 3 heads, size)`, as a layer computes it."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = SimpleNamespace(
        _attn_implementation=implementation, sliding_window=None, head_dim=SIZE, rope_parameters=rope
    )
    module = SimpleNamespace(config=config, scaling=SIZE**-0.5, num_key_value_groups=1, is_causal=True, training=False)
    heads, holds = contain_failures(heads)
    query, key, value = heads.chunk(3, 2)
    rotary = RotaryPositions.make(config, torch.arange(LENGTH)[None], heads.dtype)
    positions = relative_positions(heads.dtype) if relative else rotary
    query, key = positions.rotate(query).transpose(1, 2), positions.rotate(key).transpose(1, 2)
    query, mask = positions.score(query, mask)
    return let_fail(attend(module, query, key, value.transpose(1, 2), mask, {})[0], holds)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [float("nan"), float("inf"), 1.0, 0.8, 0.4, 0.2, 1e-2, 1e-9, 1e-20, 1e-120])
def test_a_large_number_reaches_no_position_that_may_not_see_it(share, dtype, implementation):
    """`share` is the part of the largest number of the dtype."""
    torch.manual_seed(0)
    heads = torch.randn(1, LENGTH, 3 * HEADS, SIZE, dtype=dtype).abs()
    additive = additive_mask(CAUSAL, dtype)
    ways = [(additive, False), (additive, True)]
    if implementation == "sdpa":
        ways += [(CAUSAL, False), (None, False)]
    queries, keys, values, every = slice(0, 2), slice(2, 4), slice(4, 6), slice(0, 6)
    for (mask, relative), part in product(ways, (queries, keys, values, every)):
        large = heads.clone()
        large[:, BAD, part] = share * torch.finfo(dtype).max
        before, after = (attention_of(states, implementation, mask, relative) for states in (heads, large))
        assert torch.equal(before[:, :BAD], after[:, :BAD])
        assert before.isfinite().all() and after[:, :BAD].isfinite().all()
        if not share <= 0.25:
            assert after[:, BAD].isnan().all()


def adding(module, query, key, value, attention_mask, scaling, **kwargs):
    """An attention function that somebody else might register."""
    key, value = (heads.repeat_interleave(module.num_key_value_groups, 1) for heads in (key, value))
    weights = (query @ key.transpose(-2, -1) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


@pytest.mark.parametrize("family", [TRANSFORMER, ATTRACTOR], ids=["transformer", "attractor"])
def test_a_registered_function_gets_the_mask_that_was_made_for_it(family, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "adding", adding)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "adding", eager_mask)
    ids, padding = random_ids(2, LENGTH), torch.tensor([[0, 0] + [1] * 4, [1] * 6])
    prepared = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.float64)
    prepared.masked_fill_(~CAUSAL, torch.finfo(torch.float64).min)
    how = dict(attention_mask=padding, max_new_tokens=4, do_sample=False, eos_token_id=None, disable_compile=True)
    logits, texts = [], []
    for name in ("sdpa", "adding"):
        model = family.model(attn_implementation=name)
        logits.append(model(ids, attention_mask=prepared).logits)
        texts.append(model.generate(ids * padding, cache_implementation="static", **how))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-8)
    assert torch.equal(*texts)


@pytest.mark.parametrize("fields", [{}, {"position_embedding_type": "relative"}, {"attention_dropout": 0.3}], ids=str)
def test_a_model_is_causal_under_the_name_for_paged_rows(fields):
    """Continuous batching gives it this name, and anybody can."""
    ids, outputs = random_ids(1, LENGTH), []
    for name in ("eager", "paged|eager"):
        model = TRANSFORMER.model(**fields, attn_implementation="eager").train()
        model.set_attn_implementation(name)
        torch.manual_seed(1)
        outputs.append(model(ids, use_cache=False).logits)
    torch.testing.assert_close(*outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
@pytest.mark.parametrize("family", [TRANSFORMER, ATTRACTOR], ids=["transformer", "attractor"])
def test_a_compiler_keeps_the_failure_where_it_is(family):
    """Compilers simplify arithmetic on numbers that are not finite."""
    embeds = family.model().get_input_embeddings()(random_ids(1, 6)).detach()
    poisoned = embeds.clone()
    poisoned[:, 1] = float("inf")
    packed = dict(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    outputs = []
    for compiles in (False, True):
        model = family.model()
        if compiles:
            torch._dynamo.reset()
            model.compile_f()
        outputs.append(model(inputs_embeds=poisoned, **packed))
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=0, atol=1e-9, equal_nan=True)
    for output in outputs:
        assert output.converged.tolist() == [False, True]
        assert output.logits.isnan().any(-1)[0].tolist() == [False, True, False, False, False, False]
