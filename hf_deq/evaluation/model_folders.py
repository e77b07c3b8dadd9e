"""The model in a folder or Hub repository, of the class that was saved there, and its tokenizer."""

import importlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration_deq import DEQConfig
from ..data import check_at_least


def load_model(folder: str | Path, device: str = "cpu", memory_length: int | None = None, **arguments):
    """Load a model: one of this package by its own class, any other as a causal language model.

    Args:
        folder: of the model, or a Hub repository.
        device: where the model goes.
        memory_length: how many tokens a DEQ-Transformer remembers, if not as configured.
        arguments: others of `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: if `memory_length` is negative, or no field of this model's configuration; or if the weights are
            damaged, or the device is not available.
        OSError: if the folder or repository has no model.
    """
    config = AutoConfig.from_pretrained(folder)
    if memory_length is not None:
        if not hasattr(config, "memory_length"):
            raise ValueError(f"memory_length: a {config.model_type} has no such field; leave it out.")
        check_at_least(0, memory_length=memory_length)
        config.memory_length = memory_length
    try:
        model = _class_of(config).from_pretrained(folder, config=config, **arguments)
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {str(folder)!r} are damaged ({error}): save or download them again."
        ) from error
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch raises either, depending on the device
        raise ValueError(f"device {device!r} is not available here ({str(error).splitlines()[0]}).") from error


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        ValueError: if the folder or repository has none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"{str(folder)!r} has no tokenizer that can be loaded (models that learned no text have none): {error}"
        ) from error


def check_remembers(config: PreTrainedConfig) -> None:
    """Refuse to carry the memory of a model that has none.

    Raises:
        ValueError: if it has none. The message says what to do.
    """
    if getattr(config, "remembers", False):
        return
    has_length = isinstance(config, DEQConfig) and hasattr(config, "memory_length")
    remedy = "set memory_length, say to the length of a segment" if has_length else "set carry_memory to false"
    raise ValueError(f"carry_memory needs a model that remembers, and this {config.model_type} does not: {remedy}.")


def check_length(config: PreTrainedConfig, name: str, length: int, remedy: str = "raise {field} to {length}") -> None:
    """Refuse sequences that are longer than an explicit model is meant for.

    Args:
        config: of the model. Models of this package read any length.
        name: of the sequences, for the message.
        length: their tokens.
        remedy: what to do. It may have the names `field`, `length` and `positions` in braces.

    Raises:
        ValueError: if they are longer.
    """
    field = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    positions = None if isinstance(config, DEQConfig) else getattr(config, field, None)
    if positions is not None and length > positions:
        remedy = remedy.format(field=field, length=length, positions=positions)
        raise ValueError(f"{field}={positions} must cover {name} ({length}): {remedy}.")


def check_positions(config: PreTrainedConfig, name: str, length: int, remedy: str) -> None:
    """Refuse sequences that an explicit model cannot read. A table of positions has an end, rotary positions have none.

    Args and errors are those of `check_length`.
    """
    if getattr(config, "rope_parameters", None) is None:
        check_length(config, name, length, remedy)


def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that are not finite: no token can be drawn from their probabilities.

    Raises:
        ValueError: if there are such weights. The message names one.
    """
    names = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if names:
        raise ValueError(
            f"{names[0]} is not finite, perhaps because the training diverged: take an earlier checkpoint."
        )


def _class_of(config) -> type[PreTrainedModel] | type[AutoModelForCausalLM]:
    if not isinstance(config, DEQConfig) or not config.architectures:
        return AutoModelForCausalLM
    if not isinstance(config.architectures, list):
        raise ValueError(f"config.json: architectures must be a list of class names, got {config.architectures!r}.")
    modeling, name = importlib.import_module(f"hf_deq.modeling_{config.model_type}"), config.architectures[0]
    if not hasattr(modeling, name):
        raise ValueError(f"config.json names the architecture {name!r}, which is no {config.model_type} of hf_deq.")
    return getattr(modeling, name)
