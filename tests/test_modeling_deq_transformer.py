"""DEQ-Transformer: the laws of the house, and what only attention has."""

import pytest
import torch
from families import ATTRACTOR, PAPER, TRANSFORMER, application_of_f, random_ids
from generation_laws import GenerationLaws
from memory_laws import MemoryLaws
from model_laws import ModelLaws
from transformers import DynamicCache

from hf_deq import modeling_deq_transformer


class TestLaws(ModelLaws):
    family = TRANSFORMER


class TestMemory(MemoryLaws):
    family = TRANSFORMER


class TestGeneration(GenerationLaws):
    family = TRANSFORMER


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"num_hidden_layers": 2}, {"solver": "picard"}])
def test_one_slot_per_token_and_layer_whatever_the_evaluations(fields):
    model = TRANSFORMER.model(**fields)
    cache = DynamicCache(config=model.config)
    output = model(random_ids(2, 3), cache=cache, use_cache=True)
    assert output.num_evaluations.min() > 5
    assert len(cache.layers) == model.config.num_hidden_layers
    assert [layer.keys.shape for layer in cache.layers] == [(2, 2, 3, 8)] * len(cache.layers)


@pytest.mark.parametrize("fields", [{}, {"norm_position": "pre", "position_embedding_type": "relative"}])
def test_a_memory_of_limited_length_is_the_last_states(fields):
    model = TRANSFORMER.model(**fields, memory_length=4)
    first, second = random_ids(2, 3), random_ids(2, 3)
    assert TRANSFORMER.model(**fields)(first).memory is None
    memory = model(first).memory
    assert [state.shape for state in memory] == [(2, 3, 16), (2, 3, 48)]
    longer = model(second, memory=memory).memory
    assert [state.shape for state in longer] == [(2, 4, 16), (2, 4, 48)]
    torch.testing.assert_close(longer[0][:, 0], memory[0][:, 2])


def test_memory_is_for_models_that_remember():
    memory, ids = TRANSFORMER.model(memory_length=8)(random_ids(1, 5)).memory, random_ids(1, 4)
    with pytest.raises(ValueError, match="remembers nothing: set memory_length"):
        TRANSFORMER.model()(ids, memory=memory)


def test_positions_are_counted_from_the_memory_whatever_they_are():
    model = TRANSFORMER.model(memory_length=8)
    memory, ids = model(random_ids(1, 5)).memory, random_ids(1, 4)
    logits = [model(ids, memory=memory, position_ids=torch.arange(4)[None] + start).logits for start in (0, 5, 70)]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-7)


def test_nothing_is_remembered_after_a_cache():
    model = TRANSFORMER.model(memory_length=8)
    first = model(random_ids(1, 5), use_cache=True)
    assert first.memory is not None
    assert model(random_ids(1, 2), cache=first.cache, use_cache=True).memory is None


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_attentions_are_those_of_the_equilibrium():
    """Those of the last layer: close to what a coarser solve has, and far from those of its first evaluation."""
    model, ids = TRANSFORMER.model(attn_implementation="eager", num_hidden_layers=2), random_ids(2, 7)
    exact, coarse, first = (
        model(ids, output_attentions=True, **dial).attentions[0]
        for dial in ({}, {"solver_tolerance": 1e-6}, {"solver_max_evaluations": 1})
    )
    assert exact.shape == (2, 2, 7, 7)
    torch.testing.assert_close(exact.sum(-1), torch.ones(2, 2, 7, dtype=exact.dtype), rtol=0, atol=1e-6)
    assert (coarse - exact).abs().max() < 1e-4 < (first - exact).abs().max()


@pytest.mark.parametrize("fields", [{}, {"norm_position": "pre", "position_embedding_type": "relative"}])
def test_attention_backends_agree(fields):
    ids, mask = random_ids(2, 8), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    logits = [
        TRANSFORMER.model(**fields, attn_implementation=attention)(ids, attention_mask=mask).logits
        for attention in ("sdpa", "eager")
    ]
    assert (logits[0] - logits[1])[mask.bool()].abs().max() < 1e-8


def test_relative_positions_refuse_flash_attention():
    model = TRANSFORMER.model(position_embedding_type="relative")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='position_embedding_type="relative".*sdpa'):
        model(random_ids(1, 4))


def test_embeddings_are_injected_at_unit_size():
    model = TRANSFORMER.model()
    ids = random_ids(1, 4)
    injected = model(ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(injected, model.get_input_embeddings()(ids) * 4.0)  # the square root of hidden_size 16


@pytest.mark.parametrize(
    "fields, commutes",
    [
        (PAPER | {"norm_position": "pre_open"}, True),  # torchdeq's: no isolated fixed point
        (PAPER | {"norm_position": "pre_normalized_residual"}, False),  # the authors'
        (PAPER | {"norm_position": "pre"}, False),  # closed by a norm
    ],
)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_pre_norm_maps_that_commute_with_shifts_of_all_features(fields, commutes):
    """f(z + c) = f(z) + c means a line of fixed points, or none; hence the norm that closes f by default."""
    model, ids = TRANSFORMER.model(**fields), random_ids(2, 5)
    z, shift = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 5, 1, dtype=torch.float64)
    images = [application_of_f(model, ids, state, solver_max_evaluations=1)[0] for state in (z, z + shift)]
    assert ((images[1] - images[0] - shift).abs().max() < 1e-9) == commutes


def test_variational_masks_are_one_for_all_positions():
    for name in ("embedding_dropout", "output_dropout"):
        for variational in (True, False):
            model = TRANSFORMER.model(**{name: 0.5}, variational_dropout=variational).train()
            states = model(random_ids(3, 20), output_hidden_states=True).hidden_states
            dropped = states[name == "output_dropout"] == 0
            assert 0 < dropped.sum() < dropped.numel()
            assert torch.equal(dropped.all(1), dropped.any(1)) == variational


@pytest.mark.parametrize("variational", [True, False])
def test_variational_masks_inside_f_are_one_for_all_positions(variational, monkeypatch):
    shapes, draw = [], modeling_deq_transformer.draw_dropout_mask

    def drawing(like, *arguments):
        mask = draw(like, *arguments)
        shapes.extend([] if mask is None else [tuple(mask.shape)])
        return mask

    monkeypatch.setattr(modeling_deq_transformer, "draw_dropout_mask", drawing)
    TRANSFORMER.model(hidden_dropout=0.5, variational_dropout=variational).train()(random_ids(3, 7))
    assert shapes == [(3, 1 if variational else 7, 16)] * 2


@pytest.mark.parametrize(
    "fields", [{}, {"sliding_window": 4}, {"position_embedding_type": "relative"}, {"attn_implementation": "eager"}]
)
def test_attention_dropout_drops_weights_and_keeps_their_mean(fields):
    """With a memory too; a solve that converges has seen one mask only."""
    model = TRANSFORMER.model(**fields | {"attention_dropout": 0.4, "memory_length": 6})
    memory, ids = model(random_ids(1, 6)).memory, random_ids(1, 5)
    exact = model(ids, memory=memory).logits
    model.train()
    outputs = [model(ids, memory=memory) for _ in range(40)]
    assert all(output.converged.all() for output in outputs)
    mean = torch.stack([output.logits for output in outputs]).mean(0)
    assert 0 < (mean - exact).norm() < (outputs[0].logits - exact).norm()
    model.eval()
    model.model.layers.train()  # dropout at inference: still no look ahead
    changed = torch.cat([ids[:, :4], random_ids(1, 1)], 1)
    logits = []
    for given in (ids, changed):
        torch.manual_seed(3)
        logits.append(model(given, use_cache=False, solver_max_evaluations=4).logits[:, :4])
    assert (logits[0] - logits[1]).abs().max() <= 1e-12
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention_dropout change the attention weights"):
        model(ids)


@pytest.mark.parametrize("fields", [{"cutoffs": [9, 30], "div_val": 2}, {"embedding_size": 10}])
def test_clustered_vocabularies_keep_their_size(fields):
    for model in (TRANSFORMER.model(**fields), TRANSFORMER.model(**fields).model):
        assert model.resize_token_embeddings(61) is model.get_input_embeddings()
        for how in ({"new_num_tokens": 70}, {"pad_to_multiple_of": 64}):
            with pytest.raises(ValueError, match="cannot be resized: make a model of vocab_size=(70|64)"):
                model.resize_token_embeddings(**how)


def test_a_projection_can_be_shared_by_embeddings_and_softmax(tmp_path):
    """Tied clusters are one parameter, before and after saving; the others are not."""
    fields = {"cutoffs": [9, 30], "div_val": 2, "tied_projections": [1, 2]}
    model = TRANSFORMER.model(**fields)
    model.save_pretrained(tmp_path)
    for one in (model, TRANSFORMER.model_class.from_pretrained(tmp_path)):
        embedding, head = one.get_input_embeddings(), one.get_output_embeddings()
        for name in (
            "cluster0_weight",
            "cluster1_weight",
            "cluster2_weight",
            "projection1_weight",
            "projection2_weight",
        ):
            assert getattr(embedding, name) is getattr(head, name), name
        assert embedding.projection0_weight is not head.projection0_weight


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
@pytest.mark.parametrize("family", [TRANSFORMER, ATTRACTOR], ids=["transformer", "attractor"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_values_that_overflow_are_no_solution(family, attention):
    """They become zero for the others, and their own position fails, even if the kernel makes numbers of its NaN."""
    model = family.model(attn_implementation=attention)
    (*_, last) = (module for module in model.modules() if hasattr(module, "qkv_proj"))
    queries = last.num_heads * model.config.head_dim
    with torch.no_grad():
        last.qkv_proj.weight[queries:] *= 1e308
    output = model(random_ids(2, 5), use_cache=False)
    assert last.qkv_proj.weight.isfinite().all() and not output.converged.any()
