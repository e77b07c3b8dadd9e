"""Perplexity of a trained model, and what the equilibrium contributes: the dial as a table.

    hf-deq evaluate deq-model
    hf-deq evaluate deq-model --corpus my_text.txt --tolerances 1e-2 1e-3 --budgets 1 2 4
    hf-deq evaluate deq-model --split test --drop_remainder --batch_size 10 --memory_length 300

The rows by budget stop after a number of evaluations, the rows by tolerance at a residual. One evaluation is f applied
to the state where a solve starts, so the solver has no part in it. If the input proposes this state (as in Attractor
models), a row before the others is the state itself. What the model was trained on, how the text was read, and whether
memory was carried, is read from its recipe.yaml. A model that is not solved, such as an explicit baseline, has a single
row. The file of --output also has the arguments that decide the numbers.
"""

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from ..data import check_at_least, read_recipe
from ..evaluation import HeldOut, dial_settings, evaluate_dial, finite, format_table, load_model
from ..evaluation.reports import RADIUS_WINDOWS
from ..tasks import LanguageModeling, task_of
from . import check_folder, first_argument, parse, with_errors_in_a_line

PLACES = ("output", "device")  # arguments that do not decide the numbers
ROWS = ("budgets", "tolerances")


@dataclass
class EvaluateArguments:
    """At which settings of the dial a model is evaluated."""

    tolerances: list[float] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3], metadata={"help": "Rows by tolerance."})
    budgets: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Rows by evaluations of f."})
    memory_length: int | None = field(
        default=None, metadata={"help": "Tokens that a DEQ-Transformer remembers in this evaluation; default: its own."}
    )
    output: str | None = field(default=None, metadata={"help": "Also write the table to this JSON file."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu, cuda, mps."})

    def __post_init__(self):
        check_at_least(0, tolerances=self.tolerances, memory_length=self.memory_length)
        check_at_least(1, budgets=self.budgets)


def main() -> None:
    """Evaluate as the command line says."""
    with_errors_in_a_line(lambda: evaluate(*parse_for_folder(__doc__, EvaluateArguments)))


def parse_for_folder(description: str, arguments: type) -> tuple:
    """Read a command line that begins with a model's folder. The task that it was trained on has flags of its own.

    Returns:
        The folder, an instance of `arguments`, and one of the task's `evaluation_arguments`.

    Raises:
        ValueError: if it begins with a flag, or with a path where there is no folder.
    """
    folder = first_argument(sys.argv[1:])
    if folder is None and sys.argv[1:] and not {"-h", "--help"} & {*sys.argv}:
        raise ValueError("name the model folder first, because its task decides which flags there are: FOLDER --...")
    if folder is not None:
        check_folder(folder, "model")
    task = LanguageModeling if folder is None else task_of(read_recipe(folder))
    help_text = "Model folder or Hub repository; the first argument."
    return parse(description, arguments, task.evaluation_arguments, model=help_text)


def evaluate(folder: str, arguments: EvaluateArguments, task_arguments) -> None:
    """Print the table of a model."""
    model = load_model(folder, arguments.device, arguments.memory_length)
    held_out = held_out_of(folder, task_arguments)
    check_memory_length(arguments.memory_length, held_out)
    if arguments.output:  # now, because the numbers may take long
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    settings = dial_settings(model.config, arguments.budgets, arguments.tolerances)
    evaluation = evaluate_dial(model, held_out, settings)
    print(f"{folder} on {evaluation.measured}\n")
    print(format_table(evaluation.table()))
    if evaluation.spectral_radius is not None:
        radius = f"{evaluation.spectral_radius:.2f} (an estimate, the mean of at most {RADIUS_WINDOWS} windows)"
        print(f"\nspectral radius of the Jacobian of f at the equilibrium: {radius}")
        print(f"from the start to the equilibrium, ||z* - z0|| / ||z*||: {evaluation.distance_from_start:.2f}")
    if evaluation.path_independence is not None:
        print(f"path independence (1: the same equilibrium from other starts): {evaluation.path_independence:.4f}")
    if arguments.output:
        rows = ROWS if evaluation.is_solved else ()
        results = {"arguments": given_arguments(arguments, task_arguments, rows=rows)}
        results |= asdict(evaluation)
        del results["metrics"]
        Path(arguments.output).write_text(json.dumps(finite(results), indent=1))


def held_out_of(folder: str, task_arguments) -> HeldOut:
    """What to judge the model of a folder on."""
    recipe = read_recipe(folder)
    return task_of(recipe).judge(folder, recipe, task_arguments)


def check_memory_length(memory_length: int | None, held_out: HeldOut) -> None:
    """Refuse a length of the memory where none is handed on.

    Raises:
        ValueError: if windows are read, or the examples of a synthetic task.
    """
    if memory_length is not None and not held_out.carries_memory:
        raise ValueError(
            f"memory_length={memory_length} is for a text that is read in streams with a memory (--carry_memory true): "
            "leave it out."
        )


def given_arguments(*arguments, rows: tuple[str, ...] = ROWS) -> dict:
    """The arguments that decide the numbers: those that are not at their defaults, and always those of `rows`."""
    defaults = {name: value for one in arguments for name, value in asdict(type(one)()).items()}
    given = {one.name: getattr(part, one.name) for part in arguments for one in fields(part) if one.name not in PLACES}
    changed = {name for name, value in given.items() if name not in ROWS and value != defaults[name]}
    return {name: value for name, value in given.items() if name in changed or name in rows}


if __name__ == "__main__":
    main()
