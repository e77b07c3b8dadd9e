"""Tables and a figure of a sweep on text: quality against parameters, training time and depth.

    python scripts/report_sweep.py model_cards/penn-treebank --runs_dir runs     # first measures the final models
    python scripts/report_sweep.py model_cards/penn-treebank

Reads results.jsonl, which `scripts/sweep.py` writes. With --runs_dir, one final model of each kind is measured with one
thread, and the numbers are kept in measurements.json. The models take turns:

    step ms         a training step of a batch of training, without the optimizer
    shallow ms      likewise, a shallow step, which applies f a few times and solves nothing
    saved MB        what a training step keeps for backward
    token ms        a new token, of 32 after a context of 64, with the cache
    nats over 15    the part of the validation loss (nats per token) of tokens that cost more than 15 nats: how badly a
                    model is surprised, mostly by rare words

A model without a folder in --runs_dir keeps the numbers of an earlier report. Its times can be compared with the others
only if the machine was as fast then.

The minutes of the table and of the figure are the steps times these milliseconds: other programs run beside the runs of
a sweep, so the clock of a run is not fair. For a model that was not measured, it has to do.

The tables go into README.md of the folder, between their marks. The figure is pareto.png: validation perplexity against
the training time so far, and test perplexity against the layers that a token passes through.
"""

import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, product
from operator import itemgetter
from pathlib import Path

import torch
from benchmarking import ReportArguments, machine, report, take_turns
from matplotlib.figure import Figure
from sweep_plan import Sweep
from transformers import AutoModelForCausalLM

import hf_deq
from hf_deq.commands import run
from hf_deq.data import read_recipe
from hf_deq.evaluation import evaluating, is_by_tolerance
from hf_deq.evaluation.activations import saved_bytes
from hf_deq.evaluation.figures import COLORS
from hf_deq.tasks import TextArguments, held_out_text

CONTEXT, NEW_TOKENS = 64, 32
SURPRISE, WINDOWS = 15.0, 500
TIMES = ("step ms", "shallow ms")  # of training
MEASURED = (*TIMES, "saved MB", "token ms", "nats over 15")


@dataclass
class ReportSweepArguments:
    """Whether to measure the final models, and for how long."""

    runs_dir: str | None = field(default=None, metadata={"help": "Folder of the runs: measure their final models."})
    seconds: float = field(default=5.0, metadata={"help": "How long each model is measured, about."})


def main(folder: str, arguments: ReportSweepArguments) -> None:
    """Write tables and figure.

    Raises:
        ValueError: if the sweep does not evaluate its final runs.
    """
    warnings.simplefilter("ignore", hf_deq.ConvergenceWarning)
    torch.set_num_threads(1)  # as the runs had
    sweep, place = Sweep(Path(folder) / "sweep.yaml"), Path(folder) / "measurements.json"
    if "evaluate" not in sweep.plan:
        raise ValueError(f"{folder}/sweep.yaml has no evaluate: this report needs a test score of the final runs.")
    finals = sweep.finals()
    scored = {model: list(filter(is_scored, lines)) for model, lines in finals.items() if any(map(is_scored, lines))}
    measurements = json.loads(place.read_text()) if place.is_file() else {}
    if arguments.runs_dir is not None:
        runs_dir = Path(arguments.runs_dir)
        measurements |= {"machine": machine("cpu")} | measure(at_hand(scored, runs_dir), runs_dir, arguments)
        place.write_text(json.dumps(measurements, indent=1))
    page = ReportArguments(page=str(Path(folder) / "README.md"))
    if tuning := tuning_rows(sweep):
        report("tuning", tuning, page, footer="")  # nothing was measured here
    if scored:
        report("final", final_rows(scored, finals, measurements), page, footer=measurements.get("machine", ""))
        draw(scored, measurements).savefig(Path(folder) / "pareto.png", dpi=150)
    for model in finals.keys() - scored.keys():
        print(f"{model} is left out: all its final runs diverged")


def at_hand(scored: dict[str, list[dict]], runs_dir: Path) -> dict[str, list[dict]]:
    """The final runs whose folders are there. A model that has none keeps what an earlier report measured.

    Raises:
        ValueError: if there is no folder of any.
    """
    found = {model: [line for line in lines if (runs_dir / line["key"]).is_dir()] for model, lines in scored.items()}
    if scored and not any(found.values()):
        raise ValueError(f"runs_dir {str(runs_dir)!r} has no final run of this sweep: leave it out, or name another.")
    for model in (model for model, lines in found.items() if not lines):
        print(f"{model} is not in {runs_dir}, and was not measured: an earlier measurement stays")
    return {model: lines for model, lines in found.items() if lines}


def tuning_rows(sweep: Sweep) -> list[dict]:
    """A row for each short run: what it changed, and the perplexity."""
    rows = []
    for model, mine in sweep.plan["models"].items():
        tried = {repr(setting): setting for settings in mine["rounds"] for setting in settings}
        for line in (line for line in sweep.results.values() if line["model"] == model and line["round"] != "final"):
            setting = [one for one in tried.values() if one.items() <= line["flags"].items()]
            words = "; ".join(f"{name} {value}" for one in setting for name, value in one.items())
            score = round(line["result"]["validation_perplexity"], 1) if is_scored(line) else "diverged"
            row = {"model": model, "round": line["round"], "setting": words, "validation": score}
            converged = line["result"]["validation_converged"] if is_solved(line) else None
            rows.append(row | {"converged": None if converged is None else f"{converged:.0%}"})
    return rows


def final_rows(scored: dict[str, list[dict]], finals: dict[str, list[dict]], measurements: dict) -> list[dict]:
    """A row for each model: mean and standard deviation over the seeds that did not diverge."""
    rows = []
    for model, lines in scored.items():
        results, seeds, measured = [line["result"] for line in lines], len(finals[model]), measurements.get(model, {})
        evaluations = [result.get("validation_num_evaluations") for result in results]
        losses = [line.get("training_loss") for line in lines]
        row = {
            "model": model,
            "parameters": results[0]["num_parameters"],
            "tokens (M)": round(results[0]["num_tokens"] / 1e6, 2),
            "minutes": round(statistics.mean(minutes_until(line["result"], line, measured) for line in lines), 1),
            "seeds": seeds if len(lines) == seeds else f"{len(lines)} of {seeds}",
            "training": None if None in losses else spread(list(map(math.exp, losses))),
            "validation": spread([result["validation_perplexity"] for result in results]),
            "best validation (step)": best_validation(lines),
            "test": spread([test_row(line)["perplexity"] for line in lines]),
            "evaluations": None if None in evaluations else round(statistics.mean(evaluations), 1),
        }
        rows.append(row | {name: measured.get(name) for name in MEASURED})
    return rows


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def is_scored(line: dict) -> bool:
    """Whether a run has a score. A run that diverged has none."""
    return line["result"].get("validation_perplexity") is not None


def best_validation(lines: list[dict]) -> str:
    """The lowest validation perplexity on the way, of the mean over the seeds, and its step."""
    step, perplexity = min(curve(lines, lambda point, line: point["step"]), key=itemgetter(1))
    return f"{perplexity:.1f} ({step:,.0f})"


def test_row(line: dict) -> dict:
    """The row of the evaluation with the smallest tolerance. A model without a tolerance has its own row at the end."""
    rows = line["evaluation"]["rows"]
    return min(filter(is_by_tolerance, rows), key=itemgetter("solver_tolerance"), default=rows[-1])


def is_solved(line: dict) -> bool:
    """Whether a model is an equilibrium, and not explicit layers."""
    return "validation_num_evaluations" in line["result"] and line["flags"].get("gradient") != "unrolled"


def depth(line: dict, row: dict) -> float:
    """The layers that a token passes through: evaluations of f times the layers of f, and those of a prelude."""
    flags = line["flags"]
    layers, prelude = flags.get("n_layer", flags.get("num_hidden_layers", 1)), flags.get("num_prelude_layers", 0)
    if "validation_num_evaluations" not in line["result"]:  # an explicit model of Transformers
        return layers
    return prelude + row["num_evaluations"] * (layers - prelude)


def learning_curve(lines: list[dict], measured: dict) -> list[tuple[float, float]]:
    """Minutes of training so far and validation perplexity, means over the seeds."""
    return curve(lines, partial(minutes_until, measured=measured))


def curve(lines: list[dict], place: Callable[[dict, dict], float]) -> list[tuple[float, float]]:
    """For each validation that gave every seed a number: its place, and the perplexity; means over the seeds."""
    seeds = [[(point, line) for point in (*line["validations"], line["result"])] for line in lines]
    together = [
        [(place(point, line), point["validation_perplexity"]) for point, line in pairs]
        for pairs in zip(*seeds, strict=True)
        if all(point["validation_perplexity"] is not None for point, _ in pairs)
    ]
    return [tuple(map(statistics.mean, zip(*pairs, strict=True))) for pairs in together]


def minutes_until(point: dict, line: dict, measured: dict) -> float:
    """Minutes of training until a validation: steps times their measured time.

    Without measurements, the clock has to do. A run that did not note it is taken to have steps of equal length.

    Raises:
        ValueError: if the measurements lack the time of shallow steps.
    """
    result, step = line["result"], point["step"]
    if not measured:
        return point.get("seconds", result["seconds"] * step / result["step"]) / 60
    shallow = min(step, line["flags"].get("shallow_steps", 0))
    if shallow and "shallow ms" not in measured:
        raise ValueError("measurements.json has no shallow ms: measure again with --runs_dir.")
    return ((step - shallow) * measured["step ms"] + shallow * measured.get("shallow ms", 0)) / 60_000


def depth_curve(lines: list[dict]) -> list[tuple[float, float]]:
    """Depth and test perplexity for each budget, means over the seeds; of explicit layers one point."""
    rows = [line["evaluation"]["rows"] for line in lines]
    budgets = [settings for settings in zip(*rows, strict=True) if not is_by_tolerance(settings[0])]
    budgets = [settings for settings in budgets if settings[0].get("solver_max_evaluations") != 0]  # without f: far off
    return sorted(
        (
            statistics.mean(depth(line, row) for line, row in zip(lines, settings, strict=True)),
            statistics.mean(row["perplexity"] for row in settings),
        )
        for settings in (budgets if is_solved(lines[0]) else budgets[-1:])
    )


def draw(finals: dict[str, list[dict]], measurements: dict) -> Figure:
    """Validation perplexity against training time, and test perplexity against depth. Explicit models are dashed."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    looks = {solved: cycle(product("os^", COLORS)) for solved in (True, False)}  # of equilibria and of explicit models
    for model, lines in finals.items():
        solved = is_solved(lines[0])
        marker, color = next(looks[solved])
        look = {"color": color, "marker": marker, "linestyle": "-" if solved else "--"}
        look["markerfacecolor"] = color if solved else "white"
        left.plot(*zip(*learning_curve(lines, measurements.get(model, {})), strict=True), **look, label=model)
        right.plot(*zip(*depth_curve(lines), strict=True), **look)
    left.set(
        xlabel="training time so far (minutes of one thread)", ylabel="perplexity", title="Validation", yscale="log"
    )
    right.set(xlabel="layers that a token passes through", title="Test")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def measure(finals: dict[str, list[dict]], runs_dir: Path, arguments: ReportSweepArguments) -> dict:
    """Speed, memory and surprises of the first final model of each kind."""
    models = {
        model: AutoModelForCausalLM.from_pretrained(runs_dir / lines[0]["key"]) for model, lines in finals.items()
    }
    steps, saved = {}, {}
    for model, lines in finals.items():
        flags = lines[0]["flags"]
        ids = torch.randint(10, models[model].config.vocab_size, (flags["batch_size"], flags["sequence_length"]))
        dial = {"solver_tolerance": flags["train_solver_tolerance"]} if "train_solver_tolerance" in flags else {}
        forward = partial(loss, models[model].train(), ids)
        steps[model, "step ms"] = partial(train, forward, dial)
        saved[model] = saved_bytes(models[model], partial(forward, dial))
        if flags.get("shallow_steps"):
            steps[model, "shallow ms"] = partial(train, forward, {"unroll_steps": flags["shallow_depth"]})
    of_steps = take_turns(steps, arguments.seconds)
    decoding = {model: partial(decode, one.eval()) for model, one in models.items() if has_cache(one)}
    of_tokens = take_turns(decoding, arguments.seconds)
    return {
        model: {
            **{name: round(1e3 * of_steps[model, name]) for name in TIMES if (model, name) in of_steps},
            "saved MB": round(saved[model] / 1e6, 1),
            "token ms": round(1e3 * of_tokens[model] / NEW_TOKENS, 1) if model in of_tokens else None,
            "nats over 15": round(surprises(models[model], str(runs_dir / finals[model][0]["key"])), 2),
        }
        for model in models
    }


def loss(model, ids, dial: dict):
    """The loss of a training step."""
    return model(ids, labels=ids, use_cache=False, **dial).loss


def train(forward, dial: dict) -> None:
    """A training step, without the optimizer."""
    forward(dial).backward()


def decode(model) -> None:
    """Generate tokens after a context."""
    model.generate(torch.full((1, CONTEXT), 10), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


@torch.no_grad()
def surprises(model, folder: str) -> float:
    """The part of the validation loss, in nats per token, of tokens that cost more than `SURPRISE` nats."""
    windows, losses = held_out_text(folder, read_recipe(folder), TextArguments()).windows(WINDOWS), []
    with evaluating(model):
        for ids in windows.split(16):
            logits = model(ids[:, :-1], use_cache=False).logits
            losses.append(torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none"))
    every = torch.cat(losses)
    return every.where(every > SURPRISE, 0).mean().item()


def has_cache(model) -> bool:
    """Whether the model decodes with a cache, as every explicit model of Transformers does."""
    return getattr(model.config, "is_cacheable", True)


if __name__ == "__main__":
    run(main, __doc__, ReportSweepArguments, folder="Folder of the sweep.")
