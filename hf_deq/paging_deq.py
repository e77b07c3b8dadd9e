"""Continuous batching: one row holds the new tokens of many requests, and a paged cache holds what came before them.

Transformers' servers put the new tokens of all running requests into one row (Yu et al. 2022, Orca). Keys and values of
earlier tokens stand in the pages of a `PagedAttentionCache` (Kwon et al. 2023, arXiv 2309.06180). For a solve, the
requests are the texts of a packed row: each is solved as if it were alone.
"""

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from .cache_deq import EquilibriumCacheView
from .masking_deq import Rows
from .packed_texts import Texts


class PagedTexts:
    """The new tokens of requests, packed into one row, and the keys and values of their earlier tokens.

    f gets this object in place of a cache. As with `EquilibriumCacheView`, the pages get the keys and values of the
    equilibrium at the end, by `commit`. Keys of different requests follow one another, those of a request in the order
    of its tokens.

    Args:
        cache: the paged cache.
        cu_seq_lens_q: `(requests + 1,)`, where the new tokens of each request start in the row, and where the last
            ones end.
        cu_seq_lens_k: the same for the keys, by the name of the kind of attention. All layers of f have one kind.
        paging: further arguments of a call with a paged cache. `cache.update` reads the pages from them.

    Attributes:
        rows: the structure of the row.
        places: index among the keys of the key of each new token, `(new tokens,)`.
        num_keys: number of keys, those of the new tokens included.
    """

    def __init__(self, cache: PagedAttentionCache, cu_seq_lens_q: Tensor, cu_seq_lens_k: dict[str, Tensor], **paging):
        self._cache = cache
        self._paging = paging | {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        (ends_of_keys,) = (starts[1:].long() for starts in cu_seq_lens_k.values())
        ends, lengths = cu_seq_lens_q[1:].long(), cu_seq_lens_q.long().diff()
        numbers = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        self.rows = Rows(None, Texts(numbers[None]) if len(lengths) > 1 else None)
        self.places = torch.arange(len(numbers), device=lengths.device) + (ends_of_keys - ends)[numbers]
        self.num_keys = int(ends_of_keys[-1])
        self._last: dict[int, tuple[Tensor, Tensor]] = {}
        self._joined: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        """Return the number of earlier tokens that this call reads, of all requests together."""
        return self.num_keys - len(self.places)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys, and the index of the first of them."""
        return self.num_keys, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all requests, with the new ones `(1, heads, new tokens, head size)`.

        The pages are read once per solve. A window slides over pages that are written in a ring, so later
        evaluations could no longer read there what the first one has overwritten.
        """
        present = self._last[layer_idx] = key_states, value_states
        if layer_idx not in self._joined:
            self._joined[layer_idx] = self._write(layer_idx)
            return self._joined[layer_idx]
        if self.get_seq_length() == 0:
            return present
        for whole, new in zip(self._joined[layer_idx], present, strict=True):
            whole.index_copy_(2, self.places, new)
        return self._joined[layer_idx]

    def commit(self) -> None:
        """Write the keys and values of the last application of f to the pages."""
        for layer_idx in sorted(self._last):
            self._write(layer_idx)

    def _write(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write the latest keys and values to the pages, and return them joined with those that stood there."""
        return self._cache.update(*self._last[layer_idx], layer_idx, dict(self._paging))  # it changes the dict


CacheView = EquilibriumCacheView | PagedTexts


def view_of(cache: Cache | PagedTexts | None) -> CacheView | None:
    """Return what f reads in place of a cache; `None` if there is no cache."""
    return cache if cache is None or isinstance(cache, PagedTexts) else EquilibriumCacheView(cache)
