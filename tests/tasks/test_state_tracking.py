"""State tracking: the groups are groups, the targets are products, and accuracy is counted where it should be."""

import itertools
import math

import pytest
import torch
from accelerate.state import AcceleratorState

from hf_deq.commands.evaluate import held_out_of
from hf_deq.evaluation import load_model
from hf_deq.tasks import StateTrackingArguments
from hf_deq.tasks.state_tracking import MOVED, HeldOutWords, StateTrackingEvaluation, Words, multiplication_table
from hf_deq.training import RunArguments, train

every_group = pytest.mark.parametrize("group", MOVED)


@every_group
def test_the_table_is_that_of_a_group(group):
    table = multiplication_table(MOVED[group])
    order = len(table)
    assert order == {"parity": 2, "s3": 6, "s5": 120}[group]
    everything = torch.arange(order)
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything)  # the identity
    assert torch.equal(table.sort(0).values, everything[:, None].expand(order, order))  # one solution of x b = c
    assert torch.equal(table.sort(1).values, everything.expand(order, order))
    triples = torch.randint(order, (500, 3))
    a, b, c = triples.unbind(1)
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])  # associative
    assert torch.equal(table, table.T) == (group == "parity")


def test_a_product_applies_one_permutation_after_the_other():
    elements = list(itertools.permutations(range(3)))
    table = multiplication_table(3)
    for (a, first), (b, second) in itertools.product(enumerate(elements), repeat=2):
        assert elements[table[a, b]] == tuple(second[first[i]] for i in range(3))


@every_group
def test_labels_are_the_products_up_to_each_position(group):
    words = Words(group, length=12, size=20, seed=3)
    for example in map(words.__getitem__, range(20)):
        product = 0
        for element, label in zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True):
            product = words.table[product, element].item()
            assert product == label


def test_parity_is_the_parity_of_the_ones():
    example = Words("parity", length=30, size=1, seed=0)[0]
    assert torch.equal(example["labels"], example["input_ids"].cumsum(0) % 2)


def test_training_and_test_words_differ_and_follow_their_seeds():
    held_out = HeldOutWords.longer(StateTrackingArguments("s5", 8), words=10)
    assert held_out.lengths == [8, 16, 32, 64] and held_out.examples.length == 64
    assert torch.equal(held_out.examples.elements, Words("s5", 64, 10, seed=1).elements)
    assert not torch.equal(Words("s5", 64, 10, seed=0).elements, held_out.examples.elements)


def test_accuracy_is_counted_in_the_last_quarter_of_each_length():
    held_out = HeldOutWords.longer(StateTrackingArguments("s3", 8), words=2)
    labels = torch.randint(6, (2, 64))
    logits = torch.nn.functional.one_hot(labels, 6).double() * 50
    loss, *accuracies = held_out.measure(logits, labels)
    assert loss.max() < 1e-9 and torch.stack(accuracies).eq(1).all()
    wrong = labels.clone()
    wrong[0, 6:8] = (wrong[0, 6:8] + 1) % 6  # the last quarter of 8
    wrong[1, 48] = (wrong[1, 48] + 1) % 6  # one of the last 16 of 64
    accuracies = torch.stack(held_out.measure(torch.nn.functional.one_hot(wrong, 6).double(), labels)[1:].unbind())
    assert accuracies.tolist() == [[0, 1], [1, 1], [1, 1], [1, 15 / 16]]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="group must be one of parity, s3, s5, got 's4'"):
        StateTrackingArguments(group="s4")
    with pytest.raises(ValueError, match="word_length must be at least 1, got 0"):
        StateTrackingArguments(word_length=0)


SIZES = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
MODELS = {
    "deq_transformer": SIZES,
    "deq_trellisnet": dict(hidden_size=16, intermediate_size=16),
    "deq_attractor": SIZES | dict(num_hidden_layers=2, num_prelude_layers=1),
    "llama": SIZES | dict(num_hidden_layers=1),
}


def learn(folder, model_type: str, fields: dict, steps: int) -> dict:
    AcceleratorState._reset_state(True)
    run = RunArguments(str(folder), max_steps=steps, warmup_steps=1, batch_size=32, learning_rate=2e-2, num_threads=1)
    return train(StateTrackingArguments("parity", 4), run, fields, model_type)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_family_learns_and_is_judged_on_it(model_type, tmp_path, capsys):
    result = learn(tmp_path, model_type, MODELS[model_type], 20)
    assert result["guessed_accuracy"] == 0.5
    assert result["validation_loss"] < 0.85 * math.log(2)  # of guessing; a new model has more
    assert "right products in the last quarter of a word" in capsys.readouterr().out
    held_out = held_out_of(str(tmp_path), StateTrackingEvaluation())
    scores = held_out.score(load_model(str(tmp_path)))
    assert scores["accuracy"] == pytest.approx(result["validation_accuracy"], abs=1e-9)
    assert "words of up to 32 elements, trained on words of 4" in held_out.describe(scores, None)


@pytest.mark.slow
def test_with_more_evaluations_a_trellisnet_multiplies_longer_words(tmp_path):
    """An evaluation carries the state on by a position: the budget decides how long a word may be."""
    learn(tmp_path, "deq_trellisnet", MODELS["deq_trellisnet"] | {"solver_max_evaluations": 12}, 300)
    model, held_out = load_model(str(tmp_path)), held_out_of(str(tmp_path), StateTrackingEvaluation(words=50))
    few, many = (held_out.score(model, solver_max_evaluations=n, solver_tolerance=0.0) for n in (6, 64))
    assert few["accuracy"] > 0.95 and few["accuracy_8x"] < 0.7
    assert many["accuracy_8x"] > 0.95
