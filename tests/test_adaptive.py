"""Adaptive embeddings: every id has its vector, and the softmax can share tables and projections with them."""

import pytest
import torch

from hf_deq.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

SHAPES = [
    dict(cutoffs=[7, 12]),
    dict(cutoffs=[], embedding_size=4),
    dict(cutoffs=[7, 12], embedding_size=4),
    dict(cutoffs=[7, 12], embedding_size=8, div_val=2),
    dict(cutoffs=[1, 19], div_val=2),
]
shapes = pytest.mark.parametrize("shape", SHAPES)


def filled(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


@shapes
def test_every_id_has_the_projected_row_of_its_cluster(shape):
    embedding = filled(AdaptiveEmbedding(6, 20, **shape))
    vectors = embedding(torch.arange(20).view(4, 5))
    assert vectors.shape == (4, 5, 6)
    for i, vector in enumerate(vectors.flatten(0, 1)):
        cluster = sum(i >= cutoff for cutoff in shape["cutoffs"])
        one_table = shape.get("div_val", 1) == 1
        row = (
            embedding.weight[i]
            if one_table
            else getattr(embedding, f"cluster{cluster}_weight")[i - ([0, *shape["cutoffs"]][cluster])]
        )
        projection = getattr(embedding, f"projection{0 if one_table else cluster}_weight", None)
        torch.testing.assert_close(vector, row if projection is None else projection @ row, rtol=0, atol=1e-12)


@shapes
def test_gradients_reach_the_rows_that_were_used_and_no_others(shape):
    embedding = filled(AdaptiveEmbedding(6, 20, **shape))
    embedding(torch.tensor([[0, 19]])).sum().backward()
    used = sum((p.grad.abs().sum(1) > 0).sum().item() for n, p in embedding.named_parameters() if "projection" not in n)
    assert used == 2


@shapes
def test_tables_of_embedding_and_softmax_have_the_same_names_and_shapes(shape):
    embedding, softmax = AdaptiveEmbedding(6, 20, **shape), AdaptiveSoftmax(6, 20, **shape)
    theirs = {name: parameter.shape for name, parameter in softmax.named_parameters()}
    for name, parameter in embedding.named_parameters():
        assert theirs[name] == parameter.shape


def test_shrinking_tables_save_parameters():
    sizes = [
        sum(p.numel() for p in AdaptiveEmbedding(64, 10_000, [500, 2_000], div_val=q).parameters()) for q in (1, 4)
    ]
    assert sizes == [640_000, 500 * 64 + 1_500 * 16 + 8_000 * 4 + 64 * (64 + 16 + 4)]


def test_initial_vectors_have_the_size_of_a_plain_embedding():
    embedding = AdaptiveEmbedding(256, 1000, [100, 300], div_val=4)
    embedding.initialize(std=1 / 16)
    lengths = torch.stack(
        [embedding(torch.arange(a, b)).norm(dim=-1).mean() for a, b in ((0, 100), (100, 300), (300, 1000))]
    )
    assert (lengths - 1).abs().max() < 0.2
