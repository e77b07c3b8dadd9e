"""Transformers' own tests of a model, derived for every family of ours.

`tests/test_transformers_common.py` makes the library's tests importable as `library_tests`, and runs this file.
"""

import unittest
from contextlib import nullcontext
from functools import wraps
from unittest.mock import patch

import pytest
import torch
from families import ATTRACTOR, TRANSFORMER, TRELLISNET, Family
from library_tests import test_modeling_common
from library_tests.test_configuration_common import ConfigTester
from library_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from library_tests.test_training_mixin import TrainingTesterMixin
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed
from transformers.models.auto import modeling_auto

# By these tables the library's tests know which labels a class takes.
TABLES = {
    AutoModel: modeling_auto.MODEL_MAPPING_NAMES,
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}

# What does not hold, and why. These tests run and must fail: one that passes has no place here.
NO_CHECKPOINTED_LAYER = "checkpointing recomputes unrolled applications of f; a solve keeps one application anyway"
EXCLUDED = {
    "test_gradient_checkpointing_enable_disable": NO_CHECKPOINTED_LAYER,
    "test_training_gradient_checkpointing": NO_CHECKPOINTED_LAYER,
    "test_training_gradient_checkpointing_use_reentrant_false": NO_CHECKPOINTED_LAYER,
    "test_training_gradient_checkpointing_use_reentrant_true": NO_CHECKPOINTED_LAYER,
    "test_generation_tester_mixin_inheritance": "the library's generation tests are in no source distribution; "
    "tests/generation_laws.py has ours",
}
EXCLUDED_ROTARY = EXCLUDED | {
    "test_model_rope_scaling_from_config_1_dynamic": "refused: dynamic scaling rotates early positions by the length "
    "of the whole text, so that no prefix would have an equilibrium of its own",
}


def set_large_epsilon(config):
    """The library's helper against rounding, for the fields that ours have: it sets more, which ours refuse."""
    for name in ("layer_norm_eps", "rms_norm_eps"):
        if hasattr(config, name):
            setattr(config, name, 1.0)


test_modeling_common.set_config_for_less_flaky_test = set_large_epsilon


def must_fail(test, reason: str):
    """The test as one that is expected to fail, and is an error if it does not."""

    @wraps(test)
    def whole(self):
        self.subTest = lambda *args, **kwargs: nullcontext()  # pytest would count parts that pass on their own
        test(self)

    return pytest.mark.xfail(reason=reason, strict=True)(whole)


class ModelTester:
    """Small configurations and inputs, under the names that the library's tests look for."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, family: Family):
        self.family = family
        self.causal_lm_class = family.model_class
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads = getattr(config, "num_attention_heads", None)

    def get_config(self, **fields):
        """For training; outputs that are compared need more precision."""
        return self.family.config(**({"solver_tolerance": 1e-2, "backward_tolerance": 1e-2} | fields))

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config(solver_tolerance=1e-6, solver_max_evaluations=100)
        input_ids = ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class CommonTests(ModelTesterMixin, TrainingTesterMixin):
    """Derive from it, and name the `family` and what is `excluded`."""

    family: Family
    excluded: dict[str, str]
    model_tester = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, reason in cls.excluded.items():
            setattr(cls, name, must_fail(getattr(cls, name), reason))

    @classmethod
    def setUpClass(cls):
        config_class = cls.family.config_class
        cls.all_model_classes = tuple(auto._model_mapping[config_class] for auto in TABLES)
        for table, model_class in zip(TABLES.values(), cls.all_model_classes, strict=True):
            table[config_class.model_type] = model_class.__name__

    def setUp(self):
        set_seed(0)
        test_modeling_common.global_rng.seed(0)
        self.model_tester = ModelTester(self.family)

    def test_config(self):
        properties = ["hidden_size", "num_hidden_layers"] + ["num_attention_heads"] * self.has_attentions
        fields = self.family.tiny | {"hidden_size": 24}
        ConfigTester(self, self.family.config_class, common_properties=properties, **fields).run_common_tests()

    def test_model_outputs_equivalence(self):
        """The library's test subtracts whatever it compares, which `converged` does not allow as a boolean."""
        subtract = torch.Tensor.__sub__

        def difference(a, b):
            return subtract(*(x.float() if getattr(x, "dtype", None) == torch.bool else x for x in (a, b)))

        with patch.object(torch.Tensor, "__sub__", difference):
            super().test_model_outputs_equivalence()


class DEQTransformerTest(CommonTests, unittest.TestCase):
    family = TRANSFORMER
    excluded = EXCLUDED_ROTARY


class DEQTrellisNetTest(CommonTests, unittest.TestCase):
    family = TRELLISNET
    excluded = EXCLUDED
    has_attentions = False
    training_overfit_learning_rate = 1e-2  # gates of 28 channels learn slower than attention


class DEQAttractorTest(CommonTests, unittest.TestCase):
    family = ATTRACTOR
    excluded = EXCLUDED_ROTARY
