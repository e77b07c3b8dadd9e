"""A finished model as a folder that loads where hf_deq is not installed.

    model, tokenizer = load_model("deq-model"), AutoTokenizer.from_pretrained("deq-model")
    record = read_record("deq-model", model.config)
    export_hub_folder(model, "folder", tokenizer, repo_id="user/name", record=record)

The folder holds the modeling code beside the weights, so that Transformers can load it with `trust_remote_code=True`,
and the model's card.
"""

import copy
import importlib
import json
import shutil
import sys
from pathlib import Path

import yaml
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_deq import DEQConfig
from .model_card import SUFFIXES, RunRecord, make_card


def export_hub_folder(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    repo_id: str | None = None,
    record: RunRecord | None = None,
    license: str = "apache-2.0",
    language: str | None = None,
) -> None:
    """Write a folder that `from_pretrained(folder, trust_remote_code=True)` loads without hf_deq.

    Args:
        model: any model of this package.
        folder: where to; made if it is not there.
        tokenizer: saved beside the model; by default there is none.
        repo_id: what the card calls the model, by default the folder's name.
        record: what the card tells of the run (`read_record`); by default nothing.
        license: identifier of the weights' license on the Hub.
        language: ISO 639 code of what the model reads; by default English for the corpora known to be English, and
            otherwise left out.

    Raises:
        ValueError: the model's class is not one of this package, or its code imports what cannot travel.
        FileNotFoundError: the template of the card is not there.
    """
    folder = Path(folder)
    auto_classes, files = find_auto_classes(model), code_files(model)
    card = make_card(model, repo_id or folder.name, record, license, language, has_tokenizer=tokenizer is not None)
    model.save_pretrained(folder)  # also writes dtype and architectures into the configuration
    config = copy.deepcopy(model.config)  # the model at hand keeps its own
    config.auto_map = auto_classes
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if record is not None:
        _save_record(record, folder)
    card.save(folder / "README.md")


def find_auto_classes(model: PreTrainedModel) -> dict[str, str]:
    """The `auto_map` of a model: what each Auto class loads, of those that the model's file defines.

    Raises:
        ValueError: the model's class is not among them.
    """
    module, config_class = sys.modules[type(model).__module__], type(model.config)
    family = config_class.__name__.removesuffix("Config")
    classes = {auto: getattr(module, family + suffix, None) for auto, suffix in SUFFIXES.items()}
    classes = {auto: found for auto, found in classes.items() if getattr(found, "__module__", "") == module.__name__}
    if not hasattr(model.config, "solver_scope") or type(model) not in classes.values():
        raise ValueError(
            f"{type(model).__name__} is not a model of hf_deq, whose code could travel with it: use its own "
            "save_pretrained or push_to_hub."
        )
    return {"AutoConfig": _reference(config_class)} | {auto: _reference(found) for auto, found in classes.items()}


def code_files(model: PreTrainedModel) -> list[Path]:
    """The file of a model and every sibling that it needs, as Transformers will look for them.

    Raises:
        ValueError: an import names no sibling: only `from .name import ...` can travel.
    """
    file = sys.modules[type(model).__module__].__file__
    files = sorted({Path(file), *map(Path, get_relative_import_files(file))})
    for needed in files:
        if not needed.is_file():
            raise ValueError(
                f"{needed.name} is imported by the code of {type(model).__name__}, but is no file beside it: a model's "
                "code travels flat, so import siblings only (from .name import ...)."
            )
    return files


def load_model(folder: str | Path) -> PreTrainedModel:
    """The model of a folder, of the class that was saved there.

    Raises:
        ValueError, OSError: as for `read_config`; the folder has no weights.
    """
    config = read_config(folder)
    modeling = importlib.import_module(f".modeling_{config.model_type}", __package__)
    return getattr(modeling, config.architectures[0]).from_pretrained(folder)


def read_config(folder: str | Path) -> DEQConfig:
    """The configuration of a folder, if a model of this package is in it.

    Raises:
        ValueError: it is not a model folder, or one of another package's model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is not a model folder: it has no config.json. scripts/train.py writes one.")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, DEQConfig) or not config.architectures:
        raise ValueError(
            f"{str(folder)!r} holds a {config.model_type} that hf_deq did not save: use the model's own push_to_hub."
        )
    return config


def _save_record(record: RunRecord, folder: Path) -> None:
    """What the card is made of, beside it."""
    if record.recipe:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(record.recipe, sort_keys=False))
    if record.results:
        results = {
            "arguments": record.evaluation,
            "measured": record.measured,
            "spectral_radius": record.spectral_radius,
            "rows": record.results,
        }
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    for figure in record.figures:
        shutil.copyfile(figure, folder / figure.name)


def _reference(cls: type) -> str:
    """How `auto_map` names a class: its file and its name."""
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
