"""A finished model as a folder that loads where hf_deq is not installed, and the card that says what it is.

    model, tokenizer = load_model("deq-model"), AutoTokenizer.from_pretrained("deq-model")
    record = read_record("deq-model", model.config)
    export_hub_folder(model, "folder", tokenizer, repo_id="user/name", record=record)

The folder holds the modeling code beside the weights, so that Transformers can load it with `trust_remote_code=True`.
The card says what the run recorded (recipe.yaml, metrics.jsonl, and results.json of `scripts/evaluate.py`), and nothing
else: what was not recorded is left out.
"""

import argparse
import copy
import importlib
import json
import math
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_deq import DEQConfig
from .data import BUILT_IN_CORPUS
from .evaluation import solver_settings
from .word_level import known_corpus

TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"
# How a class ends that an Auto class loads, and what the Hub calls its task.
SUFFIXES = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
}
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
}
# Fields of recipe.yaml that belong to the machine it ran on, and those that may name a place there.
MACHINE_FIELDS = ("output_dir", "resume", "report_to")
PLACE_FIELDS = ("corpus", "validation_file", "tokenizer")
# What evaluation measures, in the order of the card, and how the card calls it.
METRICS = {
    "perplexity": "perplexity",
    "word_perplexity": "perplexity per word",
    "bits_per_byte": "bits per byte",
    "loss": "loss (nats per position)",
    "recalled": "share of the symbols recalled",
}
SOLVE = {"num_evaluations": "evaluations of f", "residual": "residual", "converged": "share converged"}
SHAPE = (
    *("hidden_size", "intermediate_size", "embedding_size", "num_attention_heads", "num_hidden_layers"),
    *("kernel_size", "dilation", "vocab_size", "max_position_embeddings", "memory_length", "sliding_window"),
)


@dataclass(frozen=True)
class RunRecord:
    """What a run recorded in its folder; what it did not is empty.

    Attributes:
        recipe: of recipe.yaml, without what only the machine knew that it ran on.
        steps: the last line of metrics.jsonl about training steps.
        cost: its last line, if the run was finished: parameters, tokens, seconds, validation.
        results: rows of results.json, one a setting of the dial.
        evaluation_flags: how `scripts/evaluate.py` was called for them, besides the rows.
    """

    recipe: dict = field(default_factory=dict)
    steps: dict = field(default_factory=dict)
    cost: dict = field(default_factory=dict)
    results: list[dict] = field(default_factory=list)
    evaluation_flags: str = ""


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
    if record is not None and record.recipe:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(record.recipe, sort_keys=False))
    if record is not None and record.results:
        (folder / "results.json").write_text(json.dumps(record.results, indent=1))
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


def read_record(folder: str | Path, config: PreTrainedConfig, evaluation_flags: str = "") -> RunRecord:
    """What the run of a folder recorded.

    Args:
        folder: with recipe.yaml, metrics.jsonl and results.json, as far as there are any.
        config: the model's configuration.
        evaluation_flags: the flags by which `scripts/evaluate.py` was given what results.json was measured on, such as
            "--split test"; not its rows (`--tolerances`, `--budgets`). By default it was called without any.

    Raises:
        ValueError: a file cannot be read, or results.json is not a table of that script, or not one without flags.
    """
    folder = Path(folder)
    recipe = _read(folder / "recipe.yaml", yaml.safe_load) or {}
    lines = _read(folder / "metrics.jsonl", lambda text: [json.loads(line) for line in text.splitlines()]) or []
    steps = next((line for line in reversed(lines) if "loss" in line), {})
    cost = lines[-1] if lines and "seconds" in lines[-1] else {}
    results = _read(folder / "results.json", json.loads) or []
    if not isinstance(results, list) or not all(
        isinstance(row, dict) and METRICS.keys() & row.keys() for row in results
    ):
        raise ValueError(f"{folder / 'results.json'} is not a table that scripts/evaluate.py --output wrote.")
    if not evaluation_flags:
        _check_agreement(results, cost, config)
    return RunRecord(_portable(recipe), steps, cost, results, evaluation_flags)


def make_card(
    model: PreTrainedModel,
    repo_id: str,
    record: RunRecord | None = None,
    license: str = "apache-2.0",
    language: str | None = None,
    has_tokenizer: bool = False,
) -> ModelCard:
    """The card of a model from model_cards/template.md; arguments and errors as in `export_hub_folder`."""
    if not TEMPLATE.is_file():
        raise FileNotFoundError(f"{TEMPLATE} is not there: export from a clone of the repository of hf_deq.")
    record, config = record or RunRecord(), model.config
    auto_class = next(auto for auto, suffix in reversed(SUFFIXES.items()) if type(model).__name__.endswith(suffix))
    command = evaluation_command(record, repo_id.split("/")[-1])
    shape = {name: value for name in SHAPE if (value := getattr(config, name, None)) is not None}
    return ModelCard.from_template(
        _card_data(record, repo_id, PIPELINE_TAGS[auto_class], config, license, language),
        template_path=str(TEMPLATE),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        class_name=type(model).__name__,
        auto_class=auto_class,
        generates=model.can_generate() and has_tokenizer,
        num_parameters=f"{model.num_parameters():,}",
        shape=_markdown_table([{"field": name, "value": value} for name, value in shape.items()]),
        solver=solver_settings(config),
        unrolled=config.gradient == "unrolled",
        corpus=record.recipe.get("corpus"),
        recipe=yaml.safe_dump(record.recipe, sort_keys=False).strip() if record.recipe else None,
        cost=_cost(record),
        steps=record.steps,
        evaluation=command and evaluation_place(record) | {"command": command} | _own_row(record.results, config),
        dial=_dial_table(record.results) if record.results else None,
    )


def evaluation_place(record: RunRecord) -> dict[str, str]:
    """Corpus (or task) and split that results were measured on."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--corpus", default=record.recipe.get("corpus", BUILT_IN_CORPUS))
    flags, _ = parser.parse_known_args(shlex.split(record.evaluation_flags))
    if record.recipe.get("task") == "copy_memory":
        return {"corpus": "copy_memory", "split": "test"}
    return {"corpus": _portable({"corpus": flags.corpus})["corpus"], "split": flags.split}


def evaluation_command(record: RunRecord, name: str) -> str | None:
    """The command that gives these results of the folder `name`, its rows spelt out; `None` if there are none."""
    if not record.results:
        return None
    words = ["python scripts/evaluate.py", name, record.evaluation_flags]
    budgets = [row["solver_max_evaluations"] for row in record.results if row.get("solver_max_evaluations")]
    tolerances = [row["solver_tolerance"] for row in record.results if _is_by_tolerance(row)]
    for flag, values in (("--budgets", budgets), ("--tolerances", tolerances)):
        words += [flag, *(f"{value:g}" for value in values)] if values else []
    return " ".join(word for word in words if word)


def _read(file: Path, parse):
    """What is in a file; `None` if there is none."""
    try:
        return parse(file.read_text()) if file.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _reference(cls: type) -> str:
    """How `auto_map` names a class: its file and its name."""
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"


def _is_local(name: str) -> bool:
    """Whether a corpus or tokenizer is a file or folder, as `load_corpus` has it."""
    return name.startswith((".", "/", "~")) or Path(name).suffix in (".txt", ".text", ".md") or Path(name).exists()


def _portable(recipe: dict) -> dict:
    """A recipe for other machines: local files and folders go by their name alone."""
    places = {name: recipe[name] for name in PLACE_FIELDS if recipe.get(name)}
    named = {name: Path(place).name if _is_local(place) else place for name, place in places.items()}
    return {name: value for name, value in recipe.items() if name not in MACHINE_FIELDS} | named


def _is_by_tolerance(row: dict) -> bool:
    return "solver_tolerance" in row and row["solver_max_evaluations"] is None


def _own_row(results: list[dict], config: PreTrainedConfig) -> dict:
    """The row at the model's own tolerance, or else at the tightest, or else of the largest budget."""
    by_tolerance = [row for row in results if _is_by_tolerance(row)]
    own = [row for row in by_tolerance if row["solver_tolerance"] == config.solver_tolerance]
    if own:
        return own[0]
    if by_tolerance:
        return min(by_tolerance, key=lambda row: row["solver_tolerance"])
    return max(results, key=lambda row: row.get("solver_max_evaluations") or 0, default={})


def _check_agreement(results: list[dict], cost: dict, config: PreTrainedConfig) -> None:
    """Results of unnamed flags must be those of the validation that ended the training: its protocol is the default."""
    own = _own_row(results, config)
    if own.get("solver_tolerance") != config.solver_tolerance:
        return
    for name in ("num_tokens", "perplexity"):
        ours, theirs = own.get(name), cost.get(f"validation_{name}")
        if None not in (ours, theirs) and not math.isclose(ours, theirs, rel_tol=0.01):
            raise ValueError(
                f"results.json has {name} {ours:g}, the validation in metrics.jsonl {theirs:g}: it was written with "
                'flags that it does not name. Say which as evaluation_flags, such as "--split test", or write it anew.'
            )


def _card_data(record, repo_id, pipeline_tag, config, license, language) -> ModelCardData:
    """The metadata, with the row at the model's own tolerance as its results."""
    corpus = record.recipe.get("corpus")
    known = corpus and (corpus == BUILT_IN_CORPUS or known_corpus(corpus, record.recipe.get("corpus_config")))
    on_hub = corpus and "/" in corpus and not _is_local(corpus)
    own, place = _own_row(record.results, config), evaluation_place(record)
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=place["corpus"],
            dataset_name=place["corpus"],
            dataset_split=place["split"],
            metric_type=metric,
            metric_name=name,
            metric_value=round(own[metric], 6),
            metric_args={name: own[name] for name in ("solver_tolerance", "solver_max_evaluations") if own.get(name)},
        )
        for metric, name in METRICS.items()
        if own.get(metric) is not None
    ]
    return ModelCardData(
        license=license,
        language=language or ("en" if known else None),
        datasets=[corpus] if on_hub else None,
        metrics=[result.metric_type for result in results] or None,
        tags=["deep-equilibrium-model", config.model_type],
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _cost(record: RunRecord) -> str | None:
    """What the run took, as a table."""
    cost = record.cost
    rows = {
        "optimizer steps": cost.get("step"),
        "tokens trained on": cost.get("num_tokens"),
        "minutes": "seconds" in cost and f"{cost['seconds'] / 60:.1f}",
        "processes": cost.get("num_processes"),
    }
    return _markdown_table([{"training": name, "": value} for name, value in rows.items() if value]) if cost else None


def _dial_table(results: list[dict]) -> str:
    """Quality against compute, one row a setting."""
    columns = {name: title for name, title in (METRICS | SOLVE).items() if results[0].get(name) is not None}
    if "solver_tolerance" not in results[0]:
        columns = {name: title for name, title in columns.items() if name not in SOLVE}
    rows = [{"dial": _setting(row)} | {title: row[name] for name, title in columns.items()} for row in results]
    return _markdown_table(rows)


def _setting(row: dict) -> str:
    if "solver_tolerance" not in row:
        return "no solver"
    if _is_by_tolerance(row):
        return f"tolerance {row['solver_tolerance']:g}"
    return f"at most {row['solver_max_evaluations']} evaluations"


def _markdown_table(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(_format, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _format(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
