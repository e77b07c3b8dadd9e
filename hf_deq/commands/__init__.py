"""The command line: `hf-deq train | evaluate | generate | serve | convert | retrofit | push | plot`.

Each command is a module here, and a script in `scripts/` of the same work. A command only reads arguments and prints.
"""

import importlib
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

COMMANDS = {
    "train": "train a model",
    "evaluate": "perplexity of a trained model, and what the equilibrium contributes",
    "generate": "continue a text",
    "serve": "answer requests over HTTP, as `transformers serve` does",
    "convert": "turn a checkpoint of the authors' code into a model folder",
    "retrofit": "make an Attractor model of a pretrained decoder",
    "push": "put a trained model on the Hub",
    "plot": "draw the paper's figures from your own runs",
}
USAGE = "usage: hf-deq COMMAND ...\n\n" + "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
USAGE += "\n\n`hf-deq COMMAND --help` lists the arguments of a command."


def main() -> None:
    """Run the command that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(USAGE)
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}\n\n{USAGE}")
    del sys.argv[1]
    sys.argv[0] = f"hf-deq {name}"
    importlib.import_module(f"{__package__}.{name}").main()


def parse(description: str, *arguments: type, **positional: str) -> tuple:
    """Read the command line.

    Args:
        description: what `--help` says first, printed as it is.
        arguments: dataclasses; their fields are the flags.
        positional: names of the arguments without a flag, in order, and what `--help` says about each.

    Returns:
        The values of the positional arguments, then an instance of each dataclass.

    Raises:
        ValueError: if a dataclass refuses a value.
    """
    parser = HfArgumentParser(arguments, description=description, formatter_class=RawDescriptionHelpFormatter)
    for name, help_text in positional.items():
        parser.add_argument(name, help=help_text)
    flags = parser.parse_args_into_dataclasses()
    others = flags[-1]  # a namespace, if there are positional arguments
    return *(getattr(others, name) for name in positional), *flags[: len(arguments)]


def first_argument(argv: Sequence[str]) -> str | None:
    """The first argument of a command line, if it is not a flag."""
    return argv[0] if argv and not argv[0].startswith("-") else None


def check_folder(name: str, what: str) -> None:
    """Refuse a path where there is no folder. Any other name may be one on the Hub.

    Raises:
        ValueError: if there is none. The message says `what` it should be.
    """
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"{what}: there is no folder {name!r}.")


def with_errors_in_a_line(work: Callable[[], None]) -> None:
    """Do the work. Bad input ends it with a message on stderr, not with a traceback.

    The exit status is 1, unless the error has an `exit_status` of its own.
    """
    try:
        work()
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))


def run(work: Callable, description: str, *arguments: type, **positional: str) -> None:
    """Read the command line as in `parse`, and call `work` with what it says."""
    with_errors_in_a_line(lambda: work(*parse(description, *arguments, **positional)))
