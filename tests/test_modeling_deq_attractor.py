"""Attractor models: the laws of the house, and what is special to a family with a prelude."""

import pytest
import torch
from families import ATTRACTOR, application_of_f, random_ids
from generation_laws import GenerationLaws
from huggingface_hub.errors import StrictDataclassError
from model_laws import ModelLaws
from torch.nn.functional import silu


class TestLaws(ModelLaws):
    family = ATTRACTOR


class TestGeneration(GenerationLaws):
    family = ATTRACTOR


def test_the_prelude_runs_once_a_call_and_the_solve_starts_at_its_output():
    model, calls, starts = ATTRACTOR.model(num_hidden_layers=3, num_prelude_layers=2), [], []
    layer = model.model.layers[0]
    for block in layer.prelude:
        block.register_forward_hook(lambda module, inputs, output: calls.append(output[0]))
    solve = layer.solve
    layer.solve = lambda f, z0, *others: starts.append(z0) or solve(f, z0, *others)
    output = model(random_ids(2, 7))
    assert output.num_evaluations.min() > 3 and len(calls) == len(layer.prelude) == 2
    assert torch.equal(starts[0], calls[-1])


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_every_layer_of_the_prelude_is_recorded():
    model = ATTRACTOR.model(num_hidden_layers=3, num_prelude_layers=2, attn_implementation="eager")
    ids = random_ids(2, 5)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(2, 5, 16)] * 4
    assert [weights.shape for weights in output.attentions] == [(2, 2, 5, 5)] * 3
    torch.testing.assert_close(output.attentions[-1].sum(-1), torch.ones(2, 2, 5).double())
    coarse, first = (
        model(ids, output_attentions=True, **dial).attentions[-1]
        for dial in ({"solver_tolerance": 1e-6}, {"solver_max_evaluations": 1})
    )
    exact = output.attentions[-1]
    assert (coarse - exact).abs().max() < 1e-4 < (first - exact).abs().max()


def test_the_cache_has_one_slot_per_layer_however_many_evaluations():
    model = ATTRACTOR.model(num_hidden_layers=3, num_prelude_layers=1)
    for budget in (1, 20):
        cache = model(random_ids(2, 7), solver_max_evaluations=budget, use_cache=True).cache
        assert [layer.keys.shape for layer in cache.layers] == [(2, 2, 7, 8)] * 3


def gradients_and_masks(checkpointed: bool, **fields) -> tuple[list, list]:
    """The gradients of a training step, and the dropout masks that its layers drew."""
    model, ids, drawn = ATTRACTOR.model(**fields).train(), random_ids(2, 7), []
    for block in [*model.model.layers[0].prelude, *model.model.layers[0].head]:
        block.draw_factors = lambda like, draw=block.draw_factors: drawn.append(draw(like)) or drawn[-1]
    if checkpointed:
        model.activation_checkpointing_enable()
    torch.manual_seed(3)
    model(ids, labels=ids).loss.backward()
    return [parameter.grad for parameter in model.parameters()], drawn


@pytest.mark.parametrize("num_prelude_layers", [0, 2])
def test_every_layer_has_dropout_and_checkpointing_repeats_its_masks(num_prelude_layers):
    fields = dict(num_hidden_layers=3, num_prelude_layers=num_prelude_layers, hidden_dropout=0.3)
    gradients, drawn = gradients_and_masks(False, **fields)
    assert len(drawn) == 3 and all(mask.shape == (2, 7, 16) and (mask == 0).any() for pair in drawn for mask in pair)
    repeated, drawn = gradients_and_masks(True, **fields)
    assert len(drawn) == 3 + num_prelude_layers
    for plain, recomputed in zip(gradients, repeated, strict=True):
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_one_application_of_f_written_out():
    """One position and one head at a time, from the equations."""
    fields = dict(num_hidden_layers=1, num_prelude_layers=0, num_attention_heads=4, num_key_value_heads=2)
    model = ATTRACTOR.model(**fields, layer_scale_max=0.9)
    block, ids = model.model.layers[0].head[0], random_ids(1, 5)
    y, context = torch.randn(5, 16, dtype=torch.float64), model.model.embed_tokens(ids)[0]
    image, _ = application_of_f(model, ids, y[None])
    x, size = y + context, 4

    def rms(states, weight=1.0, epsilon=1e-5):
        return states / (states.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight

    def rotated(head, place):
        angle = place * 10_000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        first, second = head.chunk(2)
        cosine, sine = angle.cos(), angle.sin()
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine])

    heads = (block.self_attn.qkv_proj.weight @ rms(x).T).T.unflatten(-1, (8, size))
    eps = torch.finfo(torch.float64).eps
    attended = torch.zeros(5, 16, dtype=torch.float64)
    for t in range(5):
        for h in range(4):
            query = rms(rotated(heads[t, h], t), epsilon=eps)
            keys = torch.stack([rms(rotated(heads[s, 4 + h // 2], s), epsilon=eps) for s in range(t + 1)])
            weights = (keys @ query / size**0.5).softmax(0)
            attended[t, h * size : (h + 1) * size] = weights @ heads[: t + 1, 6 + h // 2]
    attended = attended @ block.self_attn.o_proj.weight.T * 0.9 * block.attention_scale.weight.sigmoid()
    gate, up = (rms(x + attended) @ block.mlp.up_proj.weight.T).chunk(2, -1)
    fed = (silu(gate) * up) @ block.mlp.down_proj.weight.T * 0.9 * block.feed_forward_scale.weight.sigmoid()
    torch.testing.assert_close(image[0], context + attended + fed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("initial, limit", [(0.5, 1.0), (0.75, 0.75), (0.1, 3)])
def test_gates_start_at_their_initial_value(initial, limit):
    model = ATTRACTOR.model(layer_scale_init_value=initial, layer_scale_max=limit)
    gate = model.model.layers[0].head[0].attention_scale
    torch.testing.assert_close(gate(torch.ones(16)), torch.full((16,), initial).double(), rtol=1e-5, atol=0)
    assert gate.weight.isfinite().all()
    assert not any("scale" in name for name, _ in model.model.layers[0].prelude.named_parameters())


def test_a_memory_is_refused_with_a_remedy_that_exists():
    state = torch.zeros(1, 3, 16).double()
    with pytest.raises(ValueError, match="memory was given to a model that remembers nothing: use a cache"):
        ATTRACTOR.model()(random_ids(1, 3), memory=(state, state))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_prelude_layers": 2}, "num_prelude_layers=2 must be below num_hidden_layers=2"),
        ({"num_prelude_layers": -1}, "num_prelude_layers must be zero or positive"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=2"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1"),
        ({"layer_scale_max": 0.0}, "layer_scale_max must be positive"),
        ({"layer_scale_max": -1.0}, "layer_scale_max must be positive"),
        ({"layer_scale_max": 0.25}, "layer_scale_init_value=0.5 must be positive, and at most layer_scale_max=0.25"),
        ({"layer_scale_init_value": 0.0}, "None leaves the gates out"),
        ({"qk_norm": "layer"}, "qk_norm must be one of"),
        ({"embedding_dropout": -0.1}, r"embedding_dropout must lie in \[0, 1\)"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must lie in \[0, 1\)"),
        ({"output_dropout": 1.0}, r"output_dropout must lie in \[0, 1\)"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping must be positive"),
        ({"logit_scale": float("nan")}, "logit_scale must be positive"),
        ({"sliding_window": 1}, "sliding_window must be at least 2"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
        ({"hidden_act": "sin"}, "hidden_act must be one of"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ATTRACTOR.config(**fields)
