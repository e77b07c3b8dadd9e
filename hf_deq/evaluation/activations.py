"""What a training step keeps for backward, in bytes (the claim of figure 1 of Bai, Kolter & Koltun 2019)."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..modeling_deq import DEQPreTrainedModel
from .convergence import same_random_numbers, unconverged_on_purpose


def activations_by_depth(model: DEQPreTrainedModel, input_ids: Tensor, depths: Sequence[int]) -> dict[str, list[int]]:
    """Bytes that a training step keeps for backward: the model's own gradient against the explicit stack's.

    Args:
        model: a deep equilibrium language model.
        input_ids: `(batch, sequence)`; the labels too.
        depths: evaluations of f, each at least 1: the solver's whole budget, or so many unrolled steps.

    Returns:
        `saved_activation_bytes` at each depth, under the name of the configured estimator (`config.gradient`) and
        under `"unrolled"`.
    """
    own = [
        saved_activation_bytes(model, input_ids, solver_max_evaluations=depth, solver_tolerance=0.0) for depth in depths
    ]
    unrolled = [saved_activation_bytes(model, input_ids, unroll_steps=depth) for depth in depths]
    return {model.config.gradient: own, "unrolled": unrolled}


def saved_activation_bytes(model: DEQPreTrainedModel, input_ids: Tensor, **dial) -> int:
    """Bytes that autograd holds between the forward and the backward pass of one training step.

    Counted are the distinct storages of all tensors that the graph of the loss has saved, those of parameters and
    buffers left out. Not counted is what a solver needs while it runs, which its history bounds, and the one state by
    which the implicit gradient remembers f(z).

    Args:
        model: a deep equilibrium language model; taken in training mode, dropout and regularization as configured and
            drawn alike in every call.
        input_ids: `(batch, sequence)`; the labels too.
        dial: `solver_tolerance`, `solver_max_evaluations` or `unroll_steps` for the model's forward.

    Raises:
        ValueError: the budget or the number of steps is not positive.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    input_ids, held = input_ids.to(model.device), weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        held.add(saved)  # weakly: what the graph lets go of during the forward pass is not kept
        return saved

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
    with _training(model), unconverged_on_purpose(), torch.enable_grad(), hooks:
        outputs = model(input_ids, labels=input_ids, use_cache=False, **dial)
    storages = [saved.tensor.untyped_storage() for saved in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
    del outputs  # until here, since it owns the graph
    return sum(sizes.values())


class _Saved:
    """A saved tensor that can be referred to weakly."""

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
