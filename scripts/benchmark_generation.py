"""Memory and speed of generation against the length of the text: what a constant-size cache is worth.

    python scripts/benchmark_generation.py                       # both models, freshly initialised
    python scripts/benchmark_generation.py --lengths 100 1000    # shorter

Each model generates greedily, batch 1, in a process of its own that reports at each length the bytes its
cache holds, how much the process has grown since it began to generate (peak resident memory), and the
time per token of the last tenth. Weights do not matter to either, so the models are untrained; sizes are equal.
"""

import json
import multiprocessing
import resource
import sys
import time
import warnings
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, HfArgumentParser

import hf_deq
from hf_deq.evaluation import format_table

SIZES = {
    "deq_transformer": {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6},
    "deq_trellisnet": {"hidden_size": 192, "intermediate_size": 192},
}


@dataclass
class BenchmarkArguments:
    """How long the texts are."""

    lengths: list[int] = field(default_factory=lambda: [100, 1_000, 10_000], metadata={"help": "Tokens to generate."})
    model_types: list[str] = field(default_factory=lambda: list(SIZES), metadata={"help": "Which models."})
    vocab_size: int = field(default=2048, metadata={"help": "Size of the vocabulary."})
    solver_tolerance: float = field(default=1e-2, metadata={"help": "Tolerance of the solver."})
    output: str | None = field(default=None, metadata={"help": "Also write the rows to this JSON file."})


def main(arguments: BenchmarkArguments) -> None:
    if min(arguments.lengths) < 10:
        sys.exit(f"error: lengths must be at least 10, since the last tenth is timed; got {arguments.lengths}")
    context, rows = multiprocessing.get_context("spawn"), []
    for model_type in arguments.model_types:
        with ProcessPoolExecutor(1, context) as fresh:  # its peak memory is this model's alone
            rows += fresh.submit(measure, model_type, arguments).result()
    print(format_table(rows))
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(rows, file, indent=1)


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


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(
        BenchmarkArguments, description=__doc__, formatter_class=RawDescriptionHelpFormatter
    ).parse_args_into_dataclasses()
    main(parsed)
