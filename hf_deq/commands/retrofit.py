"""Make an Attractor model of a pretrained decoder with the layers of Llama.

    hf-deq retrofit my-llama --num_prelude_layers 4 --num_head_layers 1 --output_dir retrofitted
    hf-deq train --init_from retrofitted --corpus my_text.txt

The first layers become the prelude, the next ones the head. The others are left out. The result needs training: the
second command heals it.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..hub.export import require_empty
from ..hub.retrofit import retrofit
from . import run


@dataclass
class RetrofitArguments:
    """Which layers become what, and where to."""

    num_prelude_layers: int = field(metadata={"help": "Layers that become the prelude: the first ones."})
    num_head_layers: int = field(default=1, metadata={"help": "Layers that become the head: the next ones."})
    output_dir: str = field(default="retrofitted-model", metadata={"help": "New or empty folder for the model."})


def main() -> None:
    """Retrofit as the command line says."""
    run(make, __doc__, RetrofitArguments, model="Model folder or Hub repository.")


def make(folder: str, options: RetrofitArguments) -> None:
    """Write the folder of the retrofitted model, and say how it is solved as it is.

    Raises:
        ValueError: if the output folder is not empty.
    """
    require_empty("output_dir", options.output_dir)
    original = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = retrofit(original, options.num_prelude_layers, options.num_head_layers)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    print(
        f"{options.output_dir}: {model.config.model_type} of {model.num_parameters():,} parameters, made of "
        f"{original.num_parameters():,}"
    )
    with torch.no_grad():
        output = model(**tokenizer("The number of items in a list.", return_tensors="pt"), use_cache=False)
    print(
        f"a text of one sentence: {output.num_evaluations[0]} evaluations to a residual of {output.residual[0]:.1e}, "
        f"{'converged' if output.converged[0] else 'not converged'} (tolerance {model.config.solver_tolerance:g})"
    )


if __name__ == "__main__":
    main()
