"""DEQ-TrellisNet: the laws of the house, and its equations."""

import pytest
import torch
from families import TRELLISNET, random_ids
from generation_laws import GenerationLaws
from memory_laws import MemoryLaws
from model_laws import ModelLaws
from transformers import DynamicCache

from hf_deq import modeling_deq_trellisnet
from hf_deq.evaluation.activations import saved_bytes
from hf_deq.evaluation.operation_counts import CountOperations
from hf_deq.modeling_deq_trellisnet import linear_recurrence
from hf_deq.packed_texts import Texts
from hf_deq.weight_tying import CausalConvolution


class TestLaws(ModelLaws):
    family = TRELLISNET


class TestMemory(MemoryLaws):
    family = TRELLISNET


class TestGeneration(GenerationLaws):
    family = TRELLISNET


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13])
def test_linear_recurrence_equals_the_loop(length):
    keep, new = torch.rand(2, length, 3, dtype=torch.float64), torch.randn(2, length, 3, dtype=torch.float64)
    cell = start = torch.randn(2, 1, 3, dtype=torch.float64)
    expected = []
    for t in range(length):
        cell = keep[:, t : t + 1] * cell + new[:, t : t + 1]
        expected.append(cell)
    torch.testing.assert_close(linear_recurrence(keep, new, start), torch.cat(expected, 1), rtol=0, atol=1e-12)


def test_the_scan_of_packed_texts_is_as_long_as_the_longest_text():
    operations = {}
    for lengths in ([4], [4, 3, 4, 2, 4]):
        numbers = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
        keep, new = (torch.rand(1, numbers.shape[1], 3, dtype=torch.float64) for _ in range(2))
        start, texts = torch.zeros(1, 1, 3, dtype=torch.float64), Texts(numbers)
        linear_recurrence(keep, new, start, texts)  # finds once what belongs together
        with CountOperations() as counted:
            packed = linear_recurrence(keep, new, start, texts)
        operations[len(lengths)] = counted.total
        pieces = zip(keep.split(lengths, 1), new.split(lengths, 1), strict=True)
        alone = torch.cat([linear_recurrence(*piece, start) for piece in pieces], 1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    assert operations[1] == operations[5]


@pytest.mark.parametrize("lengths", [[1], [7], [3, 1, 4]])
def test_the_gradient_of_the_recurrence_is_exact(lengths):
    numbers = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    texts = Texts(numbers) if len(lengths) > 1 else None
    sizes = numbers.shape[1], numbers.shape[1], 1
    arguments = [torch.randn(1, size, 2, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *tensors: linear_recurrence(*tensors, texts), arguments)
    assert torch.autograd.gradgradcheck(lambda *tensors: linear_recurrence(*tensors, texts), arguments)


def test_the_gradient_of_the_recurrence_needs_only_its_factors_and_its_result():
    keep, new = (torch.rand(2, 64, 3, requires_grad=True) for _ in range(2))
    start = torch.zeros(2, 1, 3)
    saved = saved_bytes(torch.nn.Module(), lambda: linear_recurrence(keep, new, start))
    assert saved == keep.nbytes + new.nbytes + start.nbytes


@pytest.mark.parametrize("fields", [{}, {"kernel_size": 3, "dilation": 2}])
def test_the_scan_has_the_same_equilibrium_in_fewer_evaluations(fields):
    ids = random_ids(2, 24)
    with_scan, without = (TRELLISNET.model(**fields, cell_scan=scan)(ids, labels=ids) for scan in (True, False))
    assert (with_scan.logits - without.logits).abs().max() < 1e-8
    assert with_scan.num_evaluations.max() < 0.6 * without.num_evaluations.min()
    gradients = []
    for scan in (True, False):
        model = TRELLISNET.model(**fields, cell_scan=scan)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.parametrize("fields", [{}, {"kernel_size": 3, "dilation": 2}])
@torch.no_grad()
def test_the_equilibrium_solves_the_equations_position_by_position(fields):
    """Written out for one row and one position at a time, from the definition."""
    model = TRELLISNET.model(**fields)
    layer, config = model.model.layers[0], model.config
    ids = random_ids(1, 7)
    embedded, channels = model.model.embed_tokens(ids)[0], config.intermediate_size + config.hidden_size
    inner = model.model(ids).last_hidden_state[0]
    taps, dilation = config.kernel_size, config.dilation
    weight_u, weight = (
        conv.magnitude * conv.direction / conv.direction.flatten(1).norm(dim=1)[:, None, None]
        for conv in (layer.injection, layer.recurrence)
    )
    hidden, cell = [torch.zeros(channels, dtype=torch.float64)] * 99, torch.zeros(channels, dtype=torch.float64)
    for t in range(7):
        u = layer.injection.bias.clone()
        for q in range(taps):
            if t - (taps - 1) + q >= 0:
                u += weight_u[:, :, q] @ embedded[t - (taps - 1) + q]
        new = torch.zeros(channels, dtype=torch.float64)
        for _ in range(100):  # this position's own equilibrium, by plain iteration
            a = u + layer.recurrence.bias + weight[:, :, -1] @ new
            for q in range(taps - 1):
                a = a + weight[:, :, q] @ hidden[-(taps - 1 - q) * dilation]
            i, o, g, f = a.view(4, channels)
            new_cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            new = o.sigmoid() * new_cell.tanh()
        hidden, cell = [*hidden, new], new_cell
        torch.testing.assert_close(inner[t], new[config.intermediate_size :], rtol=0, atol=1e-8)


def test_weight_norm_holds_length_and_direction():
    model = TRELLISNET.model()
    for convolution in (model.model.layers[0].injection, model.model.layers[0].recurrence):
        torch.testing.assert_close(convolution.magnitude.flatten(), convolution.direction.flatten(1).norm(dim=1))
        x = torch.randn(1, 3, convolution.direction.shape[1], dtype=torch.float64)
        past = torch.randn(1, 1, x.shape[2], dtype=torch.float64)
        before = convolution(x, past)
        with torch.no_grad():
            convolution.direction.mul_(3)
            torch.testing.assert_close(convolution(x, past), before, rtol=0, atol=1e-12)
            convolution.magnitude.mul_(2)
            torch.testing.assert_close(convolution(x, past), 2 * before, rtol=0, atol=1e-12)


def test_dropped_word_types_are_dropped_everywhere():
    model = TRELLISNET.model(embedding_dropout=0.5).train()
    ids = random_ids(4, 30)
    injected = model(ids, output_hidden_states=True).hidden_states[0]
    dropped = injected.abs().sum(-1) == 0
    assert 0 < dropped.sum() < dropped.numel()
    for word in ids.unique():
        assert dropped[ids == word].all() or not dropped[ids == word].any()


@pytest.mark.parametrize("name", ["input_dropout", "output_dropout"])
def test_features_are_dropped_for_a_whole_row(name):
    model = TRELLISNET.model(**{name: 0.5}).train()
    injected, output = model(random_ids(3, 20), output_hidden_states=True).hidden_states
    dropped = (injected if name == "input_dropout" else output) == 0
    assert 0 < dropped.sum() < dropped.numel()
    assert torch.equal(dropped.all(1), dropped.any(1))


def test_features_of_the_state_are_dropped_for_a_whole_row(monkeypatch):
    masks, draw = [], modeling_deq_trellisnet.draw_dropout_mask
    monkeypatch.setattr(
        modeling_deq_trellisnet, "draw_dropout_mask", lambda *arguments: masks.append(draw(*arguments)) or masks[-1]
    )
    TRELLISNET.model(hidden_dropout=0.5).train()(random_ids(3, 7))
    assert [tuple(mask.shape[:2]) for mask in masks if mask is not None] == [(3, 1)]


def test_generation_in_training_drops_other_weights_for_every_token(monkeypatch):
    model, masks = TRELLISNET.model(weight_dropout=0.5).train(), set()
    drawn = CausalConvolution._matrix
    monkeypatch.setattr(CausalConvolution, "_matrix", lambda self, mask: masks.add(mask) or drawn(self, mask))
    model.generate(random_ids(1, 3), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(masks - {None}) == 4


def test_a_loss_in_training_needs_no_logits():
    ids = random_ids(2, 6)
    for fields in ({"cutoffs": [20]}, {"num_softmax_experts": 2}):
        model = TRELLISNET.model(**fields)
        assert model.train()(ids, labels=ids).logits is None
        assert model(ids).logits is not None and model.eval()(ids, labels=ids).logits is not None


def test_padding_between_tokens_is_refused():
    model, ids = TRELLISNET.model(), random_ids(1, 4)
    for mask in ([1, 0, 1, 1], [0, 1, 0, 1]):
        with pytest.raises(ValueError, match="padding between tokens.*pad on the left"):
            model(ids, attention_mask=torch.tensor([mask]))
        for parts in ((2, 2), (1, 3), (3, 1), (1, 1, 2)):
            with pytest.raises(ValueError, match="padding between tokens.*pad on the left"):
                read_in_parts(model, ids, torch.tensor([mask]), parts)
            causal = torch.tensor(mask).bool() & torch.ones(4, 4).tril().bool()
            with pytest.raises(ValueError, match="padding between tokens.*pad on the left"):
                read_in_parts(model, ids, (causal & torch.tensor(mask).bool()[:, None])[None, None], parts)


@pytest.mark.parametrize("mask", [[1, 0, 1, 1, 1], [0, 1, 0, 1, 1], [1, 1, 1, 0, 1]])
def test_padding_that_a_later_mask_finds_in_the_past_is_refused(mask):
    model, ids = TRELLISNET.model(), random_ids(1, 5)
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="padding between tokens"):
        model(ids[:, 4:], attention_mask=torch.tensor([mask]), cache=cache, use_cache=True)


def read_in_parts(model, ids, mask, parts):
    """Logits of a text that is read in calls of so many tokens, with a cache."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for end in torch.tensor(parts).cumsum(0).tolist():
        seen = mask[:, :end] if mask.dim() == 2 else mask[:, :, start:end, :end]
        logits.append(model(ids[:, start:end], attention_mask=seen, cache=cache, use_cache=True).logits)
        start = end
    return torch.cat(logits, 1)


@torch.no_grad()
def test_padding_on_a_side_is_read_in_parts():
    """On either side of a row, also across calls."""
    model, ids = TRELLISNET.model(), random_ids(3, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for parts in ((2, 4), (3, 3), (4, 1, 1), (1,) * 6):
        found = read_in_parts(model, ids, mask, parts)
        torch.testing.assert_close(found[mask > 0], whole[mask > 0], rtol=0, atol=1e-8)


def test_generation_refuses_prompts_that_are_padded_on_the_right():
    model, ids = TRELLISNET.model(), random_ids(2, 4)
    with pytest.raises(ValueError, match="padding between tokens.*prompts of generate are padded on the left"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), max_new_tokens=3)


@pytest.mark.parametrize("fields", [{"cutoffs": [20]}, {"num_softmax_experts": 2}])
def test_heads_that_depend_on_the_vocabulary_refuse_another(fields):
    model = TRELLISNET.model(**fields)
    with pytest.raises(ValueError, match="cannot be resized: make a model of vocab_size=70"):
        model.resize_token_embeddings(70)
    model = TRELLISNET.model()
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[69]])).logits.shape[-1] == 70
