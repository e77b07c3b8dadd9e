"""The folder of a run: it can be written to, holds one run, and belongs to one training at a time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..evaluation import FIGURES
from .arguments import RunArguments

# What a run writes at its end: the model, and some of the files of a tokenizer.
OF_A_MODEL = (
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)


def writable_folder(output_dir: str) -> Path:
    """Make the folder, if it is not there.

    Raises:
        OSError: if it cannot be written to.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"output_dir {output_dir!r} cannot be written to ({error.strerror}); choose another.") from error
    return folder


def check_free(folder: Path, run: RunArguments, tokenizer: str | None = None) -> None:
    """Refuse a folder that holds a run, unless the run is to be continued or overwritten.

    Args:
        folder: of the run.
        run: its arguments.
        tokenizer: where the tokenizer comes from, if not from `run.init_from` or the corpus.

    Raises:
        ValueError: if it does; or if the run starts from the folder that it would overwrite.
    """
    for name, source in (("init_from", run.init_from), ("tokenizer", tokenizer)):
        if run.overwrite and source is not None and Path(source).resolve() == folder.resolve():
            raise ValueError(f"{name}={source!r} is what --overwrite would remove: choose another output_dir.")
    if not (run.resume or run.overwrite) and _holds_a_run(folder):
        raise ValueError(
            f"output_dir {str(folder)!r} holds another run: continue it with --resume, begin anew with --overwrite, or "
            "choose another output_dir."
        )


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """Within this context no other training can write to the folder.

    Raises:
        ValueError: if another training writes to it.
        OSError: if it cannot be locked, as on some file systems.
    """
    return locked(
        folder / ".training",
        f"another training runs in {str(folder)!r}: wait for its end, or choose another output_dir.",
    )


@contextmanager
def locked(place: Path, refusal: str) -> Iterator[None]:
    """Within this context no other process can lock this file. The system frees it if the process is killed.

    Args:
        place: a file of no other use. It stays.
        refusal: what to say if another process has locked it.

    Raises:
        ValueError: if another process has locked it.
        OSError: if it cannot be locked, as on some file systems.
    """
    lock = FileLock(place, mode=0o666)  # another user may train there later
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(refusal) from error
    except (OSError, NotImplementedError) as error:
        raise OSError(
            f"{str(place.parent)!r} cannot be locked, so two runs in it could not be kept apart ({error}): choose "
            "another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def remove_model(folder: Path) -> None:
    """Remove an earlier model and its tokenizer, and what evaluations and figures say of it."""
    results = ("results.json", *(f"{figure}.{kind}" for figure in FIGURES for kind in ("png", "json")))
    for file in [file for name in (*OF_A_MODEL, *results) for file in folder.glob(name)]:
        file.unlink()


def _holds_a_run(folder: Path) -> bool:
    """Whether a run has left something in a folder."""
    names = ("metrics.jsonl", "recipe.yaml", "config.json", "checkpoints")
    return any((folder / name).exists() for name in names)
