"""Convert checkpoints of the authors' code to models of this package.

    model = convert_checkpoint(state_dict, constructor_arguments, family="deq_transformer")

There are three families, one for each published code base: `"deq_transformer"` (locuslab/deq, DEQ-Sequence),
`"deq_trellisnet"` (the same repository, branch pytorch-1.5) and `"torchdeq_lm"` (locuslab/torchdeq, deq-zoo/deq-lm).
The constructor arguments are those of the language model class in the authors' code, with the same names. Every tensor
of the state dict must be used, or be known as a copy or as derived from other tensors.

Reading order: the conversion; for each family, from arguments to a configuration; and the source of each parameter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..configuration_deq import require_one_of
from ..configuration_deq_transformer import DEQTransformerConfig
from ..configuration_deq_trellisnet import DEQTrellisNetConfig
from ..modeling_deq import DEQForCausalLM
from ..modeling_deq_transformer import DEQTransformerForCausalLM
from ..modeling_deq_trellisnet import DEQTrellisNetForCausalLM

# The window in the authors' attention if their local_size is 0 or None.
DEFAULT_WINDOW = 1000

# Tensors that the authors' code computes from other tensors: position frequencies, and normalised copies of weights.
DERIVED = re.compile(r"(^|\.)(pos_emb\.inv_freq|func_copy\..*)$")

# Prefixes under which some tensors appear a second time, and the first prefix of these tensors.
SECOND_NAMES = {"trellisnet.deq.func.": "trellisnet.func.", "mixsoft.decoder.": "decoder."}


@dataclass(frozen=True)
class Source:
    """The source of a parameter in the state dict.

    Attributes:
        key: name of the tensor in the state dict.
        trailing: whether the tensor has one more dimension at the end, of size one (a convolution with one tap).
        rows: indices that bring the rows of the tensor into our order; `None` if the order is the same.
    """

    key: str
    trailing: bool = False
    rows: Tensor | None = None

    def read(self, tensor: Tensor) -> Tensor:
        """Return the parameter, computed from the tensor with the name `key`."""
        tensor = tensor.squeeze(-1) if self.trailing else tensor
        return tensor if self.rows is None else tensor[self.rows]


def convert_checkpoint(
    state_dict: dict[str, Tensor], constructor_arguments: dict, family: str, **config_fields
) -> DEQForCausalLM:
    """Convert a state dict of the authors' code to a model, in evaluation mode and in the dtype of the tensors.

    In the authors' code, tied projections share storage, but each has its own gradient. Here they are one parameter.
    torchdeq's f has no isolated fixed point, because every sub-layer sees the state through a norm. So torchdeq's
    models unroll 12 applications of f, and the converted models do the same. Between segments, the authors' TrellisNet
    carries only its last state, and uses it in place of all states before it. It carries no inputs. Our TrellisNet
    carries all states and inputs that its convolutions reach.

    Args:
        state_dict: tensors with their original names. Tied tensors are present under every name. Unused copies are
            ignored.
        constructor_arguments: arguments of `DEQTransformerLM` or `DEQTrellisNetLM`, by name. For a TrellisNet with a
            split softmax also `splits`, the argument of its criterion. The tensors of the criterion are
            `criterion.tail_vectors` and `criterion.tail_bias`.
        family: `"deq_transformer"`, `"deq_trellisnet"` or `"torchdeq_lm"`.
        config_fields: further fields of our configuration, such as the solver. They override converted fields.

    Raises:
        ValueError: if the family or an argument is unknown; if an argument is missing; if the arguments make no valid
            model; if tensors are missing, are left over, or do not have the shape that the arguments imply (the message
            names all of them); or if tensors differ that are tied according to the arguments.
    """
    require_one_of("family", family, FAMILIES)
    state_dict = _distinct(state_dict)
    make_config, sources_of, model_class = FAMILIES[family]
    try:
        config = make_config(constructor_arguments, state_dict, config_fields)
    except StrictDataclassError as error:
        raise ValueError(f"constructor_arguments do not make a model: {error}") from error
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in model_class(config).named_parameters(remove_duplicate=False)}
    sources = sources_of(config)
    _check(state_dict, {name: sources[name] for name in shapes}, shapes, constructor_arguments)
    model = model_class(config).to(next(t.dtype for t in state_dict.values() if t.is_floating_point())).eval()
    _check_ties(model, sources, state_dict)
    model.load_state_dict({name: sources[name].read(state_dict[sources[name].key]) for name in shapes})
    return model


def _distinct(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that are parameters, each under its first name only.

    Raises:
        ValueError: if a tensor differs between its two names.
    """
    # The names of a model that was trained in parallel have one more prefix.
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    distinct = {}
    for name, tensor in state_dict.items():
        second = next((prefix for prefix in SECOND_NAMES if name.startswith(prefix)), None)
        if DERIVED.search(name):
            continue
        if second is not None:
            first = name.replace(second, SECOND_NAMES[second], 1)
            if first in state_dict and not torch.equal(state_dict[first], tensor):
                raise ValueError(
                    f"{name} and {first} are one tensor in the authors' code, but differ in this state dict."
                )
            name = first
        distinct[name] = tensor
    return distinct


def _check(state_dict, sources: dict[str, Source], shapes: dict[str, tuple], arguments: dict) -> None:
    """Check that every tensor is used, that none is missing, and that all have the shapes that the arguments imply.

    Raises:
        ValueError: if this is not so. The message names all these tensors.
    """
    wanted = {source.key: shapes[name] + (1,) * source.trailing for name, source in sources.items()}
    problems = [f"missing: {key}" for key in wanted if key not in state_dict]
    problems += [f"left over: {key}" for key in state_dict if key not in wanted]
    problems += [
        f"{key} is {tuple(state_dict[key].shape)}, but should be {shape}"
        for key, shape in wanted.items()
        if key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    if problems:
        raise ValueError(
            "The state dict does not fit the constructor arguments "
            f"({', '.join(f'{name}={value}' for name, value in arguments.items())}):\n  " + "\n  ".join(problems)
        )


def _check_ties(model: DEQForCausalLM, sources: dict[str, Source], state_dict: dict[str, Tensor]) -> None:
    """Check that parameters which are tied in our model have equal values in the state dict.

    Raises:
        ValueError: if the values differ.
    """
    for ours, theirs in model.all_tied_weights_keys.items():
        one, other = sources[ours].key, sources[theirs].key
        if not torch.equal(state_dict[one], state_dict[other]):
            raise ValueError(
                f"{one} and {other} differ, but tie_weights or tie_projs says that they are tied: correct the "
                "constructor arguments."
            )


# From the arguments of each family to a configuration


def _transformer_config(arguments: dict, state_dict: dict, fields: dict) -> DEQTransformerConfig:
    given = _Arguments(arguments)
    pre_norm = given("pre_lnorm", False)
    theirs = _common_transformer_fields(given) | dict(
        norm_position="pre_normalized_residual" if pre_norm else "post",
        norm_affine=False,
        weight_norm=given("wnorm", False),
    )
    given.ignore("n_layer", "pretrain_steps", "eval_n_layer", "load")  # for shallow pretraining, and a file to load
    given.refuse_unknown()
    return DEQTransformerConfig(**(theirs | fields))


def _torchdeq_config(arguments: dict, state_dict: dict, fields: dict) -> DEQTransformerConfig:
    given = _Arguments(arguments)
    theirs = _common_transformer_fields(given) | dict(
        num_hidden_layers=given("n_layer"),
        norm_position="pre_open",
        attention_output_norm=True,
        weight_norm=any(name.endswith("_v") for name in state_dict),  # not an argument of torchdeq's model
        gradient="unrolled",  # f has no isolated fixed point; torchdeq trains and uses it with 12 applications
        solver="picard",
        solver_max_evaluations=12,
    )
    given.refuse_unknown()
    return DEQTransformerConfig(**(theirs | fields))


def _common_transformer_fields(given: "_Arguments") -> dict:
    cutoffs = given("cutoffs", []) or None
    div_val, hidden_size = given("div_val", 1), given("d_model")
    embedding_size = given("d_embed", None) or hidden_size
    tied = [cluster for cluster, is_tied in enumerate(given("tie_projs", None) or []) if is_tied]
    has_projections = div_val > 1 or embedding_size != hidden_size
    dropout = given("dropout", 0.0)
    memory_length = given("mem_len", 0) or 0
    return dict(
        vocab_size=given("n_token"),
        hidden_size=hidden_size,
        intermediate_size=given("d_inner"),
        num_attention_heads=given("n_head"),
        head_dim=given("d_head"),
        hidden_act="relu",
        final_norm=False,
        inject_residual=False,
        position_embedding_type="relative",
        sliding_window=given("local_size", 0) or DEFAULT_WINDOW,
        memory_length=memory_length,
        max_position_embeddings=memory_length + (given("tgt_len", 0) or 0),
        embedding_size=embedding_size,
        cutoffs=cutoffs,
        div_val=div_val,
        tied_projections=tied if tied and has_projections else None,
        head_bias=True,
        embedding_dropout=dropout,
        hidden_dropout=dropout,
        output_dropout=dropout,
        attention_dropout=given("dropatt", 0.0),
        variational_dropout=True,
        tie_word_embeddings=given("tie_weights", True),
    )


def _trellisnet_config(arguments: dict, state_dict: dict, fields: dict) -> DEQTrellisNetConfig:
    given = _Arguments(arguments)
    theirs = dict(
        vocab_size=given("n_token"),
        embedding_size=given("ninp"),
        intermediate_size=given("nhid"),
        hidden_size=given("nout"),
        kernel_size=given("kernel_size", 2),
        dilation=given("dilation", 1),
        cell_scan=False,  # their f takes one step of the recurrence; the equilibrium is the same
        weight_norm=given("wnorm", True),
        cutoffs=given("splits", None) or None,
        num_softmax_experts=given("n_experts", 0),
        embedding_dropout=given("emb_dropout", 0.0),
        input_dropout=given("dropouti", 0.0),
        hidden_dropout=given("dropouth", 0.0),
        output_dropout=given("dropout", 0.0),
        weight_dropout=given("wdrop", 0.0),
        tie_word_embeddings=given("tie_weights", True),
    )
    # For shallow pretraining, dropout within a mixture of softmaxes, and a file to load.
    given.ignore("n_layer", "pretrain_steps", "dropoutl", "load")
    given.refuse_unknown()
    return DEQTrellisNetConfig(**(theirs | fields))


class _Arguments:
    """Constructor arguments. It records which ones were read or ignored, so that it can refuse all others."""

    def __init__(self, arguments: dict):
        self.arguments, self.left = arguments, set(arguments)

    def __call__(self, name: str, *default):
        self.left.discard(name)
        if name not in self.arguments and not default:
            raise ValueError(f"constructor_arguments lacks {name!r}; it has {sorted(self.arguments)}.")
        return self.arguments.get(name, *default)

    def ignore(self, *names: str) -> None:
        self.left -= set(names)

    def refuse_unknown(self) -> None:
        if self.left:
            raise ValueError(f"constructor_arguments has {sorted(self.left)}, which no model of this family takes.")


# The source of each parameter


def _transformer_sources(config: DEQTransformerConfig) -> dict[str, Source]:
    """For locuslab/deq: linear maps of f are convolutions with one tap, except in the feed-forward sub-layer."""
    layer, block = "model.layers.0", "model.layers.0.blocks.0"
    return (
        _vocabulary_sources(config)
        | _linear(f"{layer}.injection", "inject_conv", trailing=True)
        | _block_sources(block, "func.dec_attn", "func.pos_ff", trailing=True)
    )


def _torchdeq_sources(config: DEQTransformerConfig) -> dict[str, Source]:
    """For torchdeq: rows are ordered by head, then by query, key and value. In our order all queries come first."""
    heads, size = config.num_attention_heads, config.head_dim
    rows = torch.arange(3 * heads * size).view(heads, 3, size).transpose(0, 1).flatten()
    sources = _vocabulary_sources(config) | _linear("model.layers.0.injection", "injection", rows=rows)
    for i in range(config.num_hidden_layers):
        block, attention, feed_forward = f"model.layers.0.blocks.{i}", f"func.dec_attn.{i}", f"func.pos_ff.{i}"
        sources |= _block_sources(block, attention, feed_forward, trailing=False, rows=rows)
        sources |= _linear(f"{block}.attention_norm", f"{attention}.ln1")
        sources |= _linear(f"{block}.self_attn.output_norm", f"{attention}.ln2")
        sources |= _linear(f"{block}.feed_forward_norm", f"{feed_forward}.ln")
    return sources


def _block_sources(block: str, attention: str, feed_forward: str, trailing: bool, rows: Tensor | None = None) -> dict:
    return (
        _linear(f"{block}.self_attn.qkv_proj", f"{attention}.qkv_net", trailing, rows)
        | _linear(f"{block}.self_attn.relative_proj", f"{attention}.r_net", trailing)
        | _linear(f"{block}.self_attn.o_proj", f"{attention}.o_net", trailing)
        | {
            f"{block}.self_attn.content_bias": Source(f"{attention}.r_w_bias"),
            f"{block}.self_attn.position_bias": Source(f"{attention}.r_r_bias"),
        }
        | _linear(f"{block}.up_proj", f"{feed_forward}.ff1_net")
        | _linear(f"{block}.down_proj", f"{feed_forward}.ff2_net")
    )


def _vocabulary_sources(config: DEQTransformerConfig) -> dict[str, Source]:
    tables = 1 if config.div_val == 1 else 1 + len(config.cutoffs)
    sources = {
        "lm_head.cluster_weight": Source("crit.cluster_weight"),
        "lm_head.cluster_bias": Source("crit.cluster_bias"),
    }
    for i in range(1 + len(config.cutoffs or ())):
        table = "" if tables == 1 else f"cluster{i}_"
        if i < tables:
            sources[f"model.embed_tokens.{table}weight"] = Source(f"word_emb.emb_layers.{i}.weight")
            sources[f"lm_head.{table}weight"] = Source(f"crit.out_layers.{i}.weight")
            sources[f"lm_head.{table}bias"] = Source(f"crit.out_layers.{i}.bias")
        sources[f"model.embed_tokens.projection{i}_weight"] = Source(f"word_emb.emb_projs.{i}.weight")
        sources[f"lm_head.projection{i}_weight"] = Source(f"crit.out_projs.{i}.weight")
    return sources


def _trellisnet_sources(config: DEQTrellisNetConfig) -> dict[str, Source]:
    return (
        _linear("model.layers.0.recurrence", "trellisnet.func.full_conv")
        | _linear("model.layers.0.injection", "trellisnet.inject_conv")
        | _linear("lm_head", "decoder")
        | _linear("lm_head.prior", "mixsoft.prior")
        | _linear("lm_head.latent", "mixsoft.latent")
        | {
            "model.embed_tokens.weight": Source("encoder.weight"),
            "lm_head.cluster_weight": Source("criterion.tail_vectors"),
            "lm_head.cluster_bias": Source("criterion.tail_bias"),
        }
    )


def _linear(ours: str, theirs: str, trailing: bool = False, rows: Tensor | None = None) -> dict[str, Source]:
    """Return the sources of a linear map, a convolution or a norm, for all parameter names that it may have.

    The caller uses only the names that the model really has.
    """
    return {
        f"{ours}.weight": Source(f"{theirs}.weight", trailing, rows),
        f"{ours}.magnitude": Source(f"{theirs}.weight_g", trailing, rows),
        f"{ours}.direction": Source(f"{theirs}.weight_v", trailing, rows),
        f"{ours}.bias": Source(f"{theirs}.bias", rows=rows),
    }


FAMILIES: dict[str, tuple[Callable, Callable, type[DEQForCausalLM]]] = {
    "deq_transformer": (_transformer_config, _transformer_sources, DEQTransformerForCausalLM),
    "deq_trellisnet": (_trellisnet_config, _trellisnet_sources, DEQTrellisNetForCausalLM),
    "torchdeq_lm": (_torchdeq_config, _torchdeq_sources, DEQTransformerForCausalLM),
}
