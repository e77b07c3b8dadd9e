"""A finished model as a folder that loads where hf_deq is not installed.

    model, tokenizer = load_model("deq-model"), AutoTokenizer.from_pretrained("deq-model")
    record = read_record("deq-model", model.config)
    export_hub_folder(model, "folder", tokenizer, repo_id="user/name", record=record)

The folder holds the weights, the modeling code and the model's card. Transformers loads it with
`trust_remote_code=True`.
"""

import copy
import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_deq import DEQConfig
from .card import SUFFIXES, make_card
from .record import RunRecord


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
        folder: where to write. It is made if it does not exist.
        tokenizer: is saved beside the model; by default there is none.
        repo_id: the name of the model in the card; by default the name of the folder.
        record: what the card says about the run, see `read_record`; by default nothing.
        license: identifier of the weights' license on the Hub.
        language: ISO 639 code of the text that the model reads; by default `en` for a corpus that is known to be
            English, and otherwise left out.

    Raises:
        ValueError: if the class of the model is not one of this package, or its code imports what cannot travel.
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
        record.save(folder)
    card.save(folder / "README.md")


def find_auto_classes(model: PreTrainedModel) -> dict[str, str]:
    """The `auto_map` of a model: the classes in the model's file that each Auto class loads.

    Raises:
        ValueError: if the class of the model is not among them.
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
        ValueError: if an import does not name a sibling. Only `from .name import ...` can travel.
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


def read_config(folder: str | Path) -> DEQConfig:
    """The configuration of a folder with a model of this package.

    Raises:
        ValueError: if it is not a model folder, or the model is of another package.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is not a model folder: it has no config.json. `hf-deq train` writes one.")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, DEQConfig):
        raise ValueError(
            f"{str(folder)!r} holds a {config.model_type}, a model of Transformers that needs no code of this package: "
            "upload it by its own push_to_hub."
        )
    if not config.architectures:
        raise ValueError(f"the configuration in {str(folder)!r} names no architectures: save it by save_pretrained.")
    return config


def require_empty(name: str, folder: str | Path) -> None:
    """Refuse a folder for output in which something lies: a record of another model would seem to be of the new one.

    Hidden files do not count, such as the lock of a training.

    Raises:
        ValueError: if the folder exists and is not empty. The message gives the name of the argument.
    """
    if Path(folder).exists() and any(not file.name.startswith(".") for file in Path(folder).iterdir()):
        raise ValueError(f"{name} {str(folder)!r} is not empty: choose another folder, or empty it first.")


def _reference(cls: type) -> str:
    """How `auto_map` names a class: its file and its name."""
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
