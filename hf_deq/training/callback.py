"""A callback for `transformers.Trainer` that logs how the equilibria of the training steps were solved.

trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[EquilibriumCallback()])
"""

from torch import Tensor, nn
from transformers import TrainerCallback

from ..layer_deq import DEQLayer, DEQLayerOutput


class EquilibriumCallback(TrainerCallback):
    """Adds means over the training steps since the last log to the logs of Trainer:

    - `forward_evaluations`: calls of f per sequence,
    - `backward_evaluations`: vector-Jacobian products per sequence (implicit gradient),
    - `residual`: relative residual of the equilibrium,
    - `converged`: share of the sequences that reached the tolerance,
    - `jacobian_loss`: unweighted Jacobian regularization, over the steps that have one.

    The means are those of this process. A forward hook on the layer reads the values, from the beginning to the end of
    training. The callback does not change the model, its outputs, or the logs of evaluations.

    The means are written to the console and to `trainer.state.log_history`. Trainer calls the reporting integrations of
    `report_to` before the callbacks of its argument `callbacks`. If an integration should report these means, put it
    after this callback, and not into `report_to`:
    `callbacks=[EquilibriumCallback(), TensorBoardCallback()]` with `report_to="none"`.

    Raises:
        ValueError: if training begins with a model that has no equilibrium.
    """

    def __init__(self):
        self._layer: DEQLayer | None = None
        self._hook = None
        self._means: dict[str, _Mean] = {}

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        self._unhook()  # an interrupted training may have left a hook
        self._means = {}
        # Search all modules, because adapters and wrappers put the model into other modules.
        self._layer = next((module for module in model.modules() if isinstance(module, DEQLayer)), None)
        if self._layer is None:
            raise ValueError(
                f"EquilibriumCallback found no equilibrium in {type(model).__name__}: it is for models of hf_deq; "
                "leave it out of callbacks."
            )
        self._hook = self._layer.register_forward_hook(self._read_forward)

    def on_substep_end(self, args, state, control, **kwargs):
        self._read_backward()

    def on_step_end(self, args, state, control, **kwargs):
        self._read_backward()

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs):
        if "loss" not in logs:  # these are logs of an evaluation, or the summary at the end
            return
        means = {name: mean.value() for name, mean in self._means.items()}
        self._means = {}
        logs.update(means)
        state.log_history[-1].update(means)  # Trainer copied the logs before it called us

    def on_train_end(self, args, state, control, **kwargs):
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._layer = None

    def _read_forward(self, layer: DEQLayer, inputs: tuple, output: DEQLayerOutput) -> None:
        if not layer.training:
            return
        self._add("forward_evaluations", output.solution.num_evaluations)
        self._add("residual", output.solution.residual)
        self._add("converged", output.solution.converged)
        if output.jacobian_loss is not None:
            self._add("jacobian_loss", output.jacobian_loss)

    def _read_backward(self) -> None:
        if self._layer.backward_evaluations is not None:
            self._add("backward_evaluations", self._layer.backward_evaluations)

    def _add(self, name: str, values: Tensor) -> None:
        self._means.setdefault(name, _Mean()).add(values.detach().float().mean())


class _Mean:
    """A running mean. It stays on its device until `value` is called: reading it at every step would stall a GPU."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, value: Tensor) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def value(self) -> float:
        return float(self.total) / self.count
