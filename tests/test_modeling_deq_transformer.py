"""The laws of the house, for DEQ-Transformer and its options: causality, invariance, gradients, round trips."""

import itertools

import pytest
import torch
from conftest import random_ids, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM

from hf_deq import DEQTransformerForCausalLM, DEQTransformerModel

pytestmark = pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")

VARIANTS = [
    dict(norm_position=norm, position_embedding_type=position, num_hidden_layers=layers, sliding_window=window)
    for norm, position, layers, window in [
        *itertools.product(("post", "pre"), ("rotary", "relative"), (1,), (None,)),
        ("post", "rotary", 2, None),
        ("pre", "relative", 2, None),
        ("post", "rotary", 1, 3),
        ("pre", "relative", 1, 3),
    ]
]
variants = pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: "-".join(str(v) for v in f.values()))


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
@pytest.mark.parametrize("budget", [1, 2, 4, 8, 30])
@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-12])
def test_strict_causality_at_any_budget_and_tolerance(solver, budget, tolerance):
    model = tiny_model(solver=solver)
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] - 2) % 58 + 3
    dial = dict(solver_max_evaluations=budget, solver_tolerance=tolerance, use_cache=False)
    difference = (model(ids, **dial).logits - model(changed, **dial).logits).abs()
    assert difference[:, :7].max() <= 1e-12
    assert difference[:, 7].min() > 0


@variants
def test_strict_causality_of_every_variant(fields):
    model = tiny_model(**fields)
    ids = random_ids(2, 10)
    changed = torch.cat([ids[:, :6], random_ids(2, 4)], 1)
    for budget in (2, 5):
        dial = dict(solver_max_evaluations=budget, use_cache=False)
        assert (model(ids, **dial).logits - model(changed, **dial).logits)[:, :6].abs().max() <= 1e-12


@variants
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_do_not_depend_on_the_batch_or_on_padding(fields, attention):
    model = tiny_model(**fields, attn_implementation=attention)
    rows = [random_ids(1, length) for length in (9, 5, 2)]
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(9 - row.shape[1], 9) if side == "left" else slice(0, row.shape[1])
            ids[i, place], mask[i, place] = row[0], 1
        # A small budget, so that agreement is exact by construction and not by convergence.
        for budget in (3, 200):
            batch = model(ids, attention_mask=mask, use_cache=False, solver_max_evaluations=budget)
            for i, row in enumerate(rows):
                alone = model(row, use_cache=False, solver_max_evaluations=budget)
                assert (batch.logits[i][mask[i].bool()] - alone.logits[0]).abs().max() < 1e-9
                assert batch.residual[i] == pytest.approx(alone.residual[0].item(), rel=1e-3, abs=1e-11)


def test_left_padding_with_position_ids_is_exact():
    """What `generate` passes: positions that count tokens only."""
    model = tiny_model()
    row = random_ids(1, 5)
    ids, mask = torch.nn.functional.pad(row, (4, 0)), torch.tensor([[0] * 4 + [1] * 5])
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = model(ids, attention_mask=mask, position_ids=position_ids, solver_max_evaluations=4).logits[:, 4:]
    assert (padded - model(row, solver_max_evaluations=4).logits).abs().max() < 1e-12


@variants
def test_implicit_gradient_equals_200_unrolled_steps(fields):
    def gradients(**how):
        model = tiny_model(**fields, **how, solver_tolerance=1e-12, backward_tolerance=1e-12)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"embeds": embeds.grad}

    ids = random_ids(2, 6)
    implicit, unrolled = gradients(), gradients(gradient="unrolled", solver_max_evaluations=200)
    assert implicit.keys() == unrolled.keys() and len(implicit) > 12
    for name, exact in unrolled.items():
        error = torch.linalg.vector_norm(implicit[name] - exact)
        assert error <= 1e-6 * torch.linalg.vector_norm(exact) + 1e-12, name


@variants
def test_round_trip_is_bitwise(fields, tmp_path):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = random_ids(2, 8)
    assert type(loaded) is DEQTransformerForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(base) is DEQTransformerModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_in_other_dtypes(tied, dtype, tmp_path):
    model = tiny_model(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="cpu")
    ids = random_ids(2, 8)
    assert loaded.dtype == dtype
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied


def test_missing_weights_are_initialised(tmp_path):
    """Loading builds on the meta device: everything that is not in the file must come from _init_weights."""
    model = tiny_model(position_embedding_type="relative")
    loaded = DEQTransformerForCausalLM.from_pretrained(None, config=model.config, state_dict={})
    for name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 10, name
    assert loaded(random_ids(1, 4)).logits.isfinite().all()


def test_bfloat16_converges_to_what_rounding_allows():
    model = tiny_model(solver_tolerance=1e-3, solver_max_evaluations=30).to(torch.bfloat16)
    output = model(random_ids(3, 20))
    assert output.logits.dtype == torch.bfloat16 and output.converged.all()


@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_a_new_default_model_converges_quickly(norm_position):
    torch.manual_seed(0)
    model = DEQTransformerForCausalLM(
        tiny_config(
            vocab_size=500, hidden_size=128, intermediate_size=512, num_attention_heads=4, norm_position=norm_position
        )
    ).eval()
    output = model(torch.randint(3, 500, (4, 64)), solver_tolerance=1e-3)
    assert output.converged.all() and output.num_evaluations.max() <= 15


def test_loss_is_the_library_loss_and_predicts_the_next_token():
    model = tiny_model()
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    flat = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss.float(), flat)
    halves = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=13).loss for i in range(2)]
    torch.testing.assert_close(sum(halves).float(), flat)


def test_logits_to_keep_embeds_and_hidden_states():
    model = tiny_model()
    ids = random_ids(2, 9)
    full = model(ids, output_hidden_states=True)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full.logits[:, -2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full.logits[:, [0, 5]], rtol=0, atol=1e-12
    )
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, full.logits)
    injected, equilibrium_state = full.hidden_states
    assert torch.equal(injected, embeds * 4.0)  # the square root of hidden_size 16
    assert torch.equal(model.lm_head(equilibrium_state), full.logits)


def test_attentions_are_those_of_the_equilibrium():
    model = tiny_model(attn_implementation="eager", num_hidden_layers=2)
    (weights,) = model(random_ids(2, 7), output_attentions=True).attentions
    assert weights.shape == (2, 2, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 7, dtype=weights.dtype), rtol=0, atol=1e-6)


@variants
def test_attention_backends_agree(fields):
    ids, mask = random_ids(2, 8), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    logits = [
        tiny_model(**fields, attn_implementation=attention)(ids, attention_mask=mask).logits
        for attention in ("sdpa", "eager")
    ]
    assert (logits[0] - logits[1])[mask.bool()].abs().max() < 1e-8


def test_relative_positions_refuse_flash_attention():
    model = tiny_model(position_embedding_type="relative")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='position_embedding_type="relative".*sdpa'):
        model(random_ids(1, 4))


def test_dropout_masks_are_drawn_once_per_solve():
    model = tiny_model(hidden_dropout=0.3, embedding_dropout=0.1, output_dropout=0.1).train()
    ids = random_ids(2, 8)
    torch.manual_seed(1)
    first = model(ids, use_cache=False)
    assert first.converged.all()  # impossible if f changed between its evaluations
    torch.manual_seed(1)
    assert torch.equal(model(ids, use_cache=False).logits, first.logits)
    assert not torch.allclose(model(ids, use_cache=False).logits, first.logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_jacobian_loss_enters_the_loss():
    ids = random_ids(4, 8)
    assert tiny_model().train()(ids, labels=ids).jacobian_loss is None
    model = tiny_model(jacobian_loss_weight=2.0)
    assert model(ids, labels=ids).jacobian_loss is None  # evaluation mode
    plain = model(ids, labels=ids).loss
    model.train()
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, plain + 2.0 * output.jacobian_loss)


def test_jacobian_loss_shrinks_the_jacobian():
    def jacobian_after_training(weight):
        model = tiny_model(jacobian_loss_weight=weight, solver_max_evaluations=30).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        model.config.jacobian_loss_weight = 1.0
        return torch.stack([model(ids, labels=ids).jacobian_loss for _ in range(10)]).mean()

    ids = random_ids(4, 8)
    assert jacobian_after_training(20.0) < 0.5 * jacobian_after_training(0.0)


def test_jacobian_loss_frequency_is_a_share_of_the_steps():
    model = tiny_model(jacobian_loss_weight=1.0, jacobian_loss_frequency=0.3, solver_tolerance=1e-2).train()
    ids = random_ids(1, 3)
    applied = sum(model(ids, labels=ids, use_cache=False).jacobian_loss is not None for _ in range(100))
    assert 15 <= applied <= 45


@pytest.mark.parametrize("gradient", ["implicit", "phantom", "unrolled"])
def test_a_few_steps_of_training_lower_the_loss(gradient):
    model = tiny_model(
        gradient=gradient, solver_max_evaluations=12, solver_tolerance=1e-3, backward_tolerance=1e-2
    ).train()
    ids = random_ids(4, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_unroll_steps_apply_f_so_many_times():
    model = tiny_model()
    ids = random_ids(1, 5)
    output = model(ids, unroll_steps=3, use_cache=False)
    with torch.no_grad():
        picard = tiny_model(solver="picard")(ids, solver_max_evaluations=3, solver_tolerance=0.0)
    assert output.num_evaluations.tolist() == [3]
    torch.testing.assert_close(output.logits, picard.logits, rtol=0, atol=1e-12)


def test_sequence_scope_agrees_at_convergence_and_refuses_a_cache():
    ids = random_ids(2, 8)
    model = tiny_model(solver_scope="sequence")
    torch.testing.assert_close(model(ids).logits, tiny_model()(ids).logits, rtol=0, atol=1e-8)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (2, 10)
    with pytest.raises(ValueError, match='solver_scope="sequence".*use_cache=False'):
        model(ids, use_cache=True)


def test_unrolled_models_refuse_a_cache_and_generate_without():
    ids = random_ids(1, 4)
    model = tiny_model(gradient="unrolled", solver_max_evaluations=3)
    with pytest.raises(ValueError, match="Unrolled steps.*use_cache=False"):
        model(ids, use_cache=True)
    cache = tiny_model()(ids).past_key_values
    assert tiny_model()(ids, unroll_steps=2).past_key_values is None
    with pytest.raises(ValueError, match="Unrolled steps.*use_cache=False"):
        tiny_model()(ids, past_key_values=cache, unroll_steps=2)
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert tokens[0, -1] == model(tokens[:, :-1]).logits[0, -1].argmax()


def test_return_dict_false_and_model_outputs():
    model = tiny_model()
    ids = random_ids(1, 4)
    output = model(ids, labels=ids)
    assert model(ids, labels=ids, return_dict=False)[0] == output.loss
    assert {"residual", "num_evaluations", "converged"} <= output.keys()


@pytest.mark.parametrize(
    "inputs, message",
    [
        (dict(input_ids=torch.tensor([[3, 61]])), r"\[0, vocab_size=61\), got 3 to 61"),
        (dict(input_ids=torch.tensor([[-1, 5]])), "got -1 to 5"),
        (dict(input_ids=torch.empty(1, 0, dtype=torch.long)), "input is empty"),
        (dict(), "exactly one of input_ids and inputs_embeds"),
        (dict(input_ids=torch.tensor([[3]]), inputs_embeds=torch.zeros(1, 1, 16)), "exactly one of"),
        (dict(input_ids=torch.tensor([[3]]), solver_max_evaluations=0), "solver_max_evaluations must be at least 1"),
        (dict(input_ids=torch.tensor([[3]]), solver_tolerance=-1.0), "tolerance must be zero or positive"),
    ],
)
def test_bad_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)
