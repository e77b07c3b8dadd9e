"""Perplexity of a trained model, and what the equilibrium is worth: the dial as a table.

    python scripts/evaluate.py deq-model
    python scripts/evaluate.py deq-model --corpus my_text.txt --tolerances 1e-2 1e-3 --budgets 1 2 4
    python scripts/evaluate.py deq-model --split test --drop_remainder --batch_size 10 --memory_length 300

The first row bypasses the solver: one application of f to the zero state. The rows by budget stop
after so many evaluations, the rows by tolerance at that residual. What the model was trained on, how that was read, and
whether with a carried memory, is read from its recipe.yaml. A model that is not solved for, such as an explicit
baseline, has a single row. The file of --output also has the arguments of this script that decide the numbers.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_deq
from hf_deq.command_line import run_script
from hf_deq.convergence import held_out_windows, spectral_radii
from hf_deq.data import TokenStream
from hf_deq.evaluation import dial_table, format_table, protocol, solver_settings
from hf_deq.generation_deq import REPORTED
from hf_deq.tasks import make_task, read_recipe, read_stream
from hf_deq.training_arguments import CopyMemoryArguments

COLUMNS = ("bits_per_byte", "perplexity", "word_perplexity", *REPORTED)
COPY_COLUMNS = ("loss", "recalled", *REPORTED)
RADIUS_WINDOWS = 8


@dataclass
class EvaluateArguments:
    """What to evaluate on, and at which settings of the dial."""

    corpus: str | None = field(
        default=None, metadata={"help": "As for training; default: what the model was trained on."}
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    validation_file: str | None = field(default=None, metadata={"help": "Local text file to evaluate on."})
    word_level: bool | None = field(
        default=None, metadata={"help": "Read lines of whitespace-separated words; default: as in training."}
    )
    split: str = field(default="validation", metadata={"help": "Split of the corpus: validation, test or train."})
    tolerances: list[float] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3], metadata={"help": "Rows by tolerance."})
    budgets: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Rows by evaluations of f."})
    length: int | None = field(
        default=None,
        metadata={"help": "Tokens per window or segment; default: the sequence length of training, or 128."},
    )
    stride: int | None = field(default=None, metadata={"help": "Tokens a window advances; default: half of it."})
    batch_size: int = field(
        default=16, metadata={"help": "Windows per forward pass; with carried memory, streams (part of the protocol)."}
    )
    carry_memory: bool | None = field(
        default=None, metadata={"help": "Read contiguous streams, handing on the memory; default: as in training."}
    )
    memory_length: int | None = field(
        default=None, metadata={"help": "Tokens that a DEQ-Transformer remembers in this evaluation; default: its own."}
    )
    drop_remainder: bool = field(
        default=False,
        metadata={
            "help": "With carried memory: streams of equal length, without the remainder and without predicting the "
            "first token of each, as the literature's code does."
        },
    )
    output: str | None = field(default=None, metadata={"help": "Also write the table to this JSON file."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu, cuda, mps."})


def load_model(folder: str, arguments: EvaluateArguments):
    """The model, with the memory that it is to have in this evaluation.

    Raises:
        ValueError: `memory_length` is negative, or the model's memory has no length.
    """
    config = AutoConfig.from_pretrained(folder)
    if arguments.memory_length is not None:
        if not hasattr(config, "memory_length"):
            raise ValueError(f"memory_length: a {config.model_type} has a memory of fixed size; leave it out.")
        if arguments.memory_length < 0:
            raise ValueError(f"memory_length must not be negative, got {arguments.memory_length}.")
        config.memory_length = arguments.memory_length
    return AutoModelForCausalLM.from_pretrained(folder, config=config).to(arguments.device)


def load_stream(recipe: dict, tokenizer, arguments: EvaluateArguments) -> TokenStream:
    """The stream to evaluate on: what the arguments name, else what the model's recipe names."""
    return read_stream(
        tokenizer,
        arguments.split,
        recipe,
        arguments.corpus,
        arguments.corpus_config,
        arguments.validation_file,
        arguments.word_level,
    )


def window_length(recipe: dict, arguments: EvaluateArguments) -> int:
    """Tokens per window or segment."""
    return arguments.length or recipe.get("sequence_length", 128)


class Evaluation(NamedTuple):
    """What was measured, the rows of its table, and which of their values to show; and of f at its equilibrium, the
    spectral radius of the Jacobian, a mean over windows."""

    measured: str
    rows: list[dict]
    columns: tuple[str, ...]
    spectral_radius: float | None = None


def evaluate_language_model(
    model, stream: TokenStream, start_id: int, recipe: dict, settings: list[dict], arguments: EvaluateArguments
) -> Evaluation:
    """On a text, whose first token is predicted from `start_id`."""
    carry_memory = recipe.get("carry_memory", False) if arguments.carry_memory is None else arguments.carry_memory
    length = window_length(recipe, arguments)
    rows = dial_table(
        model,
        stream,
        start_id,
        settings,
        length=length,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        carry_memory=carry_memory,
        drop_remainder=arguments.drop_remainder,
        progress=True,
    )
    counts = (
        f"the {arguments.split} split: {rows[0]['num_tokens']:,} of {len(stream.ids):,} tokens counted "
        f"({stream.num_words:,} words, {stream.num_bytes:,} bytes)"
    )
    remembers = getattr(model.config, "memory_length", None)
    how = protocol(length, arguments.stride, arguments.batch_size, carry_memory, arguments.drop_remainder, remembers)
    return Evaluation(f"{counts}, {how}; {solver_settings(model.config)}, unless a row says otherwise", rows, COLUMNS)


def estimate_spectral_radius(model, stream: TokenStream, length: int) -> float | None:
    """The mean over windows; `None` of a model that is not solved for."""
    if getattr(model.config, "gradient", "unrolled") == "unrolled":
        return None
    windows = held_out_windows(stream.ids, RADIUS_WINDOWS, min(length, len(stream.ids)))
    return spectral_radii(model, windows).mean().item()


def evaluate_copy_memory(model, recipe: dict, settings: list[dict]) -> Evaluation:
    """On the copy memory task."""
    names = [field.name for field in fields(CopyMemoryArguments)]
    task = make_task(CopyMemoryArguments(**{name: recipe[name] for name in names}), {})
    rows = [setting | task.validate(model, **setting) for setting in settings]
    return Evaluation(str(task), rows, COPY_COLUMNS)


def main(folder: str, arguments: EvaluateArguments) -> None:
    recipe = read_recipe(folder)
    model = load_model(folder, arguments)
    is_solved = isinstance(model.config, hf_deq.DEQConfig)
    settings = dial_settings(arguments, model.config) if is_solved else [{}]
    if recipe.get("task") == CopyMemoryArguments.task:
        evaluation = evaluate_copy_memory(model, recipe, settings)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        stream = load_stream(recipe, tokenizer, arguments)
        evaluation = evaluate_language_model(model, stream, tokenizer.eos_token_id, recipe, settings, arguments)
        radius = estimate_spectral_radius(model, stream, window_length(recipe, arguments))
        evaluation = evaluation._replace(spectral_radius=radius)
    print(f"{folder} on {evaluation.measured}\n")
    columns = [name for name in evaluation.columns if is_solved or name not in REPORTED]
    print(format_table([label(row) | {name: row[name] for name in columns} for row in evaluation.rows]))
    if evaluation.spectral_radius is not None:
        radius = f"{evaluation.spectral_radius:.2f} (an estimate, the mean of {RADIUS_WINDOWS} windows)"
        print(f"\nspectral radius of the Jacobian of f at the equilibrium: {radius}")
    if arguments.output:
        results = {"arguments": given_arguments(arguments, is_solved)} | evaluation._asdict()
        del results["columns"]
        Path(arguments.output).write_text(json.dumps(results, indent=1))


def given_arguments(arguments: EvaluateArguments, is_solved: bool) -> dict:
    """The arguments that decide the numbers: those not left at their defaults, and always those that make the rows."""
    given, defaults = asdict(arguments), asdict(type(arguments)())
    elsewhere = ("budgets", "tolerances", "output", "device")
    decide = {name: value for name, value in given.items() if name not in elsewhere and value != defaults[name]}
    return decide | ({name: given[name] for name in ("budgets", "tolerances")} if is_solved else {})


def dial_settings(arguments: EvaluateArguments, config: hf_deq.DEQConfig) -> list[dict]:
    """The rows of the table: budgets without a tolerance, then tolerances within the model's own budget.

    An unrolled model has no tolerance: its last row is its own number of applications.
    """
    by_budget = [{"solver_max_evaluations": budget, "solver_tolerance": 0.0} for budget in arguments.budgets]
    if config.gradient == "unrolled":
        return [*by_budget, {"solver_max_evaluations": config.solver_max_evaluations, "solver_tolerance": 0.0}]
    return by_budget + [{"solver_max_evaluations": None, "solver_tolerance": each} for each in arguments.tolerances]


def label(row: dict) -> dict:
    """What a row is for."""
    if "solver_max_evaluations" not in row:
        return {"dial": "no solver"}
    if row["solver_max_evaluations"] is None:
        return {"dial": f"tolerance {row['solver_tolerance']:.0e}"}
    budget = row["solver_max_evaluations"]
    return {"dial": "no solver, f(0)" if budget == 1 else f"{budget} evaluations"}


if __name__ == "__main__":
    run_script(main, EvaluateArguments, __doc__, model="Model folder or Hub repository.")
