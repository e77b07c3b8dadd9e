"""What the benchmarks share: models to measure, peers, fair turns, and the table at the end."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_deq  # registers the model types
from hf_deq.evaluation import finite, format_table
from hf_deq.fixed_point import FixedPointSolution
from hf_deq.hub.card import markdown_table

SHIPPED = tuple(f"model_cards/deq-{family}-tiny" for family in ("transformer", "trellisnet", "attractor"))
FRESH, HARD = "fresh", "hard"
# With this factor on its projections, a new f of a DEQ-Transformer takes Anderson more than 25 evaluations to 1e-3.
HARD_FACTOR = 2.5
WITHOUT_TORCHDEQ = 'torchdeq is not installed, its rows are left out: pip install -e ".[bench]"'


@dataclass
class ReportArguments:
    """Where the table goes besides the screen."""

    output: str | None = field(default=None, metadata={"help": "Also write the rows to this JSON file."})
    page: str | None = field(
        default=None, metadata={"help": "Also put the table into this Markdown file, in the place of the old one."}
    )


@dataclass
class DeviceArguments(ReportArguments):
    """Where it is measured. The table of a GPU has a place of its own in a page."""

    device: str = field(default="cpu", metadata={"help": "cpu, cuda, mps."})


def load(name: str):
    """The model of a folder. `fresh` and `hard` are new DEQ-Transformers of the size of the shipped one."""
    if name not in (FRESH, HARD):
        return AutoModelForCausalLM.from_pretrained(name).eval()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHIPPED[0])).eval()
    if name == HARD:
        for parameter_name, weight in model.model.layers.named_parameters():
            weight.data *= HARD_FACTOR if parameter_name.endswith("proj.weight") else 1
    return model


def title(name: str) -> str:
    """The name of a model in a table."""
    return name.rpartition("/")[2]


def explicit_model(kind: str, like, layers: int):
    """A new GPT-2 or Llama of the width and the vocabulary of another model's configuration."""
    special = dict(bos_token_id=like.bos_token_id, eos_token_id=like.eos_token_id, pad_token_id=like.pad_token_id)
    heads = getattr(like, "num_attention_heads", 1)
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = dict(n_embd=like.hidden_size, n_head=heads, n_layer=layers, n_positions=8192)
        return GPT2LMHeadModel(GPT2Config(vocab_size=like.vocab_size, **sizes, **special)).eval()
    sizes = dict(hidden_size=like.hidden_size, num_attention_heads=heads, num_hidden_layers=layers)
    sizes["intermediate_size"] = 8 * like.hidden_size // 3  # as many weights as two projections of four times the width
    tied = dict(tie_word_embeddings=True, max_position_embeddings=8192)
    return LlamaForCausalLM(LlamaConfig(vocab_size=like.vocab_size, **sizes, **tied, **special)).eval()


def take_turns(ways: dict[str, Callable[[], object]], seconds: float, least: int = 3) -> dict[str, float]:
    """Median seconds of each way. The ways take turns, and the first turn does not count."""
    turns: dict[str, list[float]] = {way: [] for way in ways}
    ends = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < ends or len(turns[next(iter(ways))]) <= least:
        for way, work in ways.items():
            synchronise()
            started = time.perf_counter()
            work()
            synchronise()
            turns[way].append(time.perf_counter() - started)
    return {way: statistics.median(measured[1:]) for way, measured in turns.items()}


def synchronise() -> None:
    """Wait for an accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class TorchdeqGradient:
    """torchdeq's solver and its implicit gradient, in the place of an estimator of ours."""

    tolerance: float
    max_evaluations: int

    def __call__(self, f, z0, solver, texts=None) -> FixedPointSolution:
        from torchdeq import get_deq

        limits = dict(f_max_iter=self.max_evaluations, b_max_iter=self.max_evaluations, f_tol=self.tolerance)
        how = dict(f_solver="anderson", b_solver="anderson", f_stop_mode="rel", b_stop_mode="rel", ift=True)
        states, info = get_deq(**how, **limits, b_tol=self.tolerance)(f, z0)
        count = info["nstep"].expand(len(z0)).to(z0.device)
        return FixedPointSolution(states[-1], states[-1], info["rel_lowest"].expand(len(z0)), count, count > 0)


def has_torchdeq() -> bool:
    """Whether torchdeq can be imported. Says so if not."""
    try:
        import torchdeq  # noqa: F401
    except ImportError:
        print(WITHOUT_TORCHDEQ)
        return False
    return True


def double_precision(model):
    """A copy of a model in double precision."""
    return deepcopy(model).double()


def report(
    name: str,
    rows: list[dict],
    arguments: ReportArguments,
    shown: list[dict] | None = None,
    footer: str | None = None,
) -> None:
    """Print rows as a table; write them as JSON, and into a page, if the arguments say so.

    A page has the table called `name` between the lines `<!-- name -->` and `<!-- end -->`; on an accelerator it is
    called `name cuda`, for example. It shows all rows, or the rows `shown`. The footer says what they were measured on:
    this machine, today, if it is left out.

    Raises:
        ValueError: if the page has no such place.
    """
    print(format_table(rows))
    device = getattr(arguments, "device", "cpu")
    name = name if device == "cpu" else f"{name} {device}"
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(finite(rows), indent=1))
    if arguments.page:
        page = Path(arguments.page)
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        if not place.search(page.read_text()):
            raise ValueError(f"{page} has no place for this table: <!-- {name} --> and <!-- end -->.")
        footer = machine(device) if footer is None else footer
        table = f"{markdown_table(shown or rows)}\n\n{footer}".rstrip() + "\n"
        page.write_text(place.sub(lambda found: found[1] + table + found[2], page.read_text(), count=1))


def machine(device: str) -> str:
    """What numbers are measured on, and when."""
    threads = torch.get_num_threads()
    names = {"cpu": f"CPU, {threads} thread{'s' * (threads > 1)}"}
    if device.startswith("cuda"):
        names[device] = torch.cuda.get_device_name()
    device = names.get(device, device)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, hf_deq {hf_deq.__version__}"
    return f"*{device}; {versions}; {date.today():%Y-%m-%d}.*"
