"""The cost of a token for a reader of a long context: cached, re-solved, and by explicit models; and a server's memory.

    python scripts/benchmark_serving.py                                       # the shipped models
    python scripts/benchmark_serving.py --contexts 128 1024 --batches 1 16

Every model reads a context of random tokens, and then decodes token by token, greedily. `ms per token` is the median
over `--turns` for the whole batch, and `speed` the time of GPT-2 divided by it. `cached` decodes with a cache.
`re-solved` reads the whole text again for every token, as a model without a cache does. GPT-2 and Llama are new models
of the same width and vocabulary. `cache KB` is what the cache holds for one request at the end, and `weights MB` what
the parameters take: a server needs the weights once, and a cache for each request.
"""

import statistics
import time
import warnings
from dataclasses import dataclass, field

import torch
from benchmarking import SHIPPED, DeviceArguments, explicit_model, load, report, synchronise, title
from torch import Tensor
from transformers import DynamicCache

import hf_deq
from hf_deq.commands import run

RESOLVED_SHARE = 4  # a pass over the whole text takes so long that fewer tokens suffice


@dataclass
class ServingBenchmarkArguments(DeviceArguments):
    """Which models, how long the contexts are, how many requests there are at once."""

    models: list[str] = field(default_factory=lambda: list(SHIPPED), metadata={"help": "Folders of trained models."})
    contexts: list[int] = field(default_factory=lambda: [32, 256, 512], metadata={"help": "Tokens of the context."})
    batches: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Requests at once."})
    tolerance: float = field(default=1e-2, metadata={"help": "Tolerance of the solver."})
    explicit_layers: int = field(default=12, metadata={"help": "Layers of GPT-2 and Llama."})
    new_tokens: int = field(default=8, metadata={"help": "Tokens to decode."})
    turns: int = field(default=3, metadata={"help": "How often."})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16: of the weights."})


@torch.no_grad()
def main(arguments: ServingBenchmarkArguments) -> None:
    warnings.simplefilter("ignore", hf_deq.ConvergenceWarning)
    models = {title(name): load(name) for name in arguments.models}
    like = next(iter(models.values())).config
    layers = arguments.explicit_layers
    models = {f"GPT-2, {layers} layers": explicit_model("gpt2", like, layers)} | models
    models |= {f"Llama, {layers} layers": explicit_model("llama", like, layers)}
    models = {name: model.to(arguments.device, getattr(torch, arguments.dtype)) for name, model in models.items()}
    rows = []
    for context in arguments.contexts:
        for batch in arguments.batches:
            ids = torch.randint(3, like.vocab_size, (batch, context), device=arguments.device)
            rows += compare(models, ids, arguments)
    report("benchmark_serving", rows, arguments)


def compare(models: dict, ids: Tensor, arguments: ServingBenchmarkArguments) -> list[dict]:
    """One row for each model with its cache, and one for each of ours without."""
    ways = {(name, "cached"): model for name, model in models.items()}
    ways |= {(name, "re-solved"): model for name, model in models.items() if is_solved(model)}
    turns: dict[tuple, list[dict]] = {way: [] for way in ways}
    for _ in range(arguments.turns + 1):
        for way, model in ways.items():
            decode = decode_cached if way[1] == "cached" else decode_again
            turns[way].append(decode(model, ids, arguments))
    medians = {way: statistics.median(turn["ms"] for turn in measured[1:]) for way, measured in turns.items()}
    gpt2 = medians[next(iter(ways))]
    return [
        {"context": ids.shape[1], "requests": len(ids), "model": name, "way": way}
        | {"ms per token": medians[name, way], "speed": gpt2 / medians[name, way]}
        | {"evaluations": measured[-1]["evaluations"], "cache KB": measured[-1]["cache"]}
        | {"weights MB": sum(p.numel() * p.element_size() for p in models[name].parameters()) / 1e6}
        for (name, way), measured in turns.items()
    ]


def is_solved(model) -> bool:
    return isinstance(model, hf_deq.modeling_deq.DEQForCausalLM)


def dial(model, arguments: ServingBenchmarkArguments) -> dict:
    return {"solver_tolerance": arguments.tolerance} if is_solved(model) else {}


def decode_cached(model, ids: Tensor, arguments: ServingBenchmarkArguments) -> dict:
    """Read the context, then time the tokens after it."""
    cache = DynamicCache(config=model.config)
    name = "cache" if is_solved(model) else "past_key_values"
    output = model(ids, **{name: cache}, use_cache=True, logits_to_keep=1, **dial(model, arguments))
    evaluations = []
    synchronise()
    started = time.perf_counter()
    for _ in range(arguments.new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, **{name: cache}, use_cache=True, **dial(model, arguments))
        evaluations.append(getattr(output, "num_evaluations", None))
    synchronise()
    seconds = time.perf_counter() - started
    return {"ms": 1e3 * seconds / arguments.new_tokens, "evaluations": mean(evaluations)} | {
        "cache": cache_bytes(cache) / len(ids) / 1e3
    }


def decode_again(model, ids: Tensor, arguments: ServingBenchmarkArguments) -> dict:
    """Read the whole text for every token."""
    evaluations = []
    tokens = max(1, arguments.new_tokens // RESOLVED_SHARE)
    synchronise()
    started = time.perf_counter()
    for _ in range(tokens):
        output = model(ids, use_cache=False, logits_to_keep=1, **dial(model, arguments))
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
        evaluations.append(output.num_evaluations)
    synchronise()
    seconds = time.perf_counter() - started
    return {"ms": 1e3 * seconds / tokens, "evaluations": mean(evaluations), "cache": None}


def mean(evaluations: list) -> float | None:
    return None if evaluations[0] is None else torch.cat(evaluations).double().mean().item()


def cache_bytes(cache: DynamicCache) -> int:
    return sum(state.numel() * state.element_size() for layer in cache.layers for state in (layer.keys, layer.values))


if __name__ == "__main__":
    run(main, __doc__, ServingBenchmarkArguments)
