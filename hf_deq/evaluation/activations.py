"""The bytes that a training step keeps for backward (see figure 1 of Bai, Kolter & Koltun 2019)."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..modeling_deq import DEQPreTrainedModel
from .convergence import same_random_numbers, unconverged_on_purpose


def activations_by_depth(model: DEQPreTrainedModel, input_ids: Tensor, depths: Sequence[int]) -> dict[str, list[int]]:
    """Compare the bytes that a training step keeps for backward: configured gradient and explicit stack.

    Args:
        model: a deep equilibrium language model.
        input_ids: `(batch, sequence)`; also used as labels.
        depths: numbers of evaluations of f, each at least 1. With the configured gradient, a depth is the budget of
            the solver, with tolerance zero. With unrolled steps, a depth is the number of steps.

    Returns:
        `saved_activation_bytes` at each depth: under the name of the configured estimator (`config.gradient`), and
        under `"unrolled"`.
    """
    own = [
        saved_activation_bytes(model, input_ids, solver_max_evaluations=depth, solver_tolerance=0.0) for depth in depths
    ]
    unrolled = [saved_activation_bytes(model, input_ids, unroll_steps=depth) for depth in depths]
    return {model.config.gradient: own, "unrolled": unrolled}


def saved_activation_bytes(model: DEQPreTrainedModel, input_ids: Tensor, **dial) -> int:
    """Return the bytes that autograd holds between the forward and the backward pass of one training step.

    This function counts the distinct storages of all tensors that the graph of the loss has saved, except those of
    parameters and buffers. It does not count the memory that a solver needs while it runs (the history limits this
    memory), nor the one state f(z) that the implicit gradient stores.

    Args:
        model: a deep equilibrium language model. It runs in training mode, with dropout and regularization as
            configured. Every call draws the same random numbers.
        input_ids: `(batch, sequence)`; also used as labels.
        dial: `solver_tolerance`, `solver_max_evaluations` or `unroll_steps` for the model's `forward`.

    Raises:
        ValueError: if the budget or the number of steps is not positive.
    """
    input_ids = input_ids.to(model.device)
    with _training(model), unconverged_on_purpose(), torch.enable_grad():
        return saved_bytes(model, lambda: model(input_ids, labels=input_ids, use_cache=False, **dial))


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes that autograd holds after a forward pass, without those of parameters and buffers.

    Args:
        model: any model.
        forward: runs the forward pass. It returns what owns the graph, such as the loss.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        held.add(saved)  # weakly: tensors that the graph releases during the forward pass do not count
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        outputs = forward()
    storages = [saved.tensor.untyped_storage() for saved in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
    del outputs  # not earlier, because it owns the graph
    return sum(sizes.values())


class _Saved:
    """A saved tensor, wrapped so that weak references to it are possible."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


@contextmanager
def _training(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model is in training mode and draws the same random numbers every time."""
    was_training = model.training
    with same_random_numbers(model):
        model.train()
        try:
            yield
        finally:
            model.train(was_training)
