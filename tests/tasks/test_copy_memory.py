"""The copy memory task: the two published variants, and what it is worth to know nothing."""

import math

import pytest
import torch

from hf_deq.tasks.copy_memory import CopyMemory


@pytest.mark.parametrize("variant, signs", [("deq", [9] + [0] * 10), ("tcn", [9] * 11)])
def test_sequences_are_as_published(variant, signs):
    example = CopyMemory(delay=5, variant=variant)[3]
    inputs, labels = example["input_ids"].tolist(), example["labels"].tolist()
    assert len(inputs) == len(labels) == 25
    assert all(1 <= symbol <= 8 for symbol in inputs[:10])
    assert inputs[10:14] == [0] * 4 and inputs[14:] == signs
    assert labels == [0] * 15 + inputs[:10]


def test_sizes_are_as_published():
    sizes = [len(CopyMemory(5, variant, split)) for variant in ("deq", "tcn") for split in ("train", "test")]
    assert sizes == [20_000, 2_000, 10_000, 1_000]


def test_sequences_follow_the_seed_and_splits_differ():
    def symbols(**how):
        return CopyMemory(5, size=50, **how).symbols

    assert torch.equal(symbols(seed=1), symbols(seed=1))
    assert not torch.equal(symbols(seed=1), symbols(seed=2))
    assert not torch.equal(symbols(split="train"), symbols(split="test"))
    assert symbols().unique().tolist() == list(range(1, 9))


def test_the_memoryless_loss_is_that_of_guessing_the_symbols():
    examples = CopyMemory(delay=30, size=10)
    logits = torch.full((50, 10), -1e9)
    logits[:40, 0] = 0  # blank until the sign, then any of the symbols
    logits[40:, 1:9] = 0
    loss = torch.nn.functional.cross_entropy(logits, examples[0]["labels"])
    assert examples.memoryless_loss == pytest.approx(loss.item(), rel=1e-5) == 10 * math.log(8) / 50


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"copy_variant must be one of \['deq', 'tcn'\], got 'rnn'"):
        CopyMemory(5, variant="rnn")
    with pytest.raises(ValueError, match="copy_delay must be at least 1, got 0"):
        CopyMemory(0)
