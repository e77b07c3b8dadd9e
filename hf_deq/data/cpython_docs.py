"""The built-in corpus: the English documentation that ships inside CPython.

It consists of the topics of the language reference and all docstrings of the standard library. Everything is read with
`ast`. Nothing is imported or run. The text differs between Python versions.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

from .documents import with_progress

# One document in ten goes to the validation part. A hash of its name decides.
VALIDATION_SHARE = 10

# Folders of the standard library that are not documentation for its users.
LEFT_OUT_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "ensurepip",
}


def cpython_docs() -> DatasetDict:
    """Read the documentation of the running Python, with the splits `train` and `validation`.

    Raises:
        ValueError: if the standard library has no documentation.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for name, text in _documents(Path(sysconfig.get_paths()["stdlib"])):
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        splits["train" if number % VALIDATION_SHARE else "validation"].append(text)
    if not splits["train"]:
        raise ValueError(
            f"No documentation found in the standard library of {sys.executable} (is it zipped or stripped?): "
            "name another corpus."
        )
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in splits.items()})


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every topic of the language reference and of every module, in a fixed order."""
    relatives = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    ours = [
        relative
        for relative in relatives
        if not LEFT_OUT_FOLDERS & set(relative.parts) and not relative.parts[0].startswith("config-")
    ]
    for relative in with_progress(ours, "read documentation"):
        tree = _parse(library / relative)
        if tree is None:
            continue
        if relative.parts[:2] == ("pydoc_data", "topics.py"):
            yield from _topics(tree)
        else:
            docstrings = list(_docstrings(tree))
            if docstrings:
                yield relative.as_posix(), "\n\n".join(docstrings)


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # files that test other encodings or old syntax
        return None


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            topics = ast.literal_eval(node)
            yield from ((f"topic {name}", topics[name]) for name in sorted(topics))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring if isinstance(node, ast.Module) else f"{node.name}: {docstring}"
