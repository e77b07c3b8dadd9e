"""Perplexity and its kin from sums of negative log-likelihoods."""

import math
from collections.abc import Iterable

LARGEST_EXPONENT = 700  # exp of more overflows


def perplexity_of(
    nats: Iterable[float], counts: Iterable[int], num_words: int | None = None, num_bytes: int | None = None
) -> dict[str, float]:
    """Perplexity exp(nats / tokens), and the same nats shared out among words and bytes.

    Args:
        nats: negative log-likelihoods (natural logarithm), each summed over a batch, a sequence, or of one token.
        counts: tokens that each is the sum over.
        num_words, num_bytes: words and UTF-8 bytes of the text that these tokens spell, if known.

    Returns:
        `perplexity` (per token; infinite where a float cannot hold it), its logarithm `nats_per_token`, and with
        `num_words` and `num_bytes` also `word_perplexity` and `bits_per_byte`.

    Raises:
        ValueError: no tokens were counted, or `num_words` or `num_bytes` is less than 1.
    """
    nats, count = math.fsum(nats), sum(counts)
    if count < 1:
        raise ValueError(f"counts sum to {count}: there is no perplexity without a predicted token.")
    for name, number in (("num_words", num_words), ("num_bytes", num_bytes)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}; leave it out if it is not known.")
    results = {"perplexity": _exp(nats / count), "nats_per_token": nats / count}
    if num_words is not None:
        results["word_perplexity"] = _exp(nats / num_words)
    if num_bytes is not None:
        results["bits_per_byte"] = nats / math.log(2) / num_bytes
    return results


def _exp(nats: float) -> float:
    return math.inf if nats > LARGEST_EXPONENT else math.exp(nats)
