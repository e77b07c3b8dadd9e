"""Continue a text with a trained model, and say how many evaluations of f it took.

hf-deq generate deq-model --prompt "The iterator " --max_new_tokens 100
hf-deq generate deq-model --prompt "The iterator " --solver_tolerance 1e-2 --do_sample false
"""

import sys
import time
from dataclasses import dataclass, field

import torch
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from ..data import check_at_least, unknown_words
from ..evaluation import check_finite, check_positions, load_model, load_tokenizer
from . import check_folder, run

logger = logging.get_logger(__name__)


@dataclass
class GenerateArguments:
    """What to continue and how."""

    prompt: str = field(default="The ", metadata={"help": "Text to continue."})
    max_new_tokens: int = field(default=100, metadata={"help": "Length of the continuation."})
    do_sample: bool = field(default=True, metadata={"help": "Sample; false takes the likeliest token."})
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus sampling mass."})
    top_k: int = field(default=0, metadata={"help": "Sample among this number of tokens; 0: all."})
    num_beams: int = field(default=1, metadata={"help": "Beams of beam search; 1 does not search."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    solver_tolerance: float | None = field(
        default=None, metadata={"help": "Tolerance of the solver; default: the model's."}
    )
    solver_max_evaluations: int | None = field(
        default=None, metadata={"help": "Budget of the solver; default: the model's."}
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ...; auto is what was saved."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu, cuda, mps."})

    def __post_init__(self):
        check_at_least(1, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)
        check_at_least(1, solver_max_evaluations=self.solver_max_evaluations)
        check_at_least(0, top_k=self.top_k, seed=self.seed, solver_tolerance=self.solver_tolerance)
        check_at_least(0, temperature=self.temperature)
        if self.temperature == 0:
            raise ValueError("temperature must be positive; for the likeliest token use --do_sample false.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")


def main() -> None:
    """Generate as the command line says."""
    run(generate, __doc__, GenerateArguments, model="Model folder or Hub repository.")


def generate(model_folder: str, arguments: GenerateArguments) -> None:
    """Print the continuation of a prompt."""
    set_seed(arguments.seed)
    check_folder(model_folder, "model")
    model = load_model(model_folder, arguments.device, dtype=arguments.dtype).eval()
    check_finite(model)
    tokenizer = load_tokenizer(model_folder)
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not text in UTF-8: convert it, or set the locale to UTF-8.") from None
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one character with --prompt")
    if strange := unknown_words(arguments.prompt, tokenizer):
        logger.warning(
            f"The tokenizer does not know {', '.join(map(repr, strange))} and reads {tokenizer.unk_token} instead: "
            "write the prompt as the corpus is written (in lower case, perhaps)."
        )
    length = inputs["input_ids"].shape[1] + arguments.max_new_tokens - 1  # the last token is not read
    check_positions(model.config, "what the prompt and max_new_tokens need", length, "lower max_new_tokens")
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
    dial = {"solver_tolerance": arguments.solver_tolerance, "solver_max_evaluations": arguments.solver_max_evaluations}
    started = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.do_sample,
        num_beams=arguments.num_beams,
        return_dict_in_generate=True,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if arguments.num_beams == 1 else None,
        **(sampling if arguments.do_sample else {}),
        **{name: value for name, value in dial.items() if value is not None},
    )
    seconds = time.perf_counter() - started
    if arguments.num_beams > 1:
        print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    print(f"\n{new} tokens in {seconds:.1f} s ({new / seconds:.1f} tokens/s){solves(output)}", file=sys.stderr)


def solves(output) -> str:
    """What the solves took, in words; nothing for an explicit model."""
    if not hasattr(output, "num_evaluations"):
        return ""
    prefill, *steps = (evaluations.float().mean().item() for evaluations in output.num_evaluations)
    per_token = f", {sum(steps) / len(steps):.1f} per new token" if steps else ""
    how = "all solves converged" if torch.cat(output.converged).all() else "NOT all solves converged"
    return f"; evaluations of f: {prefill:.1f} for the prompt{per_token}; {how}"


if __name__ == "__main__":
    main()
