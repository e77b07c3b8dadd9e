"""Documents of a corpus, one in a row of the column `text`: read in batches, with a progress bar."""

import os
from collections.abc import Iterator

from datasets import Dataset
from tqdm.auto import tqdm

DOCUMENTS_PER_BATCH = 1000


def with_progress(items, doing: str, total: int | None = None) -> tqdm:
    """Return the items with a progress bar, which appears after five seconds and only in the first process."""
    elsewhere = int(os.environ.get("LOCAL_RANK", 0)) > 0
    return tqdm(items, desc=doing, total=total, leave=False, delay=5, disable=elsewhere)


def batches_of_documents(split: Dataset, doing: str) -> Iterator[list[str]]:
    """The column `text` in batches, with progress. Reading it row by row takes ten times as long."""
    batches = split.iter(batch_size=DOCUMENTS_PER_BATCH)
    total = -(-len(split) // DOCUMENTS_PER_BATCH)
    for batch in with_progress(batches, doing, total):
        yield batch["text"]
