"""Serve models with Transformers' own server, which speaks the protocol of OpenAI's.

hf-deq serve deq-model --port 8000
hf-deq serve deq-model --continuous-batching --cb-num-blocks 64 --cb-max-batch-tokens 512

The arguments are those of `transformers serve`. That command finds only model classes that are part of Transformers.
This command adds ours, and needs no `--trust-remote-code`.
"""

import sys

import transformers
from transformers.cli.transformers import app

from ..modeling_deq import DEQForCausalLM
from . import with_errors_in_a_line


def main() -> None:
    """Run `transformers serve` with the arguments of this command line."""
    for model_class in DEQForCausalLM.__subclasses__():  # of all families, which the package registers
        setattr(transformers, model_class.__name__, model_class)
    with_errors_in_a_line(serve)


def serve() -> None:
    """Run the server until it is interrupted.

    Raises:
        ValueError: if the packages of the server are not installed.
    """
    try:
        app(["serve", *sys.argv[1:]], prog_name="hf-deq")
    except ImportError as error:
        raise ValueError(f'{error} (or `pip install "hf_deq[serve]"`)') from error


if __name__ == "__main__":
    main()
