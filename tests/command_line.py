"""Commands, run in this process as a user would run the scripts."""

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[1]
TINY_TRELLISNET = [
    *("--max_steps", "30", "--warmup_steps", "2", "--sample_tokens", "8", "--shallow_steps", "0"),
    *("--hidden_size", "32", "--intermediate_size", "64", "--vocab_size", "300", "--sequence_length", "16"),
    *("--num_threads", "1"),  # other tests run on the other cores
]
TINY = [*TINY_TRELLISNET, "--num_attention_heads", "2"]


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def script(name, *arguments) -> Finished:
    """Run a script in this process, which has paid for the imports already."""
    AcceleratorState._reset_state(True)
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [str(ROOT / "scripts" / name), *map(str, arguments)]
    sys.path.insert(0, str(ROOT / "scripts"))  # as Python does; the benchmarks share a module there
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        err.write("" if isinstance(stop.code, int) else str(stop.code))
    finally:
        sys.argv = argv
        sys.path.remove(str(ROOT / "scripts"))
        AcceleratorState._reset_state(True)
    return Finished(code, out.getvalue(), err.getvalue())
