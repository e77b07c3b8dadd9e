"""Serve models with Transformers' own server, which speaks OpenAI's protocol.

hf-deq serve deq-model --port 8000
hf-deq serve deq-model --continuous-batching --cb-num-blocks 64 --cb-max-batch-tokens 512

The arguments are those of `transformers serve`. That command looks for the class of a model in Transformers itself, so
it does not find the models of other packages. This command shows it ours.
"""

import sys

import transformers
from transformers.cli.transformers import main as transformers_main

from .. import DEQTransformerForCausalLM, DEQTrellisNetForCausalLM


def main() -> None:
    """Run `transformers serve` with the rest of the command line."""
    for model_class in (DEQTransformerForCausalLM, DEQTrellisNetForCausalLM):
        setattr(transformers, model_class.__name__, model_class)
    sys.argv[1:] = ["serve", *sys.argv[1:]]
    transformers_main()


if __name__ == "__main__":
    main()
