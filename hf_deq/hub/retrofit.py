"""Make an Attractor model of a pretrained decoder: some of its layers become the prelude, others the head.

    model = retrofit(LlamaForCausalLM.from_pretrained("folder"), num_prelude_layers=4, num_head_layers=1)

The result is a start for training, not a finished model (compare retrofitted recurrence, arXiv 2511.07384). Its parts
compute what they computed before. What is new is that the head reads y + c, and is applied until y no longer changes.
"""

import copy
from collections.abc import Callable

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention_deq import additive_mask
from ..configuration_deq import fits_given_weights
from ..configuration_deq_attractor import DEQAttractorConfig
from ..modeling_deq_attractor import DEQAttractorBlock, DEQAttractorForCausalLM
from ..positions_deq import RotaryPositions

# The modules of a layer of the original. Where a name has no module, the original has no such part.
PARTS = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
OPTIONAL_PARTS = ("self_attn.q_norm", "self_attn.k_norm")
# The fields of the original's configuration that are fields of ours, with the same meaning.
SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps"),
    *("max_position_embeddings", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
LARGEST_DIFFERENCE = 1e-3  # between a part and its copy, relative to what the part computes
# The other fields of the configuration follow from the original. Gates are new.
FREE_FIELDS = {name for name in DEQAttractorConfig.__dataclass_fields__ if fits_given_weights(name)}
FREE_FIELDS |= {"layer_scale_init_value", "layer_scale_max"}


def retrofit(
    model: PreTrainedModel, num_prelude_layers: int, num_head_layers: int = 1, **config_fields
) -> DEQAttractorForCausalLM:
    """Return an Attractor model made of the layers of a pretrained decoder.

    Embeddings, final norm and output layer are those of the original. The first layers become the prelude, the next
    ones the head. The layers after these are left out. Every copied part is compared with the original: the layers on
    random states, embeddings and logits on random tokens.

    Args:
        model: a language model with the layers of Llama (Llama, Mistral, Qwen2, Qwen3).
        num_prelude_layers: number of layers that become the prelude.
        num_head_layers: number of layers that become the head, at least 1.
        config_fields: fields of the equilibrium and of dropout, such as `solver`, which replace the defaults.
            `layer_scale_init_value` gives the head gates; by default it has none.

    Returns:
        The model in evaluation mode, in the dtype and on the device of the original, with its generation configuration.

    Raises:
        ValueError: if there are not so many layers; if a part of the original has no counterpart, or computes something
            else than its copy, or has weights that are not finite; if a field would change what is copied, or have no
            effect. The message names the part or the field.
    """
    if fixed := sorted(config_fields.keys() - FREE_FIELDS):
        raise ValueError(
            f"{fixed[0]} follows from the original: leave it out. Free are {', '.join(sorted(FREE_FIELDS))}."
        )
    if "layer_scale_max" in config_fields and config_fields.get("layer_scale_init_value") is None:
        raise ValueError("layer_scale_max limits gates: give layer_scale_init_value, too, or leave it out.")
    layers = _layers_of(model)
    if num_prelude_layers < 0 or num_head_layers < 1 or num_prelude_layers + num_head_layers > len(layers):
        raise ValueError(
            f"num_prelude_layers={num_prelude_layers} and num_head_layers={num_head_layers} do not fit: the model has "
            f"{len(layers)} layers, and the head needs at least one of them."
        )
    config = _config(model, layers[0], num_prelude_layers, num_head_layers, config_fields)
    ours = DEQAttractorForCausalLM(config).to(model.device, model.dtype).eval()
    ours.model.embed_tokens.load_state_dict(model.get_input_embeddings().state_dict())
    ours.model.norm.load_state_dict(model.model.norm.state_dict())
    ours.lm_head.weight.data.copy_(model.get_output_embeddings().weight)
    blocks = [*ours.model.layers[0].prelude, *ours.model.layers[0].head]
    for i, (block, layer) in enumerate(zip(blocks, layers, strict=False)):
        weights = _weights(layer)
        _check_shapes(f"{type(model).__name__} cannot be retrofitted: its layer {i}", weights, block.state_dict())
        block.load_state_dict(weights, strict=False)  # gates are new
    was_training = model.training
    model.eval()
    try:
        _compare_layers(model, layers, blocks)
        _compare_ends(model, layers, ours)
    finally:
        model.train(was_training)
    if model.can_generate():
        ours.generation_config = copy.deepcopy(model.generation_config)
    return ours


def _layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers.

    Raises:
        ValueError: if a part of the model has no counterpart, or weights are not finite. The message names them.
    """
    name = type(model).__name__
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or getattr(model.config, "rope_parameters", None) is None:
        raise ValueError(f"{name} cannot be retrofitted: it has no list of decoder layers with rotary positions.")
    if not isinstance(head := model.get_output_embeddings(), nn.Linear):
        raise ValueError(f"{name} cannot be retrofitted: it has no linear output layer of tokens. Give a causal model.")
    if head.bias is not None:
        raise ValueError(f"{name} cannot be retrofitted: its output layer has a bias.")
    for parameter_name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} cannot be retrofitted: {parameter_name} has numbers that are not finite.")
    for i, layer in enumerate(layers):
        leaves = {name for name, module in layer.named_modules() if next(module.children(), None) is None}
        leaves = {name for name in leaves if any(True for _ in layer.get_submodule(name).parameters())}
        missing, unknown = set(PARTS) - leaves, leaves - {*PARTS, *OPTIONAL_PARTS}
        if missing or unknown:
            what = f"no {sorted(missing)[0]}" if missing else f"{sorted(unknown)[0]}, which has no counterpart"
            raise ValueError(f"{name} cannot be retrofitted: its layer {i} has {what}.")
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        raise ValueError(f"{name} cannot be retrofitted: its layers differ in their attention ({sorted(kinds)}).")
    return layers


def _config(model, layer, num_prelude_layers: int, num_head_layers: int, fields: dict) -> DEQAttractorConfig:
    """Return our configuration of the original's sizes.

    Raises:
        ValueError: if the original's configuration lacks a field, or makes no valid one of ours.
    """
    theirs, attention, mlp = model.config, layer.self_attn, layer.mlp
    if lacking := [name for name in SAME_FIELDS if not hasattr(theirs, name)]:
        raise ValueError(
            f"{type(model).__name__} cannot be retrofitted: its configuration has no {lacking[0]}. Give a decoder with "
            "the layers of Llama: Llama, Mistral, Qwen2 or Qwen3."
        )
    layer_types = getattr(theirs, "layer_types", None) or []
    slides = layer_types[0] == "sliding_attention" if layer_types else True
    window = getattr(theirs, "sliding_window", None) if slides else None
    partial = theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1):
        raise ValueError(f"{type(model).__name__} cannot be retrofitted: partial_rotary_factor is {partial}, not 1.")
    if theirs.rope_parameters.get("llama_4_scaling_beta"):
        raise ValueError(f"{type(model).__name__} cannot be retrofitted: its positions scale the queries.")
    converted = dict(
        intermediate_size=mlp.up_proj.out_features,
        num_hidden_layers=num_prelude_layers + num_head_layers,
        num_prelude_layers=num_prelude_layers,
        head_dim=attention.head_dim,
        gated_mlp=True,
        attention_bias=any(part.bias is not None for part in (attention.q_proj, attention.o_proj)),
        mlp_bias=mlp.up_proj.bias is not None,
        qk_norm="affine" if hasattr(attention, "q_norm") else None,
        rope_parameters=dict(theirs.rope_parameters),
        sliding_window=window,
        layer_scale_init_value=None,
        **{name: getattr(theirs, name) for name in SAME_FIELDS},
    )
    try:
        return DEQAttractorConfig(**(converted | fields))
    except StrictDataclassError as error:
        raise ValueError(f"{type(model).__name__} cannot be retrofitted: {error}") from error


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a layer by our names. A missing bias of the attention is zero."""
    attention, mlp = layer.self_attn, layer.mlp
    weights = {
        "attention_norm.weight": layer.input_layernorm.weight,
        "self_attn.qkv_proj.weight": _joined(attention, ("q_proj", "k_proj", "v_proj"), "weight"),
        "self_attn.o_proj.weight": attention.o_proj.weight,
        "feed_forward_norm.weight": layer.post_attention_layernorm.weight,
        "mlp.up_proj.weight": _joined(mlp, ("gate_proj", "up_proj"), "weight"),
        "mlp.down_proj.weight": mlp.down_proj.weight,
    }
    if attention.q_proj.bias is not None:
        nothing = attention.o_proj.weight.new_zeros(attention.o_proj.out_features)
        weights["self_attn.qkv_proj.bias"] = _joined(attention, ("q_proj", "k_proj", "v_proj"), "bias")
        weights["self_attn.o_proj.bias"] = nothing if attention.o_proj.bias is None else attention.o_proj.bias
    if mlp.up_proj.bias is not None:
        weights |= {"mlp.up_proj.bias": _joined(mlp, ("gate_proj", "up_proj"), "bias")}
        weights |= {"mlp.down_proj.bias": mlp.down_proj.bias}
    if hasattr(attention, "q_norm"):
        weights |= {f"self_attn.{name}.weight": getattr(attention, name).weight for name in ("q_norm", "k_norm")}
    return {name: weight.detach() for name, weight in weights.items()}


def _check_shapes(whose: str, weights: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Refuse weights of other shapes than a layer of ours has.

    Raises:
        ValueError: if there are some. The message names the first one.
    """
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise ValueError(
                f"{whose} has {name} of shape {tuple(weight.shape)}, where an Attractor model of the same sizes has "
                f"{tuple(own[name].shape)}."
            )


def _joined(module: nn.Module, names: tuple[str, ...], kind: str) -> Tensor:
    return torch.cat([getattr(getattr(module, name), kind) for name in names])


@torch.no_grad()
def _compare_layers(model: PreTrainedModel, layers: nn.ModuleList, blocks: list[DEQAttractorBlock]) -> None:
    """Refuse a model whose layers add something else to random states than their copies.

    Layers and copies are compared in single precision or wider, one at a time. In half precision, what a layer adds
    would be lost in the rounding of its output.

    Raises:
        ValueError: if there is such a layer. The message names it.
    """
    generator, precise = torch.Generator().manual_seed(0), torch.promote_types(model.dtype, torch.float32)
    states = torch.randn(1, 12, model.config.hidden_size, generator=generator).to(model.device, precise)
    positions = torch.arange(states.shape[1], device=states.device)[None]
    ours = RotaryPositions.make(blocks[0].self_attn.config, positions, precise)
    rotary = model.model.rotary_emb
    if model.dtype.itemsize == 2:  # a cast of the model has rounded its frequencies
        rotary = type(rotary)(config=model.config).to(model.device)
    theirs = rotary(states, positions)
    causal = additive_mask(torch.ones(1, 1, 12, 12, dtype=torch.bool, device=states.device).tril(), precise)
    for i, (layer, block) in enumerate(zip(layers, blocks, strict=False)):
        layer, block = copy.deepcopy(layer).to(precise), copy.deepcopy(block).to(precise)
        output = layer(states, attention_mask=causal, position_ids=positions, position_embeddings=theirs)
        expected = (output[0] if isinstance(output, tuple) else output) - states
        added = _without_gates(block)(states, ours, causal, None, {})
        _require_equal(model, f"layer {i}", added, expected, "Norms, the scaling of scores or residual sums differ.")


@torch.no_grad()
def _compare_ends(model: PreTrainedModel, layers: nn.ModuleList, ours: DEQAttractorForCausalLM) -> None:
    """Refuse a model that embeds tokens, or makes logits of states, in another way than its copy.

    Raises:
        ValueError: if it does. The message names which of the two.
    """
    seen = {}
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(embedded=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        model.model.norm.register_forward_pre_hook(lambda module, args: seen.update(states=args[0])),
    ]
    ids = torch.randint(model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0)).to(model.device)
    logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    embedded = ours.model._embed(ours.model.embed_tokens(ids), ids)
    _require_equal(model, "embedding", embedded, seen["embedded"], "It scales or normalises embeddings.")
    ours_of_states = ours._logits(ours.model.norm(seen["states"]))
    _require_equal(
        model, "output layer", ours_of_states, logits, "It scales or limits logits, or the final norm differs."
    )


def _require_equal(model: PreTrainedModel, part: str, ours: Tensor, theirs: Tensor, cause: str) -> None:
    error = (ours - theirs).norm() / theirs.norm()
    if not error <= max(LARGEST_DIFFERENCE, torch.finfo(theirs.dtype).eps):  # both round in half precision
        raise ValueError(
            f"{type(model).__name__} cannot be retrofitted: its {part} computes something else than the copy with the "
            f"same weights ({error:.0%} off). {cause}"
        )


def _without_gates(block: DEQAttractorBlock) -> Callable[..., Tensor]:
    """Return what the layer adds to its input, without the gates that a head may have."""

    def added(x: Tensor, *arguments) -> Tensor:
        attended, _ = block.self_attn(block.attention_norm(x), *arguments)
        return attended + block.mlp(block.feed_forward_norm(x + attended))

    return added
