"""How a script of `scripts/` begins: its dataclass of arguments as flags, and what is wrong with them in one line."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable

from transformers import HfArgumentParser


def run_script(main: Callable, arguments: type, description: str, **positional: str) -> None:
    """Call `main(*positional, arguments)` with what the command line says.

        run_script(main, EvaluateArguments, __doc__, model="Model folder or Hub repository.")

    A `ValueError` or `OSError` ends the script with status 1 and its message on stderr.

    Args:
        main: the work.
        arguments: a dataclass; its fields are the flags.
        description: what `--help` says first, printed as it is.
        positional: names of the arguments without a flag, in order, and what `--help` says of them.
    """
    parser = HfArgumentParser(arguments, description=description, formatter_class=RawDescriptionHelpFormatter)
    for name, help_text in positional.items():
        parser.add_argument(name, help=help_text)
    flags, *others = parser.parse_args_into_dataclasses()
    try:
        main(*(getattr(others[0], name) for name in positional), flags)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
