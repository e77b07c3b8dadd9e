"""The perplexity metric against numbers worked out by hand, and as the `evaluate` library loads it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

import hf_deq
from hf_deq.evaluation.perplexity.formula import perplexity_of

FOLDER = Path(hf_deq.__file__).parent / "evaluation" / "perplexity"

# Four tokens of probability 1/2, 1/8, 1/4 and 1/4, in batches of one and three: a factor of 2 ** 8 altogether.
NATS, COUNTS = [math.log(2), 7 * math.log(2)], [1, 3]


def test_by_hand():
    results = perplexity_of(NATS, COUNTS, num_words=2, num_bytes=16)
    expected = {"perplexity": 4.0, "nats_per_token": 2 * math.log(2), "word_perplexity": 16.0, "bits_per_byte": 0.5}
    assert results == pytest.approx(expected, rel=1e-12)
    assert set(perplexity_of(NATS, COUNTS)) == {"perplexity", "nats_per_token"}
    assert perplexity_of([1e6], [1])["perplexity"] == math.inf
    assert math.isnan(perplexity_of([math.nan], [1])["perplexity"])


def test_nothing_counted_is_refused():
    with pytest.raises(ValueError, match="counts sum to 0: there is no perplexity"):
        perplexity_of([], [])
    with pytest.raises(ValueError, match="num_words must be at least 1, got 0; leave it out"):
        perplexity_of(NATS, COUNTS, num_words=0)


def test_loaded_by_the_library(tmp_path):
    metric = evaluate.load(str(FOLDER), cache_dir=str(tmp_path))
    for nats, count in zip(NATS, COUNTS, strict=True):
        metric.add_batch(nats=[nats], counts=[count])
    assert metric.compute(num_words=2, num_bytes=16) == perplexity_of(NATS, COUNTS, 2, 16)
    assert metric.compute(nats=NATS, counts=COUNTS) == perplexity_of(NATS, COUNTS)
    assert "num_bytes" in metric.inputs_description


def test_the_package_computes_perplexities_without_the_library():
    """It is slow to import, and a script called evaluate.py would be taken for it by its neighbours."""
    code = "import sys, hf_deq.evaluation, hf_deq.tasks; sys.exit('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.slow
def test_loaded_offline_where_the_package_is_not(tmp_path):
    """From the folder alone, in a process that has neither the network, nor caches, nor this repository's path."""
    code = (
        "import evaluate, json, sys; metric = evaluate.load(sys.argv[1]); "
        f"print(json.dumps(metric.compute(nats={NATS}, counts={COUNTS}, num_bytes=16)))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    finished = subprocess.run(
        [sys.executable, "-c", code, str(FOLDER)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1]) == pytest.approx(perplexity_of(NATS, COUNTS, num_bytes=16))
