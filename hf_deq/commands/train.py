"""Train a deep equilibrium language model.

    hf-deq train                                               # the built-in corpus, minutes on a CPU
    hf-deq train --model_type deq_trellisnet                   # the same with a DEQ-TrellisNet
    hf-deq train --task copy_memory                            # the copy memory task
    hf-deq train --model_type gpt2 --n_embd 192 --n_layer 4 --n_head 6     # an explicit baseline
    hf-deq train deq-transformer-small --weight_decay 0.1      # a recipe of this package, or a file of your own
    hf-deq train --corpus my_text.txt --hidden_size 256
    hf-deq train --init_from my-model --corpus my_text.txt     # go on from trained weights
    accelerate launch -m hf_deq.training ...                   # the same with several processes or GPUs
    accelerate launch scripts/train.py ...                     # the same in a clone

A recipe is a YAML file of the same names as the flags. Flags win over the recipe. Without a recipe, the smallest one
for the model type and the task is taken. Every field of the model's configuration is a flag too (`--help` lists them).
An explicit baseline takes the same recipe, by default that of the DEQ-Transformer, so that it sees the same tokens,
optimizer and schedule. Names that only the equilibrium has are left out. What the recipe does not name, such as the
sizes of GPT-2, has the default of its own configuration. With --init_from, model type, sizes and tokenizer are those of
the folder.
"""

import argparse
import os
import sys
from dataclasses import field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig

from ..configuration_deq import DEQConfig, require_one_of
from ..data import find_recipe, parse_recipe
from ..tasks import TASKS, LanguageModeling
from ..training import SOLVER_ARGUMENTS, Interrupted, RunArguments, train
from . import check_folder, first_argument, with_errors_in_a_line

DEFAULT_MODEL_TYPE = "deq_transformer"
EXPLICIT_MODEL_TYPES = ["gpt2", "llama"]  # of Transformers, to compare with
KINDS = {int: "a whole number", float: "a number"}  # of flags, as a message says it


def main() -> None:
    """Train as the command line says."""
    # With one process and few cores, tokenizer threads next to data loading only produce warnings.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with_errors_in_a_line(lambda: train(*parse(sys.argv[1:])))
    except Interrupted as interrupted:
        print(f"\n{interrupted}")
        sys.exit(130)


def parse(arguments: list[str]) -> tuple[object, RunArguments, dict, str]:
    """Turn recipe and flags into the arguments of `train`. A flag counts more than the recipe.

    The model type and the task decide which other flags there are, so they are read first.

    Raises:
        ValueError: if there is no such recipe, or it has names that do not exist.
    """
    name = first_argument(arguments)
    recipe = None if name is None else parse_recipe(find_recipe(name))
    start = initial_folder(arguments, recipe or {})
    first = first_parser(recipe or {}, start)
    chosen, flags = first.parse_known_args(arguments if name is None else arguments[1:])
    require_one_of("task", chosen.task, TASKS)  # argparse checks flags, but not what comes from the recipe
    if start is None:
        require_one_of("model_type", chosen.model_type, model_types())
    parser = HfArgumentParser(
        (TASKS[chosen.task].arguments, RunArguments, model_arguments(chosen.model_type)),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[first],
    )
    if recipe is None:
        recipe = default_recipe(chosen.model_type, chosen.task, start)
    values = read_recipe_for(parser, recipe, chosen.model_type, name or "the default recipe")
    parser.set_defaults(**(values | vars(chosen)))
    task, run, model, _ = parser.parse_args_into_dataclasses(flags)
    model_fields = {name: value for name, value in vars(model).items() if value is not None}
    return task, run, model_fields, chosen.model_type


def first_parser(recipe: dict, start: str | None) -> argparse.ArgumentParser:
    """The parser of model type and task. Defaults come from the recipe, or from the folder to start from."""
    parser = argparse.ArgumentParser(add_help=False)
    usual_type = DEFAULT_MODEL_TYPE if start is None else initial_model_type(start)
    parser.add_argument("--model_type", default=recipe.get("model_type", usual_type), choices=model_types())
    parser.add_argument("--task", default=recipe.get("task", LanguageModeling.name), choices=TASKS)
    return parser


def model_types() -> list[str]:
    """The model types that can be trained from new weights."""
    return [config_class.model_type for config_class in DEQConfig.__subclasses__()] + EXPLICIT_MODEL_TYPES


def read_recipe_for(parser: argparse.ArgumentParser, recipe: dict, model_type: str, source: str) -> dict:
    """The values of a recipe for the flags of a parser.

    Raises:
        ValueError: if the recipe has names that are no flags, or as in `read_values`.
    """
    names = {action.dest for action in parser._actions}
    if model_type in EXPLICIT_MODEL_TYPES:
        recipe = without_equilibrium(recipe, names)
    # A saved run records the fingerprint of its corpus; it is not an argument.
    recipe = {name: value for name, value in recipe.items() if name != "corpus_fingerprint"}
    if unknown := sorted(recipe.keys() - names):
        raise ValueError(f"{source}: unknown names {unknown}; see --help for those that exist.")
    return read_values(recipe, parser, source)


def read_values(recipe: dict, parser: argparse.ArgumentParser, source: str) -> dict:
    """The values of a recipe, as the flags of the same names would read them.

    Raises:
        ValueError: if there is a value in place of a list, a list in place of a value, a name without a value, or a
            value of another kind. The message names it.
    """
    values = {}
    for action in (action for action in parser._actions if action.dest in recipe):
        value, wants_list = recipe[action.dest], takes_list(action)
        if value is None and action.default is not None:
            raise ValueError(f"{source}: {action.dest} has no value. Write one, or leave the name out.")
        if value is not None and isinstance(value, list) != wants_list:
            raise ValueError(
                f"{source}: {action.dest} must be {'a list' if wants_list else 'one value'}, got {value!r}."
            )
        read = partial(read_value, action=action, source=source)
        values[action.dest] = None if value is None else list(map(read, value)) if wants_list else read(value)
    return values


def takes_list(action: argparse.Action) -> bool:
    """Whether a flag takes several words."""
    return action.nargs in ("+", "*")


def read_value(value, action: argparse.Action, source: str):
    """A single value of a recipe, as a flag would read its text.

    Raises:
        ValueError: if it is of another kind. The message names the kind.
    """
    is_number = action.type in (int, float)
    try:
        if isinstance(value, dict) or (is_number and isinstance(value, bool)):
            raise TypeError
        return action.type(str(value)) if action.type else value
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = KINDS.get(action.type, "text" if action.type in (None, str) else "true or false")
        kind = f"a list, each of them {kind}" if takes_list(action) else kind
        raise ValueError(f"{source}: {action.dest} must be {kind}, got {value!r}.") from error


def initial_folder(arguments: list[str], recipe: dict) -> str | None:
    """The folder that training starts from; `None` to start from new weights.

    Raises:
        ValueError: if it is a path, and there is no such folder.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--init_from", default=recipe.get("init_from"))
    folder = parser.parse_known_args(arguments)[0].init_from
    if folder is None:
        return None
    check_folder(str(folder), "init_from")  # in a recipe, the name may look like a number
    return str(folder)


def initial_model_type(folder: str) -> str:
    """The type of the model that training starts from.

    Raises:
        ValueError: if there is no such folder here, and the Hub has no such model, or cannot be reached.
    """
    try:
        return AutoConfig.from_pretrained(folder).model_type
    except OSError as error:
        if Path(folder).is_dir():
            raise
        raise ValueError(f"init_from: there is no folder {folder!r} here, and as a name on the Hub: {error}") from error


def model_arguments(model_type: str) -> type:
    """Make a dataclass with a flag for every field of a model type's configuration; `None` keeps the default."""
    config_class = type(AutoConfig.for_model(model_type))
    flags = []
    for config_field in fields(config_class):
        kind = flag_type(config_field.type)
        from_elsewhere = config_field.name in PreTrainedConfig.__dataclass_fields__ or "token_id" in config_field.name
        if kind is not None and not from_elsewhere:
            help_text = f"{config_class.__name__}.{config_field.name}, default {config_field.default}."
            flags.append((config_field.name, kind | None, field(default=None, metadata={"help": help_text})))
        elif config_field.name == "rope_parameters":  # a dictionary; its usual entry is a flag
            help_text = "Base of the angles of rotary positions; default: that of the model type."
            flags.append(("rope_theta", float | None, field(default=None, metadata={"help": help_text})))
    return make_dataclass("ModelArguments", flags)


def flag_type(annotation) -> type | None:
    """The widest of the plain types in an annotation; `None` if a flag cannot express its structure."""
    kinds = set(get_args(annotation) or (annotation,)) - {type(None)}
    if kinds == {list[int]}:
        return list[int]
    if not kinds <= {bool, float, int, str}:
        return None
    return next(kind for kind in (str, float, int, bool) if kind in kinds)


def default_recipe(model_type: str, task: str, start: str | None) -> dict:
    """The smallest recipe for a model type and a task; for an explicit model that of the default model type.

    If training starts from the weights of a folder, this folder says what the model is, and the recipe how to train it.
    """
    trained_as = DEFAULT_MODEL_TYPE if model_type in EXPLICIT_MODEL_TYPES else model_type
    recipe = parse_recipe(find_recipe(f"{trained_as.replace('_', '-')}-{TASKS[task].recipe}"))
    of_the_model = set() if start is None else {one.name for one in fields(model_arguments(model_type))}
    return {name: value for name, value in recipe.items() if name not in of_the_model}


def without_equilibrium(recipe: dict, names: set[str]) -> dict:
    """The recipe of an equilibrium for an explicit model: without names that only the equilibrium has."""
    model_type = recipe.get("model_type", DEFAULT_MODEL_TYPE)
    if model_type in EXPLICIT_MODEL_TYPES:  # it was written for an explicit model, and is checked as it is
        return recipe
    of_the_model = {one.name for one in fields(model_arguments(model_type))}
    left_out = (of_the_model - names) | set(SOLVER_ARGUMENTS)
    return {name: value for name, value in recipe.items() if name not in left_out}


if __name__ == "__main__":
    main()
