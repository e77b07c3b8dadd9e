"""Local files as documents or lines. They are opened under the very name that was given, and read anew every time."""

import codecs
import glob
import re
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset

BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
# Files of rows, and what `datasets` calls their format.
ROW_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read_documents(file: str | Path, column: str = "text") -> Dataset:
    """Read the documents of a local file, in the column `text`.

    Blank lines separate the documents of a text file. In a text file without blank lines between its texts, every line
    is a document.

    Args:
        file: a text file in UTF-8, or rows in one of `ROW_FORMATS`.
        column: of the rows, which is read.

    Raises:
        ValueError: if there is no such file, or it cannot be read, has no text, or has no such column.
    """
    if Path(file).suffix in ROW_FORMATS:
        return _read_rows(Path(file), column)
    text = read_text(file)
    parts = [part for part in BLANK_LINES.split(text) if part.strip()]
    if len(parts) == 1:
        parts = parts[0].split("\n")
    documents = [part.strip("\n") for part in parts if part.strip()]
    if not documents:
        raise ValueError(f"{str(file)!r} has no text in it.")
    return Dataset.from_dict({"text": documents})


def read_lines(file: str | Path) -> Dataset:
    """Read the lines of a text file, also the empty ones, in the column `text`.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    lines = read_text(file).split("\n")
    return Dataset.from_dict({"text": lines[:-1] if lines[-1] == "" else lines})


def read_text(file: str | Path) -> str:
    """Read a text file in UTF-8. A byte order mark is dropped, and every line ends in a line feed.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    if not Path(file).is_file():
        raise ValueError(f"{str(file)!r} does not exist, or is not a file.")
    content = Path(file).read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = (
            f"it seems to be {encoding}" if encoding else f"byte {content[error.start]:#04x} at {error.start:,} is not"
        )
        raise ValueError(
            f"{str(file)!r} is not text in UTF-8 ({found}): convert it, for example by "
            f"`iconv -f {encoding or 'LATIN1'} -t UTF-8`."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_rows(file: Path, column: str) -> Dataset:
    if not file.is_file():
        raise ValueError(f"{str(file)!r} does not exist, or is not a file.")
    if "::" in str(file):
        raise ValueError(f"{str(file)!r} has '::' in its name, which `datasets` takes for an archive: rename it.")
    with tempfile.TemporaryDirectory() as cache:  # the cache of `datasets` would not see every change of the file
        try:
            rows = load_dataset(
                ROW_FORMATS[file.suffix],
                data_files=glob.escape(str(file)),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            )
        except Exception as error:  # which errors there are depends on the format's own reader
            cause = error.__cause__ or error
            raise ValueError(f"{str(file)!r} cannot be read as {ROW_FORMATS[file.suffix]}: {cause}") from error
    if column not in rows.column_names:
        raise ValueError(f"{str(file)!r} has no column {column!r}; it has {rows.column_names}: set text_column.")
    texts = [text for text in rows[column] if text]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{str(file)!r} has no text in its column {column!r}.")
    return Dataset.from_dict({"text": texts})
