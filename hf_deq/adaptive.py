"""A vocabulary that is cut into clusters by frequency: adaptive input embedding and adaptive softmax.

    AdaptiveEmbedding   ids to vectors; rare ids may have shorter vectors, projected up (Baevski & Auli 2019)
    AdaptiveSoftmax     frequent ids directly, rare ids through their cluster (Grave et al. 2017)

Cluster r holds the ids from `cutoffs[r - 1]` up to, but not including, `cutoffs[r]`. Ids are ordered by falling
frequency. With `div_val` 1 all ids share one table. With a larger `div_val`, cluster r has its own table with
`embedding_size // div_val ** r` features. Tables and projections have the same names in both modules, so that they
can be tied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .softmax_heads import LogProbabilityHead, log_softmax


class VocabularyTables(nn.Module):
    """The tables of a clustered vocabulary, and the projections between their row size and the size of the states.

    Args:
        features: size of the model's states.
        vocab_size: number of ids.
        cutoffs: first id of every cluster except the first, in rising order; empty for a single cluster.
        embedding_size: features of a row of the (first) table; by default `features`.
        div_val: factor by which the row size shrinks from one cluster to the next.
    """

    def __init__(
        self,
        features: int,
        vocab_size: int,
        cutoffs: Sequence[int] = (),
        embedding_size: int | None = None,
        div_val: int = 1,
    ):
        super().__init__()
        embedding_size = embedding_size or features
        self.features, self.vocab_size, self.ends = features, vocab_size, [*cutoffs, vocab_size]
        self.starts = [0, *cutoffs]
        self.one_table = div_val == 1
        self.projected = div_val > 1 or embedding_size != features
        self.sizes = [embedding_size // div_val**cluster for cluster in range(len(self.ends))]
        rows = (
            [vocab_size] if self.one_table else [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        )
        for table, count in enumerate(rows):
            setattr(self, self.table_name(table), nn.Parameter(torch.empty(count, self.sizes[table])))

    def extra_repr(self) -> str:
        return f"features={self.features}, vocab_size={self.vocab_size}, cutoffs={self.ends[:-1]}, sizes={self.sizes}"

    def table_name(self, cluster: int) -> str:
        """Return the name of the parameter that holds the rows of a cluster."""
        return "weight" if self.one_table else f"cluster{cluster}_weight"

    @staticmethod
    def projection_name(cluster: int) -> str:
        """Return the name of the parameter that holds a projection, `(features, row size of the table)`."""
        return f"projection{cluster}_weight"

    def rows(self, name: str, cluster: int) -> Tensor:
        """Return the rows of a cluster from the table, or from the bias, called `name`."""
        tensor = getattr(self, name)
        return tensor[self.starts[cluster] : self.ends[cluster]] if self.one_table else tensor

    def cluster_of(self, ids: Tensor) -> Tensor:
        """Return the cluster of every id."""
        return torch.bucketize(ids, torch.tensor(self.ends, device=ids.device), right=True)

    def make_projections(self, clusters: int) -> None:
        """Add the projections of the first `clusters` clusters, if this vocabulary uses projections."""
        for cluster in range(clusters if self.projected else 0):
            shape = (self.features, self.sizes[cluster])
            setattr(self, self.projection_name(cluster), nn.Parameter(torch.empty(shape)))

    def initialize(self, std: float) -> None:
        """Initialise tables with standard deviation `std`, projections such that they keep it, and biases with zero."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, std=parameter.shape[1] ** -0.5 if name.startswith("projection") else std)


class AdaptiveEmbedding(VocabularyTables):
    """Maps ids `(...)` to vectors `(..., features)`. The arguments are those of `VocabularyTables`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.make_projections(1 if self.one_table else len(self.ends))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors `(..., features)` of ids `(...)`."""
        if self.one_table:
            return self._project(0, F.embedding(ids, self.weight))
        flat, clusters = ids.flatten(), self.cluster_of(ids.flatten())
        embedded = self.projection0_weight.new_zeros(len(flat), self.features)
        for cluster, start in enumerate(self.starts):
            (members,) = (clusters == cluster).nonzero(as_tuple=True)
            vectors = F.embedding(flat[members] - start, self.rows(self.table_name(cluster), cluster))
            embedded = embedded.index_copy(0, members, self._project(cluster, vectors).to(embedded.dtype))
        return embedded.view(*ids.shape, -1)

    def _project(self, cluster: int, vectors: Tensor) -> Tensor:
        if not self.projected:
            return vectors
        return F.linear(vectors, getattr(self, self.projection_name(cluster)))


class AdaptiveSoftmax(VocabularyTables, LogProbabilityHead):
    """log P(id) = log P(cluster of id) + log P(id | cluster), exact. Arguments as in `VocabularyTables`.

    The head is a softmax over the ids of cluster 0 and one entry for each other cluster. The last entry is
    cluster 1, the entry before it is cluster 2, and so on, as in Transformer-XL. A loss computes the head for all
    tokens, and each other cluster only for its own tokens.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for table in range(1 if self.one_table else len(self.ends)):
            size = len(getattr(self, self.table_name(table)))
            setattr(self, self.bias_name(table), nn.Parameter(torch.empty(size)))
        self.make_projections(len(self.ends))
        if len(self.ends) > 1:
            self.cluster_weight = nn.Parameter(torch.empty(len(self.ends) - 1, self.sizes[0]))
            self.cluster_bias = nn.Parameter(torch.empty(len(self.ends) - 1))

    def bias_name(self, cluster: int) -> str:
        """Return the name of the parameter that holds the biases of a cluster."""
        return self.table_name(cluster).replace("weight", "bias")

    def initialize(self, std: float) -> None:
        """Initialise as `VocabularyTables` does. All clusters after the first start equally likely."""
        super().initialize(std)
        if len(self.ends) > 1:
            init.zeros_(self.cluster_weight)

    def _all(self, states: Tensor) -> Tensor:
        head = self._head(states)
        parts = [head[..., : self.ends[0]]]
        for cluster in range(1, len(self.ends)):
            parts.append(head[..., -cluster, None] + self._within(cluster, states))
        return torch.cat(parts, -1)

    def _negative_log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        head, clusters = self._head(states), self.cluster_of(targets)
        entry = torch.where(clusters == 0, targets, head.shape[-1] - clusters)
        log_probability = head.gather(-1, entry[:, None])[:, 0]
        for cluster in range(1, len(self.ends)):
            (members,) = (clusters == cluster).nonzero(as_tuple=True)
            local = targets[members] - self.starts[cluster]
            within = self._within(cluster, states[members]).gather(-1, local[:, None])[:, 0]
            log_probability = log_probability.index_add(0, members, within)
        return -log_probability

    def _head(self, states: Tensor) -> Tensor:
        weight, bias = self._table(0)
        if len(self.ends) > 1:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        return log_softmax(F.linear(self._project(0, states), weight, bias))

    def _within(self, cluster: int, states: Tensor) -> Tensor:
        return log_softmax(F.linear(self._project(cluster, states), *self._table(cluster)))

    def _table(self, cluster: int) -> tuple[Tensor, Tensor]:
        return self.rows(self.table_name(cluster), cluster), self.rows(self.bias_name(cluster), cluster)

    def _project(self, cluster: int, states: Tensor) -> Tensor:
        return states @ getattr(self, self.projection_name(cluster)) if self.projected else states
