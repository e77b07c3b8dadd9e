"""How forgiving an equilibrium is: eight-bit weights, with and without eight-bit activations.

    python scripts/measure_quantization.py                         # the shipped models, and new explicit ones
    python scripts/measure_quantization.py --models my-model --windows 64

The fixed point of a map that is off by e is off by at most e / (1 - spectral radius). Two ways to make weights smaller:

    int8 weights      every matrix is rounded to 8 bits, with one scale for each output (what weight-only quantisation
                      computes with); embeddings, normalised directions and convolutions too
    int8 dynamic      torch's dynamic quantisation of `nn.Linear`: weights, and the activations in every call

`logits` is the error of the logits relative to their spread, `nats` the loss per token on held-out text (of new models,
random tokens). Dynamic quantisation rounds activations by the largest one in the batch. So f has steps, a solve cannot
get below them, and a later token changes earlier outputs. It is no way to serve an equilibrium.
"""

import copy
import warnings
from dataclasses import dataclass, field

import torch
from benchmarking import SHIPPED, ReportArguments, explicit_model, load, report, title
from torch import Tensor, nn

import hf_deq
from hf_deq.commands import run
from hf_deq.data import read_recipe
from hf_deq.tasks import TextArguments, held_out_text

EXPLICIT = {"gpt2": "GPT-2", "llama": "Llama"}
LEVELS = 127


@dataclass
class QuantizationArguments(ReportArguments):
    """What is quantised, and measured on how much text."""

    models: list[str] = field(default_factory=lambda: list(SHIPPED), metadata={"help": "Folders of trained models."})
    explicit_layers: int = field(default=4, metadata={"help": "Layers of the explicit models, which are new."})
    windows: int = field(default=16, metadata={"help": "Held-out windows."})
    length: int = field(default=128, metadata={"help": "Tokens of a window."})


@torch.no_grad()
def main(arguments: QuantizationArguments) -> None:
    warnings.simplefilter("ignore")  # solves that do not converge are in the table; torch's quantisation is deprecated
    rows = []
    for name in arguments.models:
        text = held_out_text(name, read_recipe(name), TextArguments(length=arguments.length))
        rows += compare(title(name), load(name), text.windows(arguments.windows))
    like = load(arguments.models[0]).config
    for kind, name in EXPLICIT.items():
        ids = torch.randint(3, like.vocab_size, (arguments.windows, arguments.length))
        layers = arguments.explicit_layers
        rows += compare(f"{name}, {layers} new layers", explicit_model(kind, like, layers), ids)
    report("measure_quantization", rows, arguments)


def compare(name: str, model, ids: Tensor) -> list[dict]:
    """One row for each way."""
    ways = {
        "float32": model,
        "int8 weights": with_rounded_weights(model),
        "int8 dynamic": torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8),
    }
    exact, rows = model(ids, use_cache=False).logits, []
    for way, quantised in ways.items():
        output = quantised(ids, use_cache=False)
        nats = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        row = {"model": name, "weights": way, "logits": ((output.logits - exact).std() / exact.std()).item()}
        row |= {"nats": nats, "evaluations": None, "converged": None}
        if isinstance(model, hf_deq.modeling_deq.DEQForCausalLM):
            row |= {"evaluations": output.num_evaluations.double().mean().item()}
            row |= {"converged": output.converged.double().mean().item()}
        rows.append(row)
    return rows


def with_rounded_weights(model):
    """A copy whose matrices have 8 bits for each weight, and one scale for each row."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        if parameter.dim() > 1:
            scale = parameter.flatten(1).abs().amax(1).clamp_min(1e-12) / LEVELS
            scale = scale.view(-1, *[1] * (parameter.dim() - 1))
            parameter.copy_((parameter / scale).round() * scale)
    return rounded


if __name__ == "__main__":
    run(main, __doc__, QuantizationArguments)
