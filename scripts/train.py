"""Train a deep equilibrium language model.

    accelerate launch scripts/train.py                                          # the built-in corpus, minutes on a CPU
    accelerate launch scripts/train.py model_cards/deq-transformer-small/recipe.yaml --max_steps 500
    accelerate launch scripts/train.py --corpus my_text.txt --hidden_size 256

A recipe is a YAML file of the same names as the flags; flags win over the recipe. Every field of
the model's configuration is a flag too (`--help` lists them all).
"""

import argparse
import os
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import get_args

# One process, few cores: tokenizer threads next to data loading only produce warnings.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig

import hf_deq  # noqa: F401  registers the model types
from hf_deq.training import Interrupted, train
from hf_deq.training_arguments import DataArguments, TrainingArguments

DEFAULT_RECIPE = Path(__file__).parents[1] / "model_cards" / "deq-transformer-tiny" / "recipe.yaml"


def model_arguments(model_type: str) -> type:
    """A dataclass with a flag for every field of a model type's configuration; unset ones keep their default."""
    config_class = type(AutoConfig.for_model(model_type))
    flags = []
    for config_field in fields(config_class):
        kind = flag_type(config_field.type)
        from_elsewhere = config_field.name in PreTrainedConfig.__dataclass_fields__ or "token_id" in config_field.name
        if kind is not None and not from_elsewhere:
            help_text = f"{config_class.__name__}.{config_field.name}, default {config_field.default}."
            flags.append((config_field.name, kind | None, field(default=None, metadata={"help": help_text})))
    return make_dataclass("ModelArguments", flags)


def flag_type(annotation) -> type | None:
    """The widest of the plain types in an annotation; `None` if it has a structure that a flag cannot spell."""
    kinds = set(get_args(annotation) or (annotation,)) - {type(None)}
    if not kinds <= {bool, float, int, str}:
        return None
    return next(kind for kind in (str, float, int, bool) if kind in kinds)


def parse(arguments: list[str]) -> tuple[DataArguments, TrainingArguments, dict, str]:
    """Recipe and flags to the arguments of `train`."""
    recipe_file = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
    if not recipe_file.is_file():
        raise ValueError(
            f"there is no recipe {str(recipe_file)!r}; those of this repository are model_cards/*/recipe.yaml."
        )
    recipe = yaml.safe_load(recipe_file.read_text()) or {}
    recipe.pop("corpus_fingerprint", None)  # a saved run's recipe says what its corpus was; nothing can be asked of it
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--model_type", default=recipe.pop("model_type", "deq_transformer"))
    chosen, flags = first.parse_known_args(arguments)

    parser = HfArgumentParser(
        (DataArguments, TrainingArguments, model_arguments(chosen.model_type)),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    unknown = sorted(set(recipe) - {action.dest for action in parser._actions})
    if unknown:
        raise ValueError(f"{recipe_file}: unknown names {unknown}; see --help for those that exist.")
    parser.set_defaults(**recipe)
    data, training, model = parser.parse_args_into_dataclasses(flags)
    model_fields = {name: value for name, value in vars(model).items() if value is not None}
    return data, training, model_fields, chosen.model_type


if __name__ == "__main__":
    try:
        train(*parse(sys.argv[1:]))
    except Interrupted as interrupted:
        print(f"\n{interrupted}")
        sys.exit(130)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
