"""The authors' Attractor models ("Solve the Loop", arXiv 2605.12466), for `conversion.py`.

Two differences of form disappear in the conversion, exactly. Their rotary positions rotate channels 2i and 2i + 1 of a
head together, ours i and i + size / 2: a permutation of the rows that make queries and keys (their norm of queries and
keys has no weights, so it does not see the order). Their squared activation has a factor of one half, which moves into
the projection behind it.
"""

import torch
from torch import Tensor
from transformers.utils import logging

from ..configuration_deq_attractor import DEQAttractorConfig
from .sources import Arguments, Source, linear

logger = logging.get_logger(__name__)

# Their activations, and Transformers' names of the same functions.
ACTIVATIONS = {
    "ReLU2": "relu2",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Mish": "mish",
    "LeakyReLU": "leaky_relu",
    "ReLU6": "relu6",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Identity": "linear",
}
# Strategies of initialisation. Their names decide the factors of embeddings and logits, so unknown ones are refused.
STRATEGIES = {name: name for name in ("scaled", "scaled-zero", "takase", "takase-scaled")}
ROPE_SETTINGS = {"use_rope", "rope_base", "rope_condense_ratio"}
SOLVERS = {"anderson": "anderson", "fpi": "picard", "picard": "picard"}
# Arguments with one value for which we have the model.
ONLY = {
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "use_abacus": False,
    "qk_bias": False,
    "debias_attention": False,
    "center_attention": False,
    "clip_qkv": None,
    "causal": True,
    "mup_model_scaling_factor": 1,
}
# Arguments that change how their model is made, trained or run, but not what it computes.
IRRELEVANT = (
    *("model_class_name", "architecture_class_name", "init_orthogonal", "skip_initialization", "use_fused_head"),
    *("attn_impl", "activation_checkpoint_impl", "simple_ops", "strategy", "padding_multiple"),
    *("randomize_positions_from", "recurrent_embedding_dimension", "fp_lr_scale", "fp_wd", "adjoint_grad_clip"),
    *("min_iter", "backward_min_iter", "head_size", "n_head", "n_query_groups"),
)


def attractor_config(arguments: dict, state_dict: dict, fields: dict) -> DEQAttractorConfig:
    """Return the configuration for the arguments of `AttractorConfig`.

    Raises:
        ValueError: if an argument is missing or unknown, or has a value for which we have no model.
    """
    given = Arguments(arguments)
    for name, value in ONLY.items():
        if given(name, value) != value:
            raise ValueError(f"constructor_arguments: {name}={arguments[name]!r}, but only {value!r} can be converted.")
    _refuse_unit_offset(given)
    prelude, head = given("n_backbone_layers"), given("n_fp_blocks", 1)
    bias, gates = given("bias", False), given("layer_scale_init", None)
    theirs = dict(
        vocab_size=_padded_vocabulary(given),
        hidden_size=given("n_embd"),
        intermediate_size=given("intermediate_size", None) or 4 * given("n_embd"),
        num_hidden_layers=prelude + head,
        num_prelude_layers=prelude,
        num_attention_heads=given("num_attention_heads"),
        num_key_value_heads=given("num_key_value_heads", None),
        hidden_act=_one_of(given, "nonlin_name", ACTIVATIONS, "GELU"),
        gated_mlp=_one_of(given, "mlp_class_name", {"BaseMLP": False, "GatedMLP": True}, "BaseMLP"),
        attention_bias=bias,
        mlp_bias=bias,
        qk_norm="plain" if given("qk_norm", False) else None,
        rms_norm_eps=given("norm_eps", 1e-5),
        rope_parameters=_rope_parameters(_settings(given, "rope_settings")),
        max_position_embeddings=given("block_size", 4096),
        layer_scale_init_value=gates,
        layer_scale_max=_gate_limit(given("gamma_max", None)),
        final_logit_softcapping=given("logit_softcap", None),
        tie_word_embeddings=given("tie_embeddings", True),
    )
    strategy = _one_of(given, "init_strategy", STRATEGIES, "scaled")
    theirs |= _scales(strategy, given("n_embd")) | _equilibrium(given)
    given.ignore(*IRRELEVANT)
    given.refuse_unknown()
    return DEQAttractorConfig(**(theirs | fields))


def _refuse_unit_offset(given: Arguments) -> None:
    """Refuse a model whose norms multiply by 1 + weight. In the authors' code, its name decides this.

    Raises:
        ValueError: if the name says so.
    """
    own, of_the_hub = given("name", None), _settings(given, "hf_config").get("name")
    if "Gemma" in (name := own or of_the_hub or ""):
        raise ValueError(
            f"constructor_arguments: the name {name!r} has Gemma in it, so the norms of the original multiply by "
            "1 + weight; such a model cannot be converted."
        )


def _padded_vocabulary(given: Arguments) -> int:
    """Return the number of ids. The ids that pad the vocabulary are kept, because they take part in the softmax."""
    used, step = given("vocab_size"), given("padding_multiple", 512)
    padded = given("padded_vocab_size", None) or -(-used // step) * step
    if padded > used:
        logger.warning(
            f"The vocabulary of this checkpoint has {used:,} ids and is padded to {padded:,}. The model keeps all of "
            "them, because the padding takes part in the softmax."
        )
    return padded


def _one_of(given: Arguments, name: str, known: dict, default: str):
    """Return what an argument stands for.

    Raises:
        ValueError: if its value is unknown.
    """
    value = given(name, default)
    if value not in known:
        raise ValueError(f"constructor_arguments: {name}={value!r} cannot be converted; known are {sorted(known)}.")
    return known[value]


def _settings(given: Arguments, name: str) -> dict:
    """Return an argument that holds settings by name; empty if it is not given.

    Raises:
        ValueError: if it holds something else.
    """
    settings = given(name, None) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"constructor_arguments: {name}={settings!r} must be a dictionary.")
    return settings


def _rope_parameters(settings: dict) -> dict:
    """Return Transformers' rotary parameters.

    Raises:
        ValueError: if the model has no rotary positions, or a setting is unknown.
    """
    if unknown := sorted(settings.keys() - ROPE_SETTINGS):
        raise ValueError(f"constructor_arguments: rope_settings has {unknown}; known are {sorted(ROPE_SETTINGS)}.")
    if not settings.get("use_rope", True):
        raise ValueError("constructor_arguments: rope_settings has use_rope=False; such a model cannot be converted.")
    parameters = {"rope_type": "default", "rope_theta": float(settings.get("rope_base", 50_000))}
    ratio = settings.get("rope_condense_ratio", 1)
    return parameters if ratio == 1 else parameters | {"rope_type": "linear", "factor": float(ratio)}


def _gate_limit(limit: float | None) -> float:
    """Return the upper limit of the gates.

    Raises:
        ValueError: if it is not positive.
    """
    if limit is not None and not limit > 0:
        raise ValueError(f"constructor_arguments: gamma_max={limit} must be positive, since it limits the gates.")
    return 1.0 if limit is None else limit


def _scales(strategy: str, width: int) -> dict:
    """Return the factors of embeddings and logits. They follow from the name of the initialisation strategy."""
    embedding = width**0.5 if strategy in ("takase", "takase-scaled") else 1.0
    logit = (2 / 5 / width) ** 0.5 if strategy == "takase-scaled" else 1.0
    return {"embedding_multiplier": embedding, "logit_scale": logit}


def _equilibrium(given: Arguments) -> dict:
    """Return how the model is solved and differentiated."""
    backward = _one_of(given, "backward_type", {"onestep": "onestep"} | SOLVERS, "onestep")
    solver, beta = _one_of(given, "solver", SOLVERS, "anderson"), given("anderson_beta", 1.0)
    fields = dict(
        solver=solver,
        solver_tolerance=given("tol", 1e-3),
        solver_max_evaluations=given("max_iter", 30),
        solver_history=given("anderson_m", 5),
        solver_damping=beta if solver == "anderson" else 1.0,
        backward_tolerance=given("backward_tol", 1e-2),
        backward_max_evaluations=given("backward_max_iter", 30),
    )
    if backward == "onestep":
        return fields | ONE_STEP
    return fields | {"backward_solver": backward}


# The gradient with w = g + J'g, the first two terms of the Neumann series.
ONE_STEP = {"gradient": "implicit", "backward_solver": "picard", "backward_tolerance": 0, "backward_max_evaluations": 1}


def without_rotary_table(state_dict: dict[str, Tensor], config: DEQAttractorConfig) -> dict[str, Tensor]:
    """Return the tensors that are parameters: all except the table of rotary positions, which is checked.

    Raises:
        ValueError: if the table is not that of the constructor arguments.
    """
    tensors = dict(state_dict)
    table = tensors.pop("freqs_cis", None)
    if table is None:
        return tensors
    places = torch.arange(table.shape[1], dtype=torch.float64) / config.rope_parameters.get("factor", 1.0)
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    angles = places[:, None] * config.rope_parameters["rope_theta"] ** -(channels / config.head_dim)
    expected = torch.stack([angles.cos(), angles.sin()], -1)[None, :, None]
    # Their table is computed in single precision, where a large angle is rounded, and may be stored in half precision.
    if table.shape != expected.shape or (table.double() - expected).abs().max() > 1e-2:
        raise ValueError(
            f"freqs_cis {tuple(table.shape)} is not the table of rotary positions for rope_settings and "
            f"num_attention_heads (base {config.rope_parameters['rope_theta']:g}, heads of {config.head_dim}): correct "
            "the constructor arguments."
        )
    return tensors


def attractor_sources(config: DEQAttractorConfig) -> dict[str, Source]:
    """Return the source of each parameter."""
    sources = {
        "model.embed_tokens.weight": Source(("transformer.wte.weight",)),
        "model.norm.weight": Source(("transformer.ln_f.weight",)),
        "lm_head.weight": Source(("lm_head.weight",)),
    }
    head = config.num_hidden_layers - config.num_prelude_layers
    for ours, theirs, count in (("prelude", "prelude", config.num_prelude_layers), ("head", "core_block", head)):
        for i in range(count):
            sources |= _block_sources(f"model.layers.0.{ours}.{i}", f"transformer.{theirs}.{i}", config)
    return sources


def _block_sources(ours: str, theirs: str, config: DEQAttractorConfig) -> dict[str, Source]:
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    halves = torch.arange(size).view(-1, 2).T.flatten()  # first the even channels of a head, then the odd ones
    rotated = (torch.arange(heads + groups)[:, None] * size + halves).flatten()
    rows = torch.cat([rotated, torch.arange(len(rotated), len(rotated) + groups * size)])
    sizes = (heads * size, groups * size, groups * size)
    half = 0.5 if config.hidden_act == "relu2" else 1.0
    joined = {
        f"{ours}.self_attn.qkv_proj.{kind}": Source(
            tuple(f"{theirs}.attn.{name}.{kind}" for name in ("c_q", "c_k", "c_v")), rows=rows, sizes=sizes
        )
        for kind in ("weight", "bias")
    }
    return (
        joined
        | linear(f"{ours}.attention_norm", f"{theirs}.norm_1")
        | linear(f"{ours}.self_attn.o_proj", f"{theirs}.attn.c_proj")
        | linear(f"{ours}.feed_forward_norm", f"{theirs}.norm_2")
        | linear(f"{ours}.mlp.up_proj", f"{theirs}.mlp.fc")
        | linear(f"{ours}.mlp.down_proj", f"{theirs}.mlp.proj")
        | {
            f"{ours}.mlp.down_proj.weight": Source((f"{theirs}.mlp.proj.weight",), scale=half),
            f"{ours}.attention_scale.weight": Source((f"{theirs}.raw_gamma_attn",)),
            f"{ours}.feed_forward_scale.weight": Source((f"{theirs}.raw_gamma_mlp",)),
        }
    )
