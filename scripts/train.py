"""Train a deep equilibrium language model.

    accelerate launch scripts/train.py                                          # the built-in corpus, minutes on a CPU
    accelerate launch scripts/train.py --model_type deq_trellisnet              # the same with a DEQ-TrellisNet
    accelerate launch scripts/train.py --task copy_memory                       # the copy memory task
    accelerate launch scripts/train.py --model_type gpt2 --n_embd 192 --n_layer 4 --n_head 6   # an explicit baseline
    accelerate launch scripts/train.py model_cards/deq-transformer-small/recipe.yaml --max_steps 500
    accelerate launch scripts/train.py --corpus my_text.txt --hidden_size 256

A recipe is a YAML file of the same names as the flags; flags win over the recipe. Without one, the smallest
of model_cards/ for the model type and the task is taken. Every field of the model's configuration is a
flag too (`--help` lists them all). An explicit baseline takes the recipe of the DEQ-Transformer, so that it sees the
same tokens, optimizer and schedule, but for what it has no name for; its size and its dropout are flags, with the
defaults of its own configuration.
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

import hf_deq
from hf_deq.training import Interrupted, train
from hf_deq.training_arguments import TASKS, TrainingArguments
from hf_deq.training_models import SOLVER_ARGUMENTS

MODEL_CARDS = Path(__file__).parents[1] / "model_cards"
EXPLICIT_MODEL_TYPES = ["gpt2"]  # what to compare with; transformers' own
DEFAULT_RECIPES = {"language_modeling": "tiny", "copy_memory": "copy-memory"}


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
    if kinds == {list[int]}:
        return list[int]
    if not kinds <= {bool, float, int, str}:
        return None
    return next(kind for kind in (str, float, int, bool) if kind in kinds)


def parse(arguments: list[str]) -> tuple[object, TrainingArguments, dict, str]:
    """Recipe and flags to the arguments of `train`."""
    file = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else None
    recipe = {} if file is None else read_recipe(file)
    first = argparse.ArgumentParser(add_help=False)
    model_types = [config_class.model_type for config_class in hf_deq.DEQConfig.__subclasses__()]
    model_types += EXPLICIT_MODEL_TYPES
    first.add_argument("--model_type", default=recipe.get("model_type", model_types[0]), choices=model_types)
    first.add_argument("--task", default=recipe.get("task", "language_modeling"), choices=TASKS)
    chosen, flags = first.parse_known_args(arguments)
    parser = HfArgumentParser(
        (TASKS[chosen.task], TrainingArguments, model_arguments(chosen.model_type)),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[first],
    )
    names = {action.dest for action in parser._actions}
    if file is None:
        recipe = default_recipe(chosen.model_type, chosen.task, names)
    unknown = sorted(set(recipe) - names)
    if unknown:
        raise ValueError(f"{file or 'the default recipe'}: unknown names {unknown}; see --help for those that exist.")
    parser.set_defaults(**(recipe | vars(chosen)))
    data, training, model, _ = parser.parse_args_into_dataclasses(flags)
    model_fields = {name: value for name, value in vars(model).items() if value is not None}
    return data, training, model_fields, chosen.model_type


def default_recipe(model_type: str, task: str, names: set[str]) -> dict:
    """The smallest recipe for a model type and a task; for an explicit model what it understands of another's."""
    if model_type not in EXPLICIT_MODEL_TYPES:
        return read_recipe(MODEL_CARDS / f"{model_type.replace('_', '-')}-{DEFAULT_RECIPES[task]}" / "recipe.yaml")
    recipe = default_recipe("deq_transformer", task, names)
    return {name: value for name, value in recipe.items() if name in names.difference(SOLVER_ARGUMENTS)}


def read_recipe(file: Path) -> dict:
    """The names and values of a recipe."""
    if not file.is_file():
        raise ValueError(f"there is no recipe {str(file)!r}; those of this repository are model_cards/*/recipe.yaml.")
    recipe = yaml.safe_load(file.read_text()) or {}
    recipe.pop("corpus_fingerprint", None)  # a saved run's recipe says what its corpus was; nothing can be asked of it
    return recipe


if __name__ == "__main__":
    try:
        train(*parse(sys.argv[1:]))
    except Interrupted as interrupted:
        print(f"\n{interrupted}")
        sys.exit(130)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
