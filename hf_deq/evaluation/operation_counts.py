"""Count what code does with tensors: its operations, and the bytes that are alive at once. Counts have no noise.

with CountOperations() as count:
    solution = solver(count.uncounted(f), z0)
count.total / solution.num_evaluations.max()   # operations of the solver alone, per evaluation
"""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class CountingMode(TorchDispatchMode):
    """A dispatch mode that records every operation, except the operations of functions wrapped by `uncounted`."""

    def __init__(self):
        super().__init__()
        self._paused = False

    def uncounted(self, f):
        """Return a function that calls f without recording its operations."""

        def called(*arguments):
            self._paused, before = True, self._paused
            try:
                return f(*arguments)
            finally:
                self._paused = before

        return called

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        if not self._paused:
            self.note(operation, [output for output in tree_flatten(outputs)[0] if isinstance(output, torch.Tensor)])
        return outputs

    def note(self, operation, tensors: list[torch.Tensor]) -> None:
        """Record an operation and the tensors that it returned."""
        raise NotImplementedError


class CountOperations(CountingMode):
    """Counts operations, including views.

    Attributes:
        names: number of calls of each operation, by its name.
        total: number of all calls.
    """

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.names.total()

    def note(self, operation, tensors):
        self.names[str(operation)] += 1


class LiveBytes(CountingMode):
    """Tracks the storages of all tensors that operations return.

    Attributes:
        most: the largest number of bytes that were alive at the same time.
    """

    def __init__(self):
        super().__init__()
        self._made = []
        self.most = 0

    def note(self, operation, tensors):
        self._made = [reference for reference in self._made if reference() is not None]
        self._made += map(weakref.ref, tensors)
        storages = [tensor.untyped_storage() for reference in self._made if (tensor := reference()) is not None]
        self.most = max(self.most, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
