"""Convert checkpoints of the authors' code to models of this package.

    model = convert_checkpoint(state_dict, constructor_arguments, family="deq_transformer")

There are four families, one for each published code base: `"deq_transformer"` (locuslab/deq, DEQ-Sequence),
`"deq_trellisnet"` (the same repository, branch pytorch-1.5), `"torchdeq_lm"` (locuslab/torchdeq, deq-zoo/deq-lm) and
`"attractor"` (jacobfa/Attractor). The constructor arguments are those of the language model class in the authors'
code, with the same names. Every tensor of the state dict must be used, or be known as a copy or as derived from other
tensors.

`conversion_deq.py` and `conversion_attractor.py` know the code bases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..configuration_deq import DEQConfig, fits_given_weights, require_one_of
from ..modeling_deq import DEQForCausalLM
from ..modeling_deq_attractor import DEQAttractorForCausalLM
from ..modeling_deq_transformer import DEQTransformerForCausalLM
from ..modeling_deq_trellisnet import DEQTrellisNetForCausalLM
from .conversion_attractor import attractor_config, attractor_sources, without_rotary_table
from .conversion_deq import (
    torchdeq_config,
    torchdeq_sources,
    transformer_config,
    transformer_sources,
    trellisnet_config,
    trellisnet_sources,
    without_copies,
)
from .sources import Source

# What training in parallel, compilation and wrappers put before the names of all tensors.
PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.")
# Fields besides those of the equilibrium, of dropout and of token ids that do not change the equilibrium.
FREE_FIELDS = ("cell_scan", "max_position_embeddings", "memory_length", "use_cache")


@dataclass(frozen=True)
class CodeBase:
    """What the conversion knows of a published code base.

    Attributes:
        config: makes our configuration from the constructor arguments, the state dict and further fields.
        sources: gives the source of each of our parameters, by name, for a configuration.
        model_class: the class of the converted model.
        parameters: returns the tensors that are parameters, each under one name, from a state dict and a configuration.
    """

    config: Callable[[dict, dict, dict], DEQConfig]
    sources: Callable[[DEQConfig], dict[str, Source]]
    model_class: type[DEQForCausalLM]
    parameters: Callable[[dict, DEQConfig], dict]


FAMILIES = {
    "deq_transformer": CodeBase(transformer_config, transformer_sources, DEQTransformerForCausalLM, without_copies),
    "deq_trellisnet": CodeBase(trellisnet_config, trellisnet_sources, DEQTrellisNetForCausalLM, without_copies),
    "torchdeq_lm": CodeBase(torchdeq_config, torchdeq_sources, DEQTransformerForCausalLM, without_copies),
    "attractor": CodeBase(attractor_config, attractor_sources, DEQAttractorForCausalLM, without_rotary_table),
}


def convert_checkpoint(
    state_dict: dict[str, Tensor], constructor_arguments: dict, family: str, **config_fields
) -> DEQForCausalLM:
    """Convert a state dict of the authors' code to a model, in evaluation mode and in the widest dtype of the tensors.

    In the authors' code, tied projections share storage, but each has its own gradient. Here they are one parameter.
    torchdeq's f has no isolated fixed point, because every sub-layer sees the state through a norm. So torchdeq's
    models unroll 12 applications of f, and the converted models do the same. Between segments, the authors' TrellisNet
    carries only its last state, and uses it in place of all states before it. It carries no inputs. Our TrellisNet
    carries all states and inputs that its convolutions reach. An Attractor model keeps the ids that pad its vocabulary.

    Args:
        state_dict: tensors with their original names. Tied tensors may be present under every name. Unused copies are
            ignored.
        constructor_arguments: arguments of `DEQTransformerLM`, `DEQTrellisNetLM` or `AttractorConfig`, by name. For a
            TrellisNet with a split softmax also `splits`, the argument of its criterion. The tensors of the criterion
            are `criterion.tail_vectors` and `criterion.tail_bias`.
        family: a key of `FAMILIES`.
        config_fields: fields of our configuration that do not change the equilibrium: how it is solved, dropout, token
            ids, `cell_scan`, `max_position_embeddings`, `memory_length` and `use_cache`. They override converted
            fields.

    Raises:
        ValueError: if the family or an argument is unknown; if an argument is missing; if the arguments make no valid
            model; if a field would make another model; if tensors are missing, are left over, or do not have the shape
            that the arguments imply (the message names all of them); if a tensor has numbers that are not finite; or
            if tensors contradict each other or the arguments.
    """
    require_one_of("family", family, FAMILIES)
    base = FAMILIES[family]
    state_dict = _without_prefixes(state_dict)
    try:
        config = base.config(constructor_arguments, state_dict, config_fields)
    except StrictDataclassError as error:
        raise ValueError(f"constructor_arguments do not make a model: {error}") from error
    _refuse_other_models(config_fields)
    tensors = base.parameters(state_dict, config)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite: take another checkpoint.")
    with torch.device("meta"):
        shell = base.model_class(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in shell.named_parameters(remove_duplicate=False)}
    sources = _with_ties(base.sources(config), shell.all_tied_weights_keys, tensors)
    _check(tensors, {name: sources[name] for name in shapes}, shapes, constructor_arguments)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()))
    model = base.model_class(config).to(dtype).eval()
    model.load_state_dict({name: sources[name].read(tensors) for name in shapes})
    return model


def _refuse_other_models(config_fields: dict) -> None:
    """Refuse fields that change what the checkpoint computes.

    Raises:
        ValueError: if there are some. The message names the first one.
    """
    for name in config_fields:
        if not (fits_given_weights(name) or name.endswith("_token_id") or name in FREE_FIELDS):
            raise ValueError(
                f"config_fields: {name} follows from the checkpoint and its constructor arguments: leave it out. Free "
                f"are the fields of the equilibrium, of dropout and of token ids, and {', '.join(FREE_FIELDS)}."
            )


def _without_prefixes(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names without the prefixes of wrappers.

    Raises:
        ValueError: if two names become one, and their tensors differ. The message has both.
    """
    originals: dict[str, str] = {}
    for name, tensor in state_dict.items():
        first = originals.setdefault(_without_prefix(name), name)
        if first != name and not torch.equal(state_dict[first], tensor):
            raise ValueError(
                f"{first} and {name} are one name without the prefixes of wrappers, but their tensors are not equal: "
                "remove one of them."
            )
    return {bare: state_dict[name] for bare, name in originals.items()}


def _without_prefix(name: str) -> str:
    """Return the name of a tensor without the prefixes of wrappers."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name if prefix is None else _without_prefix(name.removeprefix(prefix))


def _with_ties(sources: dict[str, Source], ties: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Source]:
    """Return the sources. A tied parameter without a tensor of its own gets the source of the other one.

    Raises:
        ValueError: if tensors differ that are tied in our model.
    """
    sources = dict(sources)
    for ours, theirs in ties.items():
        if not any(key in tensors for key in sources[ours].keys):
            sources[ours] = sources[theirs]
        if any(key not in tensors for name in (ours, theirs) for key in sources[name].keys):
            continue  # the check of all tensors names it
        if not torch.equal(sources[ours].read(tensors), sources[theirs].read(tensors)):
            raise ValueError(
                f"{sources[ours].keys[0]} and {sources[theirs].keys[0]} differ, but the constructor arguments say that "
                "they are tied: correct the arguments."
            )
    return sources


def _check(tensors, sources: dict[str, Source], shapes: dict[str, tuple], arguments: dict) -> None:
    """Check that every tensor is used, that none is missing, and that all have the shapes that the arguments imply.

    Raises:
        ValueError: if this is not so. The message names all these tensors.
    """
    wanted: dict[str, tuple] = {}
    for name, source in sources.items():
        wanted |= source.shapes(shapes[name])
    problems = [f"missing: {key}" for key in wanted if key not in tensors]
    problems += [f"left over: {key}" for key in tensors if key not in wanted]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, but should be {shape}"
        for key, shape in wanted.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if problems:
        raise ValueError(
            "The state dict does not fit the constructor arguments "
            f"({', '.join(f'{name}={value}' for name, value in arguments.items())}):\n  " + "\n  ".join(problems)
        )
