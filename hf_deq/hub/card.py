"""The card of a model: recipe, cost, evaluation and convergence, as the run recorded them.

    make_card(model, "user/name", read_record("deq-model", model.config)).save("README.md")

The card says what is in the record and nothing else. What was not recorded is left out.
"""

import shlex
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..data import BUILT_IN_CORPORA, is_local, known_corpus
from ..evaluation import FIGURES, METRICS, dial_label, solver_settings
from ..tasks import TASKS
from .record import OF_THE_EQUILIBRIUM, RunRecord

TEMPLATE = Path(__file__).with_name("template.md")
# How the class ends that an Auto class loads, and how the Hub calls its task.
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
SOLVE = {"num_evaluations": "evaluations of f", "residual": "residual", "converged": "share converged"}
SHAPE = (
    *("hidden_size", "intermediate_size", "embedding_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_hidden_layers", "num_prelude_layers", "kernel_size", "dilation", "vocab_size", "max_position_embeddings"),
    *("memory_length", "sliding_window"),
)


def make_card(
    model: PreTrainedModel,
    repo_id: str,
    record: RunRecord | None = None,
    license: str = "apache-2.0",
    language: str | None = None,
    has_tokenizer: bool = False,
) -> ModelCard:
    """Make the card of a model from template.md; arguments and errors as in `export_hub_folder`."""
    record, config = record or RunRecord(), model.config
    auto_class = next(auto for auto, suffix in reversed(SUFFIXES.items()) if type(model).__name__.endswith(suffix))
    name = repo_id.split("/")[-1]
    place = {"corpus": record.dataset, "split": record.split, "is_local": _is_own_file(record.dataset)}
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
    data = _card_data(record, repo_id, PIPELINE_TAGS[auto_class], config, license, language)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        class_name=type(model).__name__,
        auto_class=auto_class,
        generates=model.can_generate() and has_tokenizer,
        num_parameters=f"{model.num_parameters():,}",
        shape=markdown_table([{"field": name, "value": value} for name, value in shape.items()]),
        solver=solver_settings(config),
        unrolled=config.gradient == "unrolled",
        corpus=record.recipe.get("corpus"),
        recipe=yaml.safe_dump(record.recipe, sort_keys=False).strip() if record.recipe else None,
        cost=_cost(record),
        steps=record.steps,
        evaluation=record.results and record.own_row(config) | place | command,
        has_results=bool(data.eval_results),
        dial=_dial_table(record.results) if record.results else None,
        **{name: getattr(record, name) for name in OF_THE_EQUILIBRIUM},
        figures=figures,
    )


def script_command(script: str, name: str, arguments: dict) -> str:
    """The command by which a script made something from the folder `name` with these arguments."""
    words = ["python", f"scripts/{script}.py", name]
    for argument, value in arguments.items():
        values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
        words += [f"--{argument}", *map(str, values)]
    return shlex.join(words)


def _card_data(record, repo_id, pipeline_tag, config, license, language) -> ModelCardData:
    """The metadata. Its results are the row at the model's own tolerance."""
    corpus = record.recipe.get("corpus")
    known = corpus and (corpus in BUILT_IN_CORPORA or known_corpus(corpus, record.recipe.get("corpus_config")))
    on_hub = corpus and "/" in corpus and not is_local(corpus)
    own = record.own_row(config)
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=record.dataset,
            dataset_name=record.dataset,
            dataset_split=record.split,
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


def _is_own_file(dataset: str) -> bool:
    """Whether a dataset is a local file or folder. A record keeps only the last part of its name."""
    return dataset not in (*BUILT_IN_CORPORA, *TASKS) and "/" not in dataset


def _cost(record: RunRecord) -> str | None:
    """The cost of the run, as a table."""
    cost = record.cost
    rows = {
        "optimizer steps": cost.get("step"),
        "tokens trained on": cost.get("num_tokens"),
        "minutes": "seconds" in cost and f"{cost['seconds'] / 60:.1f}",
        "processes": cost.get("num_processes"),
    }
    return markdown_table([{"training": name, "": value} for name, value in rows.items() if value]) if cost else None


def _dial_table(results: list[dict]) -> str:
    """Quality against compute, one row for each setting."""
    # A file of results has null in place of a number that is not finite.
    given = {name for row in results for name, value in row.items() if value is not None}
    columns = {name: title for name, title in (METRICS | SOLVE).items() if name in given}
    if "solver_tolerance" not in results[0]:
        columns = {name: title for name, title in columns.items() if name not in SOLVE}
    rows = [{"dial": dial_label(row)} | {title: row.get(name) for name, title in columns.items()} for row in results]
    return markdown_table(rows)


def markdown_table(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(_format, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _format(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
