"""The card that says what a model is: recipe, cost, evaluation and convergence, as the run recorded them.

    record = read_record("deq-model", model.config)
    make_card(model, "user/name", record).save("README.md")

The card says what is in recipe.yaml, metrics.jsonl, results.json of `scripts/evaluate.py` and the figures of
`scripts/plot_convergence.py`, and nothing else: what was not recorded is left out.
"""

import json
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from .data import BUILT_IN_CORPUS
from .evaluation import solver_settings
from .training_log import parse_metrics
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
PLACE_FIELDS = ("corpus", "validation_file", "tokenizer", "others", "metrics")
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
FIGURES = {
    "dial": "Perplexity against tolerance and budget",
    "residuals": "Relative residual against evaluations of f",
    "training": "Evaluations of f over training",
    "memory": "Bytes that a training step keeps for backward",
    "text": "Evaluations of f per token",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run recorded in its folder; what it did not is empty.

    Attributes:
        recipe: of recipe.yaml, without what only the machine knew that it ran on.
        steps: the last line of metrics.jsonl about training steps.
        cost: its last line, if the run was finished: parameters, tokens, seconds, validation.
        results: rows of results.json, one a setting of the dial.
        evaluation: arguments of `scripts/evaluate.py` that gave them, without places of the machine.
        measured: what they were measured on, and how, in words.
        spectral_radius: of the Jacobian of f at the equilibrium, as the same script measured it.
        figures: those of `scripts/plot_convergence.py` in the folder, with the arguments that it had for each.
    """

    recipe: dict = field(default_factory=dict)
    steps: dict = field(default_factory=dict)
    cost: dict = field(default_factory=dict)
    results: list[dict] = field(default_factory=list)
    evaluation: dict = field(default_factory=dict)
    measured: str = ""
    spectral_radius: float | None = None
    figures: dict[Path, dict] = field(default_factory=dict)


def read_record(folder: str | Path, config: PreTrainedConfig) -> RunRecord:
    """What the run of a folder recorded.

    Args:
        folder: with recipe.yaml, metrics.jsonl, results.json and figures, as far as there are any.
        config: the model's configuration.

    Raises:
        ValueError: a file cannot be read, or results.json is not one of `scripts/evaluate.py`, or of another model.
    """
    folder = Path(folder)
    recipe = _read(folder / "recipe.yaml", yaml.safe_load) or {}
    lines = _read(folder / "metrics.jsonl", parse_metrics) or []
    steps = next((line for line in reversed(lines) if "loss" in line), {})
    cost = lines[-1] if lines and "seconds" in lines[-1] else {}
    results = _read(folder / "results.json", _parse_results) or {"arguments": {}, "measured": "", "rows": []}
    if results["arguments"].keys() <= {"budgets", "tolerances"}:
        _check_agreement(results["rows"], cost, config)
    return RunRecord(
        recipe=_portable(recipe),
        steps=steps,
        cost=cost,
        results=results["rows"],
        evaluation=_portable(results["arguments"]),
        measured=results["measured"],
        spectral_radius=results.get("spectral_radius"),
        figures=_read_figures(folder),
    )


def make_card(
    model: PreTrainedModel,
    repo_id: str,
    record: RunRecord | None = None,
    license: str = "apache-2.0",
    language: str | None = None,
    has_tokenizer: bool = False,
) -> ModelCard:
    """The card of a model from model_cards/template.md; arguments and errors as in `hub.export_hub_folder`."""
    if not TEMPLATE.is_file():
        raise FileNotFoundError(f"{TEMPLATE} is not there: export from a clone of the repository of hf_deq.")
    record, config = record or RunRecord(), model.config
    auto_class = next(auto for auto, suffix in reversed(SUFFIXES.items()) if type(model).__name__.endswith(suffix))
    name = repo_id.split("/")[-1]
    command = {"command": script_command("evaluate", name, record.evaluation), "how": record.measured}
    figures = [
        {
            "file": file.name,
            "caption": FIGURES[file.stem],
            "command": script_command("plot_convergence", name, arguments),
        }
        for file, arguments in record.figures.items()
    ]
    shape = {name: value for name in SHAPE if (value := getattr(config, name, None)) is not None}
    return ModelCard.from_template(
        _card_data(record, repo_id, PIPELINE_TAGS[auto_class], config, license, language),
        template_path=str(TEMPLATE),
        name=name,
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
        evaluation=record.results and _own_row(record.results, config) | evaluation_place(record) | command,
        dial=_dial_table(record.results) if record.results else None,
        spectral_radius=record.spectral_radius,
        figures=figures,
    )


def evaluation_place(record: RunRecord) -> dict:
    """Corpus (or task) and split that results were measured on, and whether it is a file or folder of one's own."""
    if record.recipe.get("task") == "copy_memory":
        return {"corpus": "copy_memory", "split": "test", "is_local": False}
    corpus = record.evaluation.get("corpus", record.recipe.get("corpus", BUILT_IN_CORPUS))
    return {
        "corpus": corpus,
        "split": record.evaluation.get("split", "validation"),
        "is_local": corpus != BUILT_IN_CORPUS and "/" not in corpus,
    }


def script_command(script: str, name: str, arguments: dict) -> str:
    """The command that gives what one of the scripts has made of the folder `name` by these arguments."""
    words = ["python", f"scripts/{script}.py", name]
    for argument, value in arguments.items():
        values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
        words += [f"--{argument}", *map(str, values)]
    return shlex.join(words)


def _read(file: Path, parse):
    """What is in a file; `None` if there is none."""
    try:
        return parse(file.read_text()) if file.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _read_figures(folder: Path) -> dict[Path, dict]:
    """The figures of which the numbers are there as well, with the arguments that gave them."""
    figures = {}
    for name in FIGURES:
        numbers = _read(folder / f"{name}.json", json.loads)
        if numbers and "arguments" in numbers and (folder / f"{name}.png").is_file():
            figures[folder / f"{name}.png"] = _portable(numbers["arguments"])
    return figures


def _parse_results(text: str) -> dict:
    results, kinds = json.loads(text), {"arguments": dict, "measured": str, "rows": list}
    if isinstance(results, list):
        raise ValueError("it has rows alone, not the arguments that gave them: write it anew by scripts/evaluate.py.")
    is_ours = isinstance(results, dict) and all(isinstance(results.get(name), kind) for name, kind in kinds.items())
    if not is_ours or not all(isinstance(row, dict) and METRICS.keys() & row.keys() for row in results["rows"]):
        raise ValueError("scripts/evaluate.py --output did not write it.")
    return results


def _is_local(name: str) -> bool:
    """Whether a corpus or tokenizer is a file or folder, as `load_corpus` has it."""
    return name.startswith((".", "/", "~")) or Path(name).suffix in (".txt", ".text", ".md") or Path(name).exists()


def _name_of(place: str | list[str]) -> str | list[str]:
    if isinstance(place, list):
        return [_name_of(one) for one in place]
    return Path(place).name if _is_local(place) else place


def _portable(recipe: dict) -> dict:
    """A recipe for other machines: local files and folders go by their name alone."""
    places = {name: recipe[name] for name in PLACE_FIELDS if recipe.get(name)}
    kept = {name: value for name, value in recipe.items() if name not in MACHINE_FIELDS}
    return kept | {name: _name_of(place) for name, place in places.items()}


def _is_by_tolerance(row: dict) -> bool:
    return "solver_tolerance" in row and row["solver_max_evaluations"] is None


def _own_row(results: list[dict], config: PreTrainedConfig) -> dict:
    """The row at the model's own tolerance, or else at the tightest, or else of the largest budget.

    Of a model that is unrolled, the row of its own number of applications.
    """
    if config.gradient == "unrolled":
        return next((row for row in results if row.get("solver_max_evaluations") == config.solver_max_evaluations), {})
    by_tolerance = [row for row in results if _is_by_tolerance(row)]
    own = [row for row in by_tolerance if row["solver_tolerance"] == config.solver_tolerance]
    if own:
        return own[0]
    if by_tolerance:
        return min(by_tolerance, key=lambda row: row["solver_tolerance"])
    return max(results, key=lambda row: row.get("solver_max_evaluations") or 0, default={})


def _check_agreement(results: list[dict], cost: dict, config: PreTrainedConfig) -> None:
    """Results of the default protocol must be those of the validation that ended the training, which is by the same."""
    own = _own_row(results, config)
    if config.gradient != "unrolled" and own.get("solver_tolerance") != config.solver_tolerance:
        return
    for name in ("num_tokens", "perplexity"):
        ours, theirs = own.get(name), cost.get(f"validation_{name}")
        if None not in (ours, theirs) and not math.isclose(ours, theirs, rel_tol=0.01):
            raise ValueError(
                f"results.json has {name} {ours:g}, the validation in metrics.jsonl {theirs:g}: it is of another model "
                "or text than this run's. Write it anew by scripts/evaluate.py --output."
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
