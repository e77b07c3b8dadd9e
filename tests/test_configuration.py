"""Configurations: validated at the edge, typos refused, saved and loaded unchanged."""

import pytest
from conftest import tiny_config
from transformers import AutoConfig

from hf_deq import DEQTransformerConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"solver": "newton"}, r"solver must be one of \['anderson', 'broyden', 'picard'\], got 'newton'"),
        ({"backward_solver": "lu"}, "backward_solver must be one of"),
        ({"solver_scope": "anticausal"}, "solver_scope must be one of"),
        ({"gradient": "exact"}, "gradient must be one of"),
        ({"solver_tolerance": -1e-3}, "solver_tolerance must be zero or positive, got -0.001"),
        ({"backward_tolerance": -1.0}, "backward_tolerance must be zero or positive"),
        ({"solver_max_evaluations": 0}, "solver_max_evaluations must be at least 1"),
        ({"solver_history": 0}, "solver_history must be at least 1"),
        ({"solver_damping": 0.0}, r"solver_damping must be in \(0, 1\]"),
        ({"jacobian_loss_frequency": 2}, r"jacobian_loss_frequency must be in \(0, 1\]"),
        ({"shallow_depth": 0}, "shallow_depth must be at least 1"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide hidden_size=16"),
        ({"num_attention_heads": 16}, "must be even"),
        ({"hidden_size": 5, "num_attention_heads": 1, "position_embedding_type": "relative"}, "even hidden_size"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "nothing computed for a prefix",
        ),
        ({"norm_position": "sandwich"}, "norm_position must be one of"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type must be one of"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must lie in \[0, 1\)"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ],
)
def test_bad_fields_name_themselves(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)


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
        tiny_config(**{typo: 1})


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match="hidden_size"):
        tiny_config(hidden_size="wide")


def test_keys_of_transformers_and_of_others_pass():
    config = tiny_config(num_labels=3, my_note="kept", attn_implementation="eager")
    assert config.num_labels == 3 and config.my_note == "kept"


def test_round_trip(tmp_path):
    config = tiny_config(
        solver="broyden", gradient="phantom", rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DEQTransformerConfig and loaded.to_diff_dict() == config.to_diff_dict()


def test_an_unrolled_model_does_not_cache():
    assert not tiny_config(gradient="unrolled").use_cache and tiny_config().use_cache
    assert not tiny_config(solver_scope="sequence").use_cache
