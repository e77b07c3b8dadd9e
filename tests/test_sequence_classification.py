"""Sequence classification, for every model family."""

import copy

import pytest
import torch
from datasets import load_dataset
from families import ATTRACTOR, TRANSFORMER, TRELLISNET, Family, random_ids
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from hf_deq import (
    DEQAttractorForSequenceClassification,
    DEQTransformerForSequenceClassification,
    DEQTrellisNetForSequenceClassification,
    modeling_deq,
)

CLASSIFIERS = {
    "deq_transformer": (TRANSFORMER, DEQTransformerForSequenceClassification),
    "deq_trellisnet": (TRELLISNET, DEQTrellisNetForSequenceClassification),
    "deq_attractor": (ATTRACTOR, DEQAttractorForSequenceClassification),
}
every_kind = pytest.mark.parametrize("kind", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())

# Of each family: other output layers and embeddings than a linear one, which a classifier has to do without.
VARIANTS = [
    (kind, {"num_labels": 3} | kind[0].variants[name])
    for kind, names in zip(
        CLASSIFIERS.values(),
        (
            ("default", "paper", "adaptive"),
            ("default", "cell_scan=False", "num_softmax_experts=3-embedding_size=10"),
            ("default", "published", "scaled"),
        ),
        strict=True,
    )
    for name in names
]
variants = pytest.mark.parametrize("kind, fields", VARIANTS)


def classifier(kind: tuple[Family, type], **fields):
    """A float64 classifier of three labels in evaluation mode, made the same way every time."""
    family, model_class = kind
    torch.manual_seed(0)
    return model_class(family.config(**({"num_labels": 3} | fields))).double().eval()


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Rows `(1, length)` as a batch, with its mask."""
    longest = max(row.shape[1] for row in rows)
    missing = [longest - row.shape[1] for row in rows]
    places = [(gap, 0) if side == "left" else (0, gap) for gap in missing]
    pad = [(F.pad(row, place), F.pad(torch.ones_like(row), place)) for row, place in zip(rows, places, strict=True)]
    ids, mask = (torch.cat(parts) for parts in zip(*pad, strict=True))
    return {"input_ids": ids, "attention_mask": mask}


@variants
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_logits_do_not_depend_on_padding_or_the_batch(kind, fields):
    model = classifier(kind, **fields)
    rows = [random_ids(1, length) for length in (9, 5, 1)]
    for budget in (3, 200):  # a small one, so that agreement is exact by construction and not by convergence
        dial = dict(solver_max_evaluations=budget)
        alone = torch.cat([model(row, **dial).logits for row in rows])
        assert alone.shape == (3, 3)
        for side in ("left", "right"):
            batch = model(**padded(rows, side), **dial)
            assert (batch.logits - alone).abs().max() < 1e-9
            assert batch.residual.shape == batch.num_evaluations.shape == batch.converged.shape == (3,)


@every_kind
@torch.no_grad()
def test_logits_are_the_scores_of_the_last_token(kind):
    model, ids = classifier(kind), random_ids(2, 6)
    ids[0, 4:] = model.config.pad_token_id
    states = model.model(ids).last_hidden_state
    expected = model.score(torch.stack([states[0, 3], states[1, 5]]))
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-12)  # found by pad_token_id
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model.score(states[:, -1]), rtol=0, atol=1e-12)
    mask = (ids != 0).long()
    given = model(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-8)


@every_kind
@torch.no_grad()
def test_a_cache_or_a_memory_goes_before(kind):
    family, _ = kind
    model, ids = classifier(kind, **(family.remembering or {})), random_ids(2, 8)
    whole, first = model(ids).logits, model(ids[:, :5], use_cache=True)
    if family.remembers:
        torch.testing.assert_close(model(ids[:, 5:], memory=first.memory).logits, whole, rtol=0, atol=1e-8)
    cached = model(ids[:, 5:], cache=first.cache, attention_mask=torch.ones(2, 8)).logits
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-8)


@every_kind
def test_packed_texts_are_refused(kind):
    """A row has one score, and packed texts would need one each."""
    with pytest.raises(ValueError, match="several texts are packed into a row.*pass one text a row"):
        classifier(kind)(random_ids(1, 5), position_ids=torch.tensor([[0, 1, 2, 0, 1]]))


@every_kind
def test_several_rows_need_a_padding_token_or_a_mask(kind):
    model, ids = classifier(kind, pad_token_id=None), random_ids(2, 4)
    assert model(ids[:1]).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="pad_token_id is not set.*each of 2 rows.*pass attention_mask"):
        model(ids)
    given = model(ids, attention_mask=torch.ones_like(ids)).logits[:1]
    torch.testing.assert_close(given, model(ids[:1]).logits, rtol=0, atol=1e-9)


@variants
def test_implicit_gradient_equals_200_unrolled_steps(kind, fields):
    batch, labels = padded([random_ids(1, 6), random_ids(1, 4)], "left"), torch.tensor([2, 0])

    def gradients(**how):
        tolerances = dict(solver_tolerance=1e-12, backward_tolerance=1e-12)
        model = classifier(kind, **fields, **tolerances, **how)
        model(**batch, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    implicit, unrolled = gradients(), gradients(gradient="unrolled", solver_max_evaluations=200)
    assert all(gradient is not None for gradient in implicit.values())
    for name, exact in unrolled.items():
        error = torch.linalg.vector_norm(implicit[name] - exact)
        assert error <= 1e-6 * torch.linalg.vector_norm(exact) + 1e-12, name


@pytest.mark.parametrize(
    "fields, labels, expected",
    [
        ({}, torch.tensor([2, -100, 0, 1]), lambda y, t: F.cross_entropy(y, t)),
        ({"num_labels": 1}, torch.tensor([0.5, 1.0, -2.0, 0.0]), lambda y, t: F.mse_loss(y[:, 0], t.double())),
        ({"problem_type": "regression"}, torch.randn(4, 3), lambda y, t: F.mse_loss(y, t)),
        ({}, torch.eye(4)[:, :3], lambda y, t: F.binary_cross_entropy_with_logits(y, t)),
    ],
    ids=["single label", "regression", "several numbers", "multi-label"],
)
def test_losses_and_the_shares_of_micro_batches(fields, labels, expected):
    model = classifier(CLASSIFIERS["deq_transformer"], **fields)
    ids, labels = random_ids(4, 5), labels.double() if labels.is_floating_point() else labels
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.loss, expected(output.logits, labels))
    items = (labels != -100).sum()
    shares = [model(ids[part], labels=labels[part], num_items_in_batch=items).loss for part in ([0], [1, 2, 3])]
    torch.testing.assert_close(sum(shares), output.loss)


@every_kind
def test_jacobian_loss_enters_the_loss(kind):
    ids, labels = random_ids(4, 6), torch.tensor([0, 1, 2, 1])
    assert classifier(kind).train()(ids, labels=labels).jacobian_loss is None
    model = classifier(kind, jacobian_loss_weight=2.0)
    plain = model(ids, labels=labels)
    output = model.train()(ids, labels=labels, num_items_in_batch=8)
    assert plain.jacobian_loss is None
    torch.testing.assert_close(output.loss, 0.5 * (plain.loss + 2.0 * output.jacobian_loss))


@every_kind
def test_a_jacobian_loss_that_is_left_out_is_said(kind, caplog):
    modeling_deq.logger.warning_once.cache_clear()
    model = classifier(kind, jacobian_loss_weight=2.0).train()
    assert model(random_ids(4, 6)).loss is None
    assert "jacobian_loss_weight is set, but the loss is computed outside of the model" in caplog.text


@every_kind
def test_return_dict_false_and_misspelt_dials(kind):
    model, ids = classifier(kind), random_ids(1, 4)
    output = model(ids, labels=torch.tensor([1]), output_hidden_states=True)
    assert len(output.hidden_states) == 2 + getattr(model.config, "num_prelude_layers", 0)
    assert model(ids, labels=torch.tensor([1]), return_dict=False)[0] == output.loss
    with pytest.raises(TypeError, match="no argument 'solver_tolerence'"):
        model(ids, solver_tolerence=1e-2)


@variants
def test_round_trip_is_bitwise(kind, fields, tmp_path):
    model, ids = classifier(kind, **fields), random_ids(2, 6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is kind[1]
    # A copy, since a loaded weight lies in its file's memory, at any address, and kernels round by alignment.
    assert torch.equal(copy.deepcopy(loaded)(ids).logits, model(ids).logits)


@every_kind
def test_a_language_model_becomes_a_classifier(kind, tmp_path):
    """Its weights are kept, and only the scores are new."""
    family, model_class = kind
    language_model, ids = family.model(), random_ids(2, 6)
    language_model.save_pretrained(tmp_path)
    how = dict(num_labels=5, dtype=torch.float64, output_loading_info=True)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, **how)
    assert type(loaded) is model_class and set(report["missing_keys"]) == {"score.weight"}
    states = copy.deepcopy(loaded).model(ids).last_hidden_state
    assert torch.equal(states, language_model.model(ids).last_hidden_state)
    assert loaded(ids).logits.shape == (2, 5) and 0 < loaded.score.weight.std() < 1


@every_kind
def test_fine_tuning_on_a_csv_file(kind, tmp_path):
    """Which end of a text has the greater letter: a model has to read both."""
    pairs = [(first, second) for first in "abcd" for second in "efgh"]
    texts = [first + "".join(middle) + second for first, second in pairs for middle in ("xy", "z")]
    lines = [f"{text if i % 2 else text[::-1]},{i % 2}" for i, text in enumerate(texts)]
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n" + "\n".join(lines))
    data = load_dataset("csv", data_files=str(path), cache_dir=str(tmp_path / "cache"))["train"]
    rows = [torch.tensor([[ord(letter) - ord("a") + 3 for letter in text]]) for text in data["text"]]
    batch, labels = padded(rows, "right"), torch.tensor(data["label"])
    model = classifier(kind, num_labels=2, solver_tolerance=1e-3, backward_tolerance=1e-2).float().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    assert torch.equal(model.eval()(**batch).logits.argmax(-1), labels)


def test_a_prepared_mask_of_a_sliding_window_says_which_token_is_last():
    model, ids = classifier(CLASSIFIERS["deq_transformer"], sliding_window=3), random_ids(1, 8)
    window = torch.ones(8, 8).tril().triu(-2).bool()[None, None]
    prepared = model(ids, attention_mask=window, use_cache=False).logits
    torch.testing.assert_close(prepared, model(ids, use_cache=False).logits, rtol=0, atol=1e-12)
