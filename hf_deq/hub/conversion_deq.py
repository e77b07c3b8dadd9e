"""The authors' DEQ models and torchdeq's DEQ-LM, for `conversion.py`.

Reading order: which tensors are parameters; for each family, from the arguments of the authors' constructor to a
configuration; and the source of each parameter.
"""

import re

import torch
from torch import Tensor

from ..configuration_deq import DEQConfig
from ..configuration_deq_transformer import DEQTransformerConfig
from ..configuration_deq_trellisnet import DEQTrellisNetConfig
from .sources import Arguments, Source, linear

# The window in the authors' attention if their local_size is 0 or None.
DEFAULT_WINDOW = 1000

# Tensors that the authors' code computes from other tensors: position frequencies, and normalised copies of weights.
DERIVED = re.compile(r"(^|\.)(pos_emb\.inv_freq|func_copy\..*)$")

# Prefixes under which some tensors appear a second time, and the first prefix of these tensors.
SECOND_NAMES = {"trellisnet.deq.func.": "trellisnet.func.", "mixsoft.decoder.": "decoder."}


def without_copies(state_dict: dict[str, Tensor], config: DEQConfig) -> dict[str, Tensor]:
    """Return the tensors that are parameters, each under its first name only.

    Raises:
        ValueError: if a tensor differs between its two names.
    """
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


def transformer_config(arguments: dict, state_dict: dict, fields: dict) -> DEQTransformerConfig:
    given = Arguments(arguments)
    pre_norm = given("pre_lnorm", False)
    theirs = _common_transformer_fields(given) | dict(
        norm_position="pre_normalized_residual" if pre_norm else "post",
        norm_affine=False,
        weight_norm=given("wnorm", False),
    )
    given.ignore("n_layer", "pretrain_steps", "eval_n_layer", "load")  # for shallow pretraining, and a file to load
    given.refuse_unknown()
    return DEQTransformerConfig(**(theirs | fields))


def torchdeq_config(arguments: dict, state_dict: dict, fields: dict) -> DEQTransformerConfig:
    given = Arguments(arguments)
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


def _common_transformer_fields(given: Arguments) -> dict:
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


def trellisnet_config(arguments: dict, state_dict: dict, fields: dict) -> DEQTrellisNetConfig:
    given = Arguments(arguments)
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


# The source of each parameter


def transformer_sources(config: DEQTransformerConfig) -> dict[str, Source]:
    """For locuslab/deq: linear maps of f are convolutions with one tap, except in the feed-forward sub-layer."""
    layer, block = "model.layers.0", "model.layers.0.blocks.0"
    return (
        _vocabulary_sources(config)
        | linear(f"{layer}.injection", "inject_conv", trailing=True)
        | _block_sources(block, "func.dec_attn", "func.pos_ff", trailing=True)
    )


def torchdeq_sources(config: DEQTransformerConfig) -> dict[str, Source]:
    """For torchdeq: rows are ordered by head, then by query, key and value. In our order all queries come first."""
    heads, size = config.num_attention_heads, config.head_dim
    rows = torch.arange(3 * heads * size).view(heads, 3, size).transpose(0, 1).flatten()
    sources = _vocabulary_sources(config) | linear("model.layers.0.injection", "injection", rows=rows)
    for i in range(config.num_hidden_layers):
        block, attention, feed_forward = f"model.layers.0.blocks.{i}", f"func.dec_attn.{i}", f"func.pos_ff.{i}"
        sources |= _block_sources(block, attention, feed_forward, trailing=False, rows=rows)
        sources |= linear(f"{block}.attention_norm", f"{attention}.ln1")
        sources |= linear(f"{block}.self_attn.output_norm", f"{attention}.ln2")
        sources |= linear(f"{block}.feed_forward_norm", f"{feed_forward}.ln")
    return sources


def _block_sources(block: str, attention: str, feed_forward: str, trailing: bool, rows: Tensor | None = None) -> dict:
    return (
        linear(f"{block}.self_attn.qkv_proj", f"{attention}.qkv_net", trailing, rows)
        | linear(f"{block}.self_attn.relative_proj", f"{attention}.r_net", trailing)
        | linear(f"{block}.self_attn.o_proj", f"{attention}.o_net", trailing)
        | {
            f"{block}.self_attn.content_bias": Source((f"{attention}.r_w_bias",)),
            f"{block}.self_attn.position_bias": Source((f"{attention}.r_r_bias",)),
        }
        | linear(f"{block}.up_proj", f"{feed_forward}.ff1_net")
        | linear(f"{block}.down_proj", f"{feed_forward}.ff2_net")
    )


def _vocabulary_sources(config: DEQTransformerConfig) -> dict[str, Source]:
    tables = 1 if config.div_val == 1 else 1 + len(config.cutoffs)
    sources = {
        "lm_head.cluster_weight": Source(("crit.cluster_weight",)),
        "lm_head.cluster_bias": Source(("crit.cluster_bias",)),
    }
    for i in range(1 + len(config.cutoffs or ())):
        table = "" if tables == 1 else f"cluster{i}_"
        if i < tables:
            sources[f"model.embed_tokens.{table}weight"] = Source((f"word_emb.emb_layers.{i}.weight",))
            sources[f"lm_head.{table}weight"] = Source((f"crit.out_layers.{i}.weight",))
            sources[f"lm_head.{table}bias"] = Source((f"crit.out_layers.{i}.bias",))
        sources[f"model.embed_tokens.projection{i}_weight"] = Source((f"word_emb.emb_projs.{i}.weight",))
        sources[f"lm_head.projection{i}_weight"] = Source((f"crit.out_projs.{i}.weight",))
    return sources


def trellisnet_sources(config: DEQTrellisNetConfig) -> dict[str, Source]:
    return (
        linear("model.layers.0.recurrence", "trellisnet.func.full_conv")
        | linear("model.layers.0.injection", "trellisnet.inject_conv")
        | linear("lm_head", "decoder")
        | linear("lm_head.prior", "mixsoft.prior")
        | linear("lm_head.latent", "mixsoft.latent")
        | {
            "model.embed_tokens.weight": Source(("encoder.weight",)),
            "lm_head.cluster_weight": Source(("criterion.tail_vectors",)),
            "lm_head.cluster_bias": Source(("criterion.tail_bias",)),
        }
    )
