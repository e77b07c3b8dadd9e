"""Draw the figures of "Deep Equilibrium Models" (Bai et al. 2019) from runs of your own.

    hf-deq plot deq-model --output figures
    hf-deq plot deq-model --others unrolled-model                            # its residuals in the same axes
    hf-deq plot deq-model --metrics a/metrics.jsonl b/metrics.jsonl          # several runs
    hf-deq plot deq-model --text "The iterator yields"                       # what every token of a text takes

The output folder gets four figures (PNG), and beside each figure its numbers (JSON):

    training     evaluations of f and relative residual over training, forward and backward  (figure 2, left)
    residuals    relative residual against evaluations of f, solver by solver                (figures 2, right, and 4)
    dial         quality against tolerance and against budget                                (figure 3)
    memory       bytes that a training step keeps for backward, against evaluations of f     (the claim of figure 1)

or, with --text, one:

    text         relative residual of every token against evaluations of f, and the number of evaluations after which
                 it stays below the tolerance
    lens         with --lens instead: the next token that every number of evaluations would predict

What the model was trained on is read from its recipe.yaml, as in `hf-deq evaluate`. Needs matplotlib:
pip install "hf_deq[plot]".
"""

import json
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..data import check_at_least, read_recipe
from ..evaluation import HeldOut, finite, load_model, load_tokenizer
from ..fixed_point import ConvergenceWarning
from ..modeling_deq import DEQForCausalLM
from ..training import evaluations_over_training
from . import with_errors_in_a_line
from .evaluate import EvaluateArguments, check_memory_length, given_arguments, held_out_of, parse_for_folder

try:
    from ..evaluation import figures
except ImportError:
    sys.exit('error: figures are drawn by matplotlib, which is missing here: pip install "hf_deq[plot]"')


@dataclass
class PlotArguments(EvaluateArguments):
    """What to draw, and from what."""

    budgets: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 6, 8, 12], metadata={"help": "Perplexity at these evaluations of f."}
    )
    tolerances: list[float] = field(
        default_factory=lambda: [1.0, 0.3, 0.1, 0.03, 0.01, 0.001], metadata={"help": "Perplexity at these tolerances."}
    )
    others: list[str] = field(
        default_factory=list,
        metadata={"help": "Further model folders whose residuals to draw: by their solver, or plainly if unrolled."},
    )
    metrics: list[str] = field(
        default_factory=list, metadata={"help": "Files metrics.jsonl of runs; default: the model folder's."}
    )
    windows: int = field(default=16, metadata={"help": "Held-out windows over which residuals are shown."})
    evaluations: int = field(default=30, metadata={"help": "Evaluations of f over which residuals are shown."})
    depths: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Evaluations of f at which memory is measured."}
    )
    text: str | None = field(
        default=None, metadata={"help": "Draw what every token of this text takes, and nothing else."}
    )
    lens: bool = field(
        default=False, metadata={"help": "With --text: draw what every number of evaluations would predict."}
    )
    output: str = field(default="figures", metadata={"help": "Folder for figures and their numbers."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, windows=self.windows, evaluations=self.evaluations, depths=self.depths)
        if self.lens and self.text is None:
            raise ValueError("lens draws over a text: give --text, too.")


def main() -> None:
    """Draw as the command line says."""
    warnings.simplefilter("ignore", ConvergenceWarning)  # the figures show what has not converged
    with_errors_in_a_line(lambda: plot(*parse_for_folder(__doc__, PlotArguments)))


def plot(folder: str, arguments: PlotArguments, task_arguments) -> None:
    """Draw the figures of a model."""
    name, save = Path(folder).resolve().name, Saver(arguments, task_arguments)
    if arguments.text is not None:
        model, tokenizer = load_equilibrium_model(folder, arguments), load_tokenizer(folder)
        kind, draw = ("lens", figures.draw_lens) if arguments.lens else ("text", figures.draw_text)
        save(kind, draw(name, model, tokenizer, arguments.text, arguments.evaluations))
        return
    trained, held_out = load(folder, arguments, task_arguments)
    others = [load(other, arguments, task_arguments)[0] for other in arguments.others]
    if len({one.name for one in (trained, *others)}) <= len(others):  # two folders have one name
        others = [replace(one, name=str(Path(other))) for one, other in zip(others, arguments.others, strict=True)]
    files = [Path(file) for file in arguments.metrics] or [Path(folder) / "metrics.jsonl"]
    if arguments.metrics or files[0].is_file():
        runs = {str(file): evaluations_over_training(file) for file in files}
        save("training", figures.draw_training(runs))
    else:
        print(f"note: {folder} has no metrics.jsonl, so training is not drawn; name one by --metrics.")
    batch_size = read_recipe(folder).get("batch_size", 8)
    print("measuring residuals ...", flush=True)
    save("residuals", figures.draw_residuals(trained, others, arguments.evaluations))
    print("measuring memory ...", flush=True)
    save("memory", figures.draw_memory(trained, batch_size, arguments.depths))
    print("measuring dial ...", flush=True)
    save("dial", figures.draw_dial(trained, held_out, arguments.tolerances, arguments.budgets))


def load(folder: str, arguments: PlotArguments, task_arguments) -> tuple[figures.Trained, HeldOut]:
    """The model in a folder, and what it is judged on."""
    model, held_out = load_equilibrium_model(folder, arguments), held_out_of(folder, task_arguments)
    check_memory_length(arguments.memory_length, held_out)
    return figures.Trained(Path(folder).resolve().name, model, held_out.windows(arguments.windows)), held_out


def load_equilibrium_model(folder: str, arguments: PlotArguments) -> DEQForCausalLM:
    """The language model in a folder.

    Raises:
        ValueError: if it has no equilibrium.
    """
    model = load_model(folder, arguments.device, arguments.memory_length)
    if not isinstance(model, DEQForCausalLM):
        raise ValueError(f"{folder} is a {type(model).__name__}, which solves for nothing: name a model of hf_deq.")
    return model


class Saver:
    """Writes figures, and beside each its numbers with the arguments that gave them."""

    def __init__(self, arguments: PlotArguments, task_arguments):
        self.output = Path(arguments.output)
        self.given = {"arguments": given_arguments(arguments, task_arguments)}

    def __call__(self, name: str, drawn: tuple) -> None:
        figure, data = drawn
        self.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.output / f"{name}.png", dpi=150)
        (self.output / f"{name}.json").write_text(json.dumps(finite(self.given | data), indent=1))
        print(f"{self.output / name}.png, .json")


if __name__ == "__main__":
    main()
