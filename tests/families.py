"""The model families and the options of each that the laws are tested for."""

from dataclasses import dataclass

import pytest
import torch

from hf_deq import (
    DEQAttractorConfig,
    DEQAttractorForCausalLM,
    DEQAttractorModel,
    DEQConfig,
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
    DEQTransformerModel,
    DEQTrellisNetConfig,
    DEQTrellisNetForCausalLM,
    DEQTrellisNetModel,
)
from hf_deq.modeling_deq import DEQForCausalLM, DEQModel

# Small enough for a test, solved to round-off unless told otherwise.
TINY = dict(
    vocab_size=61,
    hidden_size=16,
    solver_tolerance=1e-10,
    solver_max_evaluations=200,
    backward_tolerance=1e-10,
    backward_max_evaluations=200,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

# Fields of embeddings and output layer.
VOCABULARY = {"cutoffs", "div_val", "embedding_size", "head_bias", "num_softmax_experts", "tied_projections"}
VOCABULARY |= {"tie_word_embeddings"}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        tiny: fields of a model small enough for a test.
        wide: fields of one that is not: its initialisation should behave as in earnest.
        remembering: fields with which a memory reaches as far as a cache; `None` if the family has no memory.
        starts_at_zero: whether a solve starts at the zero state, and not at a state that the input proposes.
        dropouts: every dropout field.
        variants: fields of each variant that every law is tested for, by name.
    """

    config_class: type[DEQConfig]
    base_class: type[DEQModel]
    model_class: type[DEQForCausalLM]
    tiny: dict
    wide: dict
    remembering: dict | None
    dropouts: tuple[str, ...]
    variants: dict[str, dict]
    starts_at_zero: bool = True

    @property
    def remembers(self) -> bool:
        return self.remembering is not None

    @property
    def decoding_variants(self) -> dict[str, dict]:
        """One variant of each f. Those that differ in the vocabulary alone have the same caches."""
        kinds = {}
        for name, fields in self.variants.items():
            kinds.setdefault(repr({field: fields[field] for field in fields if field not in VOCABULARY}), name)
        return {name: self.variants[name] for name in kinds.values()}

    def config(self, **fields) -> DEQConfig:
        return self.config_class(**(TINY | self.tiny | fields))

    def model(self, **fields) -> DEQForCausalLM:
        """A float64 model in evaluation mode, made the same way every time."""
        torch.manual_seed(0)
        return self.model_class(self.config(**fields)).double().eval()


def _named(*variants: dict) -> dict[str, dict]:
    def said(value) -> str:
        return value["rope_type"] if isinstance(value, dict) else str(value)

    names = ("-".join(f"{name}={said(value)}" for name, value in fields.items()) for fields in variants)
    return {name or "default": fields for name, fields in zip(names, variants, strict=True)}


LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

# The architecture of the paper's DEQ-Transformer, as its code has it.
PAPER = dict(
    hidden_act="relu",
    norm_affine=False,
    final_norm=False,
    inject_residual=False,
    weight_norm=True,
    position_embedding_type="relative",
    sliding_window=50,
    head_bias=True,
)

TRANSFORMER = Family(
    config_class=DEQTransformerConfig,
    base_class=DEQTransformerModel,
    model_class=DEQTransformerForCausalLM,
    tiny=dict(intermediate_size=32, num_attention_heads=2),
    wide=dict(vocab_size=500, hidden_size=128, intermediate_size=512, num_attention_heads=4),
    remembering=dict(memory_length=100),
    dropouts=("embedding_dropout", "hidden_dropout", "attention_dropout", "output_dropout"),
    variants={
        "paper": PAPER,
        "paper-pre": PAPER | {"norm_position": "pre_normalized_residual"},
        "adaptive": PAPER | {"cutoffs": [9, 30], "div_val": 2, "tied_projections": [1, 2]},
        "adaptive-one-table": {"cutoffs": [20], "embedding_size": 10, "tied_projections": [0, 1]},
        "projected": {"embedding_size": 10, "tie_word_embeddings": False},
        "torchdeq": PAPER
        | {"norm_affine": True, "norm_position": "pre", "num_hidden_layers": 2, "head_dim": 12}
        | {"attention_output_norm": True},
    }
    | _named(
        {},
        {"norm_position": "pre"},
        {"num_hidden_layers": 2, "sliding_window": 3, "rope_parameters": LINEAR_ROPE},
        {"attn_implementation": "eager", "position_embedding_type": "relative", "sliding_window": 4},
        {"solver": "broyden"},
        {"solver": "picard", "attn_implementation": "eager"},
    ),
)

TRELLISNET = Family(
    config_class=DEQTrellisNetConfig,
    base_class=DEQTrellisNetModel,
    model_class=DEQTrellisNetForCausalLM,
    tiny=dict(intermediate_size=12),
    wide=dict(vocab_size=500, hidden_size=128, intermediate_size=128),
    remembering={},
    dropouts=("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"),
    variants=_named(
        {},
        {"cell_scan": False},
        {"weight_norm": False},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 2, "dilation": 4, "cell_scan": False},
        {"tie_word_embeddings": False, "embedding_size": 10},
        {"cutoffs": [9, 30]},
        {"cutoffs": [20], "tie_word_embeddings": False, "kernel_size": 3},
        {"num_softmax_experts": 3, "embedding_size": 10},
        {"num_softmax_experts": 2, "tie_word_embeddings": False},
        {"solver": "broyden"},
        {"solver": "picard", "kernel_size": 3},
    ),
)

ATTRACTOR = Family(
    config_class=DEQAttractorConfig,
    base_class=DEQAttractorModel,
    model_class=DEQAttractorForCausalLM,
    tiny=dict(intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, num_prelude_layers=1),
    wide=dict(vocab_size=500, hidden_size=128, intermediate_size=512, num_attention_heads=4),
    remembering=None,
    dropouts=("embedding_dropout", "hidden_dropout", "output_dropout"),
    variants={
        "published": dict(hidden_act="relu2", gated_mlp=False, layer_scale_init_value=0.75, layer_scale_max=0.75),
        "qwen3-like": dict(qk_norm="affine", layer_scale_init_value=None, num_attention_heads=4, num_key_value_heads=2),
        "scaled": dict(embedding_multiplier=4.0, logit_scale=0.5, final_logit_softcapping=5, attention_bias=True)
        | {"tie_word_embeddings": False},  # tied, it repeats one token for ever
    }
    | _named(
        {},
        {"num_hidden_layers": 1, "num_prelude_layers": 0},
        {"num_hidden_layers": 4, "num_prelude_layers": 2, "qk_norm": None, "mlp_bias": True},
        {"sliding_window": 3, "rope_parameters": LINEAR_ROPE},
        {"attn_implementation": "eager", "num_key_value_heads": 1, "tie_word_embeddings": False, "head_dim": 12},
    ),
    starts_at_zero=False,
)

FAMILIES = {"transformer": TRANSFORMER, "trellisnet": TRELLISNET, "attractor": ATTRACTOR}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
a_family = pytest.mark.parametrize(  # where the others differ little, and a test takes long
    "family",
    [TRANSFORMER, *(pytest.param(family, marks=pytest.mark.slow) for family in (TRELLISNET, ATTRACTOR))],
    ids=FAMILIES.keys(),
)
every_remembering_family = pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if family.remembers]
)


def random_ids(batch: int, length: int, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    """Ids without the special ones."""
    return torch.randint(3, vocab_size, (batch, length))


def application_of_f(model, ids: torch.Tensor, z: torch.Tensor, **arguments) -> tuple[torch.Tensor, object]:
    """f(z) for these ids, and the model's output."""
    layer, images = model.model.layers[0], []
    solve = layer.solve
    layer.solve = lambda f, *others: images.append(f(z)) or solve(f, *others)
    output = model(ids, **arguments)
    del layer.solve
    return images[0], output
