"""Any value of any field is refused by name, or the model runs: configurations, and flags of commands."""

import dataclasses
import math
import re
from typing import get_args, get_origin

import pytest
import torch
from families import TRANSFORMER, every_family
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_deq.commands.evaluate import EvaluateArguments
from hf_deq.commands.generate import GenerateArguments
from hf_deq.commands.plot import PlotArguments
from hf_deq.evaluation import Protocol
from hf_deq.tasks import CopyMemoryArguments, LanguageModelingArguments, StateTrackingArguments, TextArguments
from hf_deq.tasks.copy_memory import CopyMemoryEvaluation
from hf_deq.tasks.state_tracking import StateTrackingEvaluation
from hf_deq.training import RunArguments

INTEGERS = [-2, -1, 0, 1, 2, 3, 8, 10**9]
FLOATS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-30, 0.5, 1.0, 2.0, 1e30]
NAMES = ["", "nonsense", "anderson", "picard", "sequence", "unrolled", "phantom", "reversible"]
NAMES += ["pre", "pre_open", "relative", "relu"]
LISTS = [[], [5], [9, 5], [-1], [10**9], [3, 20]]
ROPE = [
    {"rope_type": "nonsense", "rope_theta": 1e4},
    {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": math.nan},
    {"rope_type": "default", "rope_theta": -1.0},
]


def values_of(field) -> list:
    """Odd and ordinary values of every kind that the annotation of a field allows."""
    kinds = set(get_args(field.type) or (field.type,))
    if field.name == "rope_parameters":
        return ROPE
    if get_origin(field.type) is list:
        return [[value] for value in (INTEGERS if int in kinds else FLOATS if float in kinds else NAMES)]
    values = INTEGERS * (int in kinds) + FLOATS * (float in kinds) + NAMES * (str in kinds)
    return values + [True, False] * (bool in kinds) + LISTS * (list[int] in kinds) + [None] * (type(None) in kinds)


def changes_of(fields) -> st.SearchStrategy:
    """One or two fields with values."""
    pairs = st.sampled_from([(field.name, value) for field in fields for value in values_of(field)])
    return st.lists(pairs, min_size=1, max_size=2).map(dict)


def own_fields(config_class) -> list:
    return [
        field for field in dataclasses.fields(config_class) if field.name not in PreTrainedConfig.__dataclass_fields__
    ]


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning", "ignore::UserWarning")
@every_family
def test_a_configuration_is_refused_by_name_or_its_model_runs(family):
    fields = own_fields(type(family.config()))
    names = [*(field.name for field in fields), "rope_type"]
    refused, ran = [], []

    @settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changes_of(fields))
    def check(changes):
        try:
            config = family.config(**changes)
        except (StrictDataclassError, ValueError) as error:
            assert any(name in str(error) for name in names), (changes, str(error))
            refused.append(changes)
            return
        model = AutoModelForCausalLM.from_config(config).eval()
        output = model(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        assert output.logits.shape == (1, 4, config.vocab_size), changes
        ran.append(changes)

    check()
    assert len(refused) > 50 and len(ran) > 50


LARGEST = {"adam_beta2": 1 - 2**-53, "top_p": 1.0}  # of arguments that have an upper bound


@pytest.mark.parametrize(
    "arguments",
    [
        *(RunArguments, LanguageModelingArguments, CopyMemoryArguments, StateTrackingArguments),
        *(TextArguments, CopyMemoryEvaluation, StateTrackingEvaluation),
        *(EvaluateArguments, PlotArguments, GenerateArguments, Protocol),
    ],
)
def test_an_argument_is_refused_by_name_or_in_its_range(arguments):
    fields = [field for field in dataclasses.fields(arguments) if field.name not in ("corpus", "device")]

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changes_of(fields))
    def check(changes):
        try:
            made = arguments(**changes)
        except ValueError as error:
            assert any(re.search(rf"\b{name}\b", str(error)) for name in changes), (changes, str(error))
            return
        for name in changes:
            given = getattr(made, name)
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, int | float) and not isinstance(value, bool):
                    assert math.isfinite(value) and 0 <= value <= LARGEST.get(name, math.inf), f"{name}={value} passed"

    check()


def test_a_field_of_a_later_version_is_left_out_with_a_warning(caplog):
    saved = TRANSFORMER.config().to_dict() | {"solver_restarts": 3, "hidden_sizes": [4], "note": "kept"}
    config = type(TRANSFORMER.config()).from_dict(saved)
    assert "leaves out ['hidden_sizes', 'solver_restarts']: only a later version" in caplog.text
    assert not hasattr(config, "solver_restarts") and config.note == "kept"
    with pytest.raises(ValueError, match="no field 'solver_restarts'; did you mean"):
        TRANSFORMER.config(solver_restarts=3)
