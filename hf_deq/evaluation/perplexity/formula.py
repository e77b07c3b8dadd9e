"""Perplexity and related scores from sums of negative log-likelihoods."""

import math
from collections.abc import Iterable

LARGEST_EXPONENT = 700  # exp of a larger number overflows


def perplexity_of(
    nats: Iterable[float], counts: Iterable[int], num_words: int | None = None, num_bytes: int | None = None
) -> dict[str, float]:
    """Return the perplexity exp(nats / tokens), and the same nats divided among words and bytes.

    Args:
        nats: negative log-likelihoods (natural logarithm), each of one token or summed over a sequence or a batch.
        counts: for each entry of `nats`, the number of tokens in the sum.
        num_words, num_bytes: number of words and of UTF-8 bytes in the text of these tokens, if known.

    Returns:
        `perplexity` per token (infinite if it is too large for a float), and its logarithm `nats_per_token`. With
        `num_words` also `word_perplexity`, and with `num_bytes` also `bits_per_byte`.

    Raises:
        ValueError: if no tokens were counted, or if `num_words` or `num_bytes` is less than 1.
    """
    total, count = math.fsum(nats), sum(counts)
    if count < 1:
        raise ValueError(f"counts sum to {count}: there is no perplexity without a predicted token.")
    for name, number in (("num_words", num_words), ("num_bytes", num_bytes)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}; leave it out if it is not known.")
    results = {"perplexity": _exp(total / count), "nats_per_token": total / count}
    if num_words is not None:
        results["word_perplexity"] = _exp(total / num_words)
    if num_bytes is not None:
        results["bits_per_byte"] = total / math.log(2) / num_bytes
    return results


def _exp(nats: float) -> float:
    return math.inf if nats > LARGEST_EXPONENT else math.exp(nats)
