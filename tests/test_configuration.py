"""Configurations: validated at the edge, typos refused, saved and loaded unchanged."""

import pytest
import torch
from families import ATTRACTOR, TRANSFORMER, TRELLISNET, every_family
from transformers import AutoConfig

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"solver": "newton"}, r"solver must be one of \['anderson', 'broyden', 'picard'\], got 'newton'"),
        ({"backward_solver": "lu"}, "backward_solver must be one of"),
        ({"solver_scope": "anticausal"}, "solver_scope must be one of"),
        ({"gradient": "exact"}, "gradient must be one of"),
        ({"reversible_steps": 0}, "reversible_steps must be at least 1, got 0"),
        ({"reversible_beta": 1.0}, r"reversible_beta must be in \(0, 1\), got 1.0"),
        ({"reversible_beta": float("nan")}, r"reversible_beta must be in \(0, 1\), got nan"),
        ({"reversible_steps": 18, "reversible_beta": 0.8}, "reversible_steps must be at most 17 with .*=0.8, got 18"),
        ({"solver_tolerance": -1e-3}, "solver_tolerance must be zero or positive, got -0.001"),
        ({"backward_tolerance": -1.0}, "backward_tolerance must be zero or positive"),
        ({"solver_max_evaluations": 0}, "solver_max_evaluations must be at least 1"),
        ({"solver_history": 0}, "solver_history must be at least 1"),
        ({"solver_damping": 0.0}, r"solver_damping must be in \(0, 1\]"),
        ({"jacobian_loss_frequency": 2}, r"jacobian_loss_frequency must be in \(0, 1\]"),
        ({"shallow_steps": 5}, "has no field 'shallow_steps': give it to the training"),
    ],
)
@every_family
def test_bad_fields_name_themselves(family, fields, message):
    with pytest.raises(Exception, match=message):
        family.config(**fields)


@every_family
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_finite_number_is_refused(family, value):
    """In every field that takes a fraction; `<` alone is false of what is not a number."""
    config = family.config()
    names = [name for name, field in config.__dataclass_fields__.items() if field.type in ("int | float", int | float)]
    assert {"solver_tolerance", "backward_tolerance", "jacobian_loss_weight", *family.dropouts} <= set(names)
    for name in names:
        with pytest.raises(Exception, match=name):
            family.config(**{name: value})
    with pytest.raises(Exception, match="initializer_range must be positive and finite"):
        family.config(initializer_range=value)


@every_family
@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "solver_history"])
def test_sizes_are_positive(family, name, value):
    with pytest.raises(Exception, match=f"{name} must be at least 1, got {value}"):
        family.config(**{name: value})


@pytest.mark.parametrize(
    "family, name, given, other",
    [
        (ATTRACTOR, "attention_dropout", 0.1, "DEQTransformerConfig"),
        (ATTRACTOR, "memory_length", 4, "DEQTransformerConfig"),
        (TRANSFORMER, "num_key_value_heads", 2, "DEQAttractorConfig"),
        (TRELLISNET, "variational_dropout", True, "DEQTransformerConfig"),
    ],
)
def test_fields_of_another_family_are_refused(family, name, given, other, caplog):
    """They would have no effect. In a file of another version they are left out, with a warning."""
    with pytest.raises(ValueError, match=f"has no field '{name}', which is one of {other}: leave it out"):
        family.config(**{name: given})
    saved = family.config().to_dict() | {name: given}
    assert not hasattr(type(family.config()).from_dict(saved), name) and name in caplog.text


@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize("family", [TRANSFORMER, TRELLISNET])
def test_widths_of_embeddings_are_positive(family, value):
    with pytest.raises(Exception, match=f"embedding_size must be at least 1, got {value}"):
        family.config(embedding_size=value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide hidden_size=16"),
        ({"num_attention_heads": 16}, "must be even"),
        ({"hidden_size": 5, "num_attention_heads": 1, "position_embedding_type": "relative"}, "even hidden_size"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "nothing computed for a prefix",
        ),
        ({"rope_parameters": YARN | {"factor": 0.0}}, "rope_parameters: factor must be positive and finite, got 0.0"),
        (
            {"rope_parameters": YARN | {"factor": False}},
            "rope_parameters: factor must be positive and finite, got False",
        ),
        (
            {"rope_parameters": {"rope_theta": True}},
            "rope_parameters: rope_theta must be positive and finite, got True",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.*got 0.5"),
        ({"norm_position": "sandwich"}, "norm_position must be one of"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type must be one of"),
        ({"sliding_window": 1}, "sliding_window must be at least 2"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must lie in \[0, 1\)"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"max_position_embeddings": -5}, "max_position_embeddings must be zero or positive"),
        ({"memory_length": -1}, "memory_length must be zero or positive"),
        ({"closing_norm": False}, "has no field 'closing_norm': write norm_position"),
        ({"normalized_residual": True}, "has no field 'normalized_residual': write norm_position"),
        ({"attention_dropout": 1.0}, r"attention_dropout must lie in \[0, 1\)"),
        ({"head_dim": 5}, "head_dim = 5 must be even"),
        ({"cutoffs": [30, 9]}, "cutoffs must rise strictly between 0 and vocab_size=61"),
        ({"div_val": 2}, "div_val=2 shrinks the embeddings.*set cutoffs"),
        ({"div_val": 0}, "div_val must be at least 1"),
        ({"cutoffs": [9, 30], "div_val": 5}, "leaves the last cluster no features"),
        ({"tied_projections": [0]}, r"tied_projections=\[0\] needs projections"),
        ({"embedding_size": 8, "tied_projections": [0], "tie_word_embeddings": False}, "tie_word_embeddings=True"),
        ({"embedding_size": 8, "tied_projections": [1]}, "must be numbers of the 1 clusters"),
    ],
)
def test_bad_transformers_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        TRANSFORMER.config(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kernel_size": 1}, "kernel_size must be at least 2, got 1"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be 1"),
        ({"embedding_size": 8}, "embedding_size=8 must equal hidden_size=16.*tie_word_embeddings=False"),
        ({"num_softmax_experts": -1}, "num_softmax_experts must be zero or positive"),
        ({"num_softmax_experts": 2, "cutoffs": [20]}, "two kinds of softmax"),
        ({"cutoffs": []}, "cutoffs must rise strictly between 0 and vocab_size=61"),
        ({"cutoffs": [0, 10]}, "cutoffs must rise strictly"),
        ({"cutoffs": [30, 30]}, "cutoffs must rise strictly"),
        ({"cutoffs": [61]}, "cutoffs must rise strictly"),
        ({"initializer_range": 0.0}, "initializer_range must be positive"),
        ({"weight_dropout": 1.5}, r"weight_dropout must lie in \[0, 1\)"),
    ],
)
def test_bad_trellisnets_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        TRELLISNET.config(**fields)


@pytest.mark.parametrize(
    "typo, field",
    [
        ("solver_tolerence", "solver_tolerance"),
        ("solver_max_evals", "solver_max_evaluations"),
        ("backward_tol", "backward_tolerance"),
        ("jacobian_weight", "jacobian_loss_weight"),
        ("hiden_size", "hidden_size"),
        ("num_attention_head", "num_attention_heads"),
        ("sliding_windows", "sliding_window"),
        ("hidden_dropout_prob", "hidden_dropout"),
    ],
)
def test_misspelt_fields_are_refused_with_a_hint(typo, field):
    with pytest.raises(ValueError, match=f"no field '{typo}'; did you mean '{field}'"):
        TRANSFORMER.config(**{typo: 1})


@pytest.mark.parametrize("typo, field", [("kernal_size", "kernel_size"), ("dilations", "dilation")])
def test_misspelt_fields_of_a_trellisnet(typo, field):
    with pytest.raises(ValueError, match=f"no field '{typo}'; did you mean '{field}'"):
        TRELLISNET.config(**{typo: 1})


@every_family
def test_wrong_types_are_refused(family):
    with pytest.raises(Exception, match="hidden_size"):
        family.config(hidden_size="wide")


@every_family
def test_fields_set_later_are_checked_when_a_model_is_made(family):
    config = family.config()
    config.solver = "newton"
    with pytest.raises(Exception, match="solver must be one of"):
        family.model_class(config)


def test_rotary_parameters_set_later_are_checked_too():
    config = TRANSFORMER.config()
    config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(Exception, match="nothing computed for a prefix"):
        TRANSFORMER.base_class(config)


@torch.no_grad()
@pytest.mark.parametrize("family", [TRANSFORMER, ATTRACTOR])
def test_rotary_positions_are_those_that_are_given(family):
    """Scores depend on differences only, so a shift would not show."""
    ids, spread = torch.tensor([[3, 4, 5, 6]]), dict(position_ids=3 * torch.arange(4)[None])
    spread["attention_mask"] = torch.ones(1, 4)
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    expected = family.model()(ids).logits
    torch.testing.assert_close(family.model(rope_parameters=linear)(ids, **spread).logits, expected)
    assert (family.model()(ids, **spread).logits - expected).abs().max() > 1e-6


@torch.no_grad()
def test_settings_of_yarn_that_published_models_have_are_accepted():
    ids, logits = torch.tensor([[3, 4, 5]]), []
    for settings in ({}, {"truncate": True}, {"truncate": False}, {"mscale": 0.0, "mscale_all_dim": 0.0}):
        logits.append(TRANSFORMER.model(rope_parameters=YARN | settings)(ids).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[3])
    assert not torch.equal(logits[0], logits[2])


@torch.no_grad()
def test_a_partial_rotary_factor_that_is_not_given_is_one():
    ids = torch.tensor([[3, 4, 5]])
    given = TRANSFORMER.model(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": None})
    assert torch.equal(given(ids).logits, TRANSFORMER.model(rope_parameters={"rope_theta": 1e4})(ids).logits)


@every_family
def test_keys_of_transformers_and_of_others_pass(family):
    config = family.config(num_labels=3, my_note="kept", attn_implementation="eager")
    assert config.num_labels == 3 and config.my_note == "kept"
    names = ("cls", "sep", "mask", "unk", "decoder_start", "eod", "boi", "image", "audio", "forced_eos")
    assert family.config(**{f"{name}_token_id": 5 for name in names}).sep_token_id == 5
    assert family.config(pad_token="<pad>", bos_token="<s>").pad_token == "<pad>"
    for misspelt, meant in (("padd", "pad"), ("eo", "eos"), ("boss", "bos")):
        with pytest.raises(ValueError, match=f"has no field '{misspelt}_token_id'; did you mean '{meant}_token_id'"):
            family.config(**{f"{misspelt}_token_id": 5})


@pytest.mark.parametrize(
    "family, fields",
    [
        (TRANSFORMER, dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, memory_length=3)),
        (TRELLISNET, dict(cutoffs=[5, 9], kernel_size=4)),
    ],
)
def test_round_trip(family, fields, tmp_path):
    config = family.config(solver="broyden", gradient="phantom", **fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is family.config_class and loaded.to_diff_dict() == config.to_diff_dict()


@every_family
def test_misspelt_overrides_are_refused_when_a_model_is_loaded(family, tmp_path):
    family.model().save_pretrained(tmp_path)
    for load in (AutoConfig.from_pretrained, family.model_class.from_pretrained):
        with pytest.raises(ValueError, match="has no field 'solver_tolerence'; did you mean 'solver_tolerance'"):
            load(tmp_path, solver_tolerence=1e-4)


@every_family
@pytest.mark.parametrize("fields", [{"gradient": "unrolled"}, {"solver_scope": "sequence"}])
@torch.no_grad()
def test_a_model_caches_if_it_has_an_equilibrium_to_cache(family, fields, tmp_path):
    """Whether it was saved with one or not."""
    family.model(**fields).save_pretrained(tmp_path)
    ids, back = torch.tensor([[3, 4, 5]]), dict(gradient="implicit", solver_scope="causal")
    for override, caches in (({}, False), (back, True)):
        model = family.model_class.from_pretrained(tmp_path, **override)
        assert (model(ids).cache is not None) == caches
        output = model.generate(ids, max_new_tokens=2, eos_token_id=None, return_dict_in_generate=True)
        assert (output.past_key_values is not None) == caches


def test_the_embeddings_of_a_trellisnet_are_as_wide_as_its_output():
    assert TRELLISNET.config().embedding_size == 16
    assert TRELLISNET.config(embedding_size=8, num_softmax_experts=2).embedding_size == 8


def test_a_printed_model_says_how_it_is_solved_and_what_its_parts_are():
    printed = repr(TRANSFORMER.model(cutoffs=[9, 30], weight_norm=True, solver_tolerance=1e-3))
    assert "solver=anderson, scope=causal, tolerance=0.001, max_evaluations=" in printed
    assert "cutoffs=[9, 30]" in printed and "WeightNormLinear(in_features=16, " in printed
    printed = repr(TRELLISNET.model(num_softmax_experts=3, hidden_dropout=0.1, input_dropout=0.2))
    assert "num_experts=3" in printed and "kernel_size=2, dilation=1, weight_norm=True" in printed
    assert "VariationalDropout(probability=0.2)" in printed
