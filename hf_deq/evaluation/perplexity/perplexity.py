"""Perplexity from negative log-likelihoods, as a metric of the `evaluate` library.

    metric = evaluate.load("path/to/hf_deq/evaluation/perplexity")
    for batch in batches:
        metric.add_batch(nats=[...], counts=[...])      # for each batch, sequence or token
    metric.compute(num_words=1000, num_bytes=5000)

The formula is in `formula.py`. It can be used directly, without the library and the files that the library writes to
disk. This folder imports nothing from the rest of the package, because the library loads a copy of the folder.
"""

import datasets
import evaluate

from .formula import perplexity_of

DESCRIPTION = """\
Perplexity exp(nats / tokens), where nats is the sum of the negative natural logarithms of the probabilities that a
language model gave to each of the tokens (Jelinek et al. 1977). It depends on the tokenizer; word perplexity and bits
per byte share the same nats out among words or bytes of the text and compare between tokenizers."""

INPUTS = """
Args:
    nats (float): negative log-likelihood, summed over the tokens of a batch, a sequence, or of one token.
    counts (int): tokens that it is the sum over.
    num_words (int, optional): words of the text that these tokens spell.
    num_bytes (int, optional): UTF-8 bytes of the text that these tokens spell.
Returns:
    perplexity: per token; infinite where a float cannot hold it.
    nats_per_token: its natural logarithm.
    word_perplexity: per word, if num_words is given.
    bits_per_byte: if num_bytes is given.
Raises:
    ValueError: no tokens were counted, or num_words or num_bytes is less than 1.
"""


class Perplexity(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"nats": datasets.Value("float64"), "counts": datasets.Value("int64")}),
        )

    def _compute(self, nats, counts, num_words=None, num_bytes=None) -> dict[str, float]:
        return perplexity_of(nats, counts, num_words, num_bytes)
