"""The cost of generation: memory and time against the length of the text, or speed by the way of decoding.

    python scripts/benchmark_generation.py                       # lengths: both models, freshly initialised
    python scripts/benchmark_generation.py --lengths 100 1000    # shorter
    python scripts/benchmark_generation.py --model deq-model     # ways of decoding: one trained model
    python scripts/benchmark_generation.py --model deq-model --gpt2_layers 12   # against an explicit model

Lengths: each model generates greedily, with batch 1, in a process of its own. At each length the process reports the
bytes in its cache, how much it has grown since it began to generate (peak resident memory), and the time per token of
the last tenth. Memory and time do not depend on the values of the weights, so the models are untrained. Both have the
same size.

Ways: the trained model continues its beginning-of-text token, greedily and by sampling. It decodes plainly, with a
draft by its own weights at each of `--draft_tolerances`, from a static cache, and with `--compile` also compiled.
Speed is relative to plain decoding, in CPU time on one thread. The ways take turns. The first turn is not counted,
and the best of the others counts. Evaluations are counted per new token, those of the model and those of the draft.
One evaluation of the model may check several tokens at once.

Against GPT-2: the model decodes greedily at each of `--tolerances`, and so does an untrained GPT-2 of the same width
and vocabulary, with its cache. They take turns in this process. Speed is relative to GPT-2, in seconds. The best turn
counts.
"""

import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch
from benchmarking import ReportArguments, explicit_model, report
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, DynamicCache

import hf_deq
from hf_deq.commands import run

SIZES = {
    "deq_transformer": {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6},
    "deq_trellisnet": {"hidden_size": 192, "intermediate_size": 192},
}


@dataclass
class BenchmarkArguments(ReportArguments):
    """How long the texts are, or what is decoded in how many ways."""

    lengths: list[int] = field(default_factory=lambda: [100, 1_000, 10_000], metadata={"help": "Tokens to generate."})
    model_types: list[str] = field(default_factory=lambda: list(SIZES), metadata={"help": "Which models."})
    vocab_size: int = field(default=2048, metadata={"help": "Size of the vocabulary."})
    solver_tolerance: float = field(default=1e-2, metadata={"help": "Tolerance of the solver."})
    model: str | None = field(default=None, metadata={"help": "Folder of a trained model: compare ways of decoding."})
    draft_tolerances: list[float] = field(
        default_factory=lambda: [0.5, 0.2, 0.1, 0.05], metadata={"help": "Tolerances of the drafts."}
    )
    new_tokens: int = field(default=100, metadata={"help": "Tokens to decode in every way."})
    gpt2_layers: int | None = field(default=None, metadata={"help": "Compare with a GPT-2 of so many layers."})
    tolerances: list[float] = field(
        default_factory=lambda: [1e-3, 1e-2], metadata={"help": "Tolerances to compare with GPT-2."}
    )
    turns: int = field(default=3, metadata={"help": "How often."})
    compile: bool = field(default=False, metadata={"help": "Also decode compiled, which takes minutes to begin."})


def main(arguments: BenchmarkArguments) -> None:
    if arguments.model is None:
        rows = compare_lengths(arguments)
    else:
        rows = compare_ways(arguments) if arguments.gpt2_layers is None else compare_with_gpt2(arguments)
    report("benchmark_generation", rows, arguments)


def compare_lengths(arguments: BenchmarkArguments) -> list[dict]:
    """One row for each model and length."""
    if min(arguments.lengths) < 10:
        sys.exit(f"error: lengths must be at least 10, since the last tenth is timed; got {arguments.lengths}")
    context, rows = multiprocessing.get_context("spawn"), []
    for model_type in arguments.model_types:
        with ProcessPoolExecutor(1, context) as fresh:  # its peak memory is this model's alone
            rows += fresh.submit(measure, model_type, arguments).result()
    return rows


@torch.no_grad()
def measure(model_type: str, arguments: BenchmarkArguments) -> list[dict]:
    """One row for each length."""
    warnings.simplefilter("ignore", hf_deq.ConvergenceWarning)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=max(arguments.lengths) + 1,
        solver_tolerance=arguments.solver_tolerance,
        bos_token_id=0,
        **SIZES[model_type],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, cache, rows = torch.zeros(1, 1, dtype=torch.long), DynamicCache(config=config), []
    generate(model, ids, DynamicCache(config=config), 20)  # what is allocated once
    start = peak_memory()
    for length in sorted(arguments.lengths):
        ids, _ = generate(model, ids, cache, length - length // 10 - (ids.shape[1] - 1))
        ids, seconds = generate(model, ids, cache, length // 10)
        rows.append(
            {
                "model": model_type,
                "tokens": length,
                "cache (KB)": cache_bytes(cache) / 1e3,
                "process grown by (MB)": (peak_memory() - start) / 1e6,
                "ms per token": 1e3 * seconds / (length // 10),
            }
        )
    return rows


def generate(model, ids: torch.Tensor, cache: DynamicCache, count: int) -> tuple[torch.Tensor, float]:
    """Go on from a cache for so many tokens; and the seconds it took."""
    started = time.perf_counter()
    ids = model.generate(ids, cache=cache, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids, time.perf_counter() - started


def cache_bytes(cache: DynamicCache) -> int:
    return sum(state.untyped_storage().nbytes() for layer in cache.layers for state in (layer.keys, layer.values))


def peak_memory() -> int:
    """Bytes of resident memory that this process has needed at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare_ways(arguments: BenchmarkArguments) -> list[dict]:
    """One row for each way of decoding, greedy and sampled."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", hf_deq.ConvergenceWarning)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    ways = {"plain": {}}
    for tolerance in arguments.draft_tolerances:
        ways[f"drafted at {tolerance:g}"] = {"assistant_model": model.draft(tolerance)}
    ways["static cache"] = {"cache_implementation": "static"}
    if arguments.compile:
        everywhere = CompileConfig(mode="default")
        everywhere._compile_all_devices = True  # of its own accord generate compiles on accelerators only
        ways["compiled"] = {"cache_implementation": "static", "compile_config": everywhere}
    return [row for do_sample in (False, True) for row in take_turns(model, ways, do_sample, arguments)]


def take_turns(model, ways: dict[str, dict], do_sample: bool, arguments: BenchmarkArguments) -> list[dict]:
    """Decode in every way, several times over."""
    turns = {name: [] for name in ways}
    for seed in range(arguments.turns + 1):
        for name, way in ways.items():
            torch.manual_seed(seed)
            turns[name].append(decode(model, way, do_sample, arguments.new_tokens))
    plain = min(seconds for seconds, _ in turns["plain"][1:])
    return [
        {"text": "sampled" if do_sample else "greedy", "way": name}
        | {"speed": plain / min(seconds for seconds, _ in measured[1:])}
        | {quantity: statistics.mean(row[quantity] for _, row in measured[1:]) for quantity in measured[0][1]}
        for name, measured in turns.items()
    ]


def decode(model, way: dict, do_sample: bool, new_tokens: int) -> tuple[float, dict[str, float]]:
    """CPU seconds, and what was evaluated."""
    draft, drafted = way.get("assistant_model"), []
    hook = draft and draft.model.register_forward_hook(lambda module, inputs, out: drafted.append(out.num_evaluations))
    started = time.process_time()
    output = model.generate(
        max_new_tokens=new_tokens,
        do_sample=do_sample,
        **({"top_k": 0} if do_sample else {}),
        eos_token_id=None,
        return_dict_in_generate=True,
        **way,
    )
    seconds = time.process_time() - started
    if draft:
        hook.remove()
    passes = len(output.num_evaluations)
    return seconds, {
        "evaluations": torch.cat(output.num_evaluations).sum().item() / new_tokens,
        "of the draft": torch.cat(drafted).sum().item() / new_tokens if draft else 0.0,
        "accepted": (new_tokens - passes) / len(drafted) if draft else float("nan"),
    }


def compare_with_gpt2(arguments: BenchmarkArguments) -> list[dict]:
    """One row for GPT-2, and one for each tolerance."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    gpt2 = explicit_model("gpt2", model.config, arguments.gpt2_layers)
    ways = {f"GPT-2, {arguments.gpt2_layers} layers": (gpt2, {})}
    ways |= {f"tolerance {tolerance:g}": (model, {"solver_tolerance": tolerance}) for tolerance in arguments.tolerances}
    seconds = {way: [] for way in ways}
    for _ in range(arguments.turns + 1):
        for way, (decoder, dial) in ways.items():
            started = time.perf_counter()
            decoder.generate(max_new_tokens=arguments.new_tokens, do_sample=False, eos_token_id=None, **dial)
            seconds[way].append(time.perf_counter() - started)
    best = {way: min(turns[1:]) for way, turns in seconds.items()}
    explicit = best[next(iter(ways))]
    return [
        {"way": way, "ms per token": 1e3 * taken / arguments.new_tokens, "speed": explicit / taken}
        for way, taken in best.items()
    ]


if __name__ == "__main__":
    run(main, __doc__, BenchmarkArguments)
