"""What the training loop asks of a model and reads from it: a deep equilibrium model, or an explicit one beside it.

    kind = model_kind(config)
    outputs = model(ids, labels=labels, shift_labels=labels, **kind.arguments(step, memory, training))
    kind.measures(outputs, step, model)          # what the log says of the step

Any causal language model of Transformers can be the explicit one: the same tokens, optimizer and schedule, no solver.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_deq import DEQConfig
from .generation_deq import REPORTED
from .tasks import CopyMemoryTask, LanguageModeling
from .training_arguments import TrainingArguments

SOLVER_ARGUMENTS = ("train_solver_tolerance", "shallow_steps", "shallow_depth")  # of TrainingArguments


class EquilibriumModel:
    """A model of this package: it has a dial and a memory, and reports on its solves."""

    def __init__(self, config: DEQConfig, training: TrainingArguments):
        self.config, self.shallow_steps, self.shallow_depth = config, training.shallow_steps, training.shallow_depth

    def check(self, task: LanguageModeling | CopyMemoryTask, training: TrainingArguments) -> None:
        """Refuse what the model cannot be trained with: nothing that its configuration and the task let pass."""

    def arguments(self, step: int, memory: tuple | None, training: TrainingArguments) -> dict:
        """For `forward`, besides tokens and labels. Shallow pretraining unrolls; afterwards f is solved for."""
        dial = {"unroll_steps": self.shallow_depth} if self._is_shallow(step) else {}
        if training.train_solver_tolerance is not None:
            dial["solver_tolerance"] = training.train_solver_tolerance
        return {"memory": memory} | dial

    def memory(self, outputs) -> tuple | None:
        """What is handed on to the next segment."""
        return outputs.memory

    def measures(self, outputs, step: int, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Scalars for the log, after the backward pass. Their `loss` is the cross-entropy by itself."""
        measures = {
            "loss": outputs.loss.detach(),
            "forward_evaluations": outputs.num_evaluations.float().mean(),
            "residual": outputs.residual.mean(),
            "converged": outputs.converged.float().mean(),
        }
        if outputs.jacobian_loss is not None:
            measures["jacobian_loss"] = outputs.jacobian_loss.detach()
            measures["loss"] = measures["loss"] - self.config.jacobian_loss_weight * measures["jacobian_loss"]
        backward = model.model.layers[0].backward_evaluations
        if backward is not None and not self._is_shallow(step):
            measures["backward_evaluations"] = backward.float().mean()
        return measures

    def validation(self, metrics: dict[str, float]) -> dict[str, float]:
        """Those of a validation's metrics that say something about the model."""
        return metrics

    def describe(self, metrics: dict[str, float]) -> str:
        """What a validation says about the solves, in a line."""
        what = "unrolled" if self.config.gradient == "unrolled" else "equilibrium"
        return (
            f"{what}: {metrics['num_evaluations']:.1f} evaluations to a residual of {metrics['residual']:.1e}, "
            f"{metrics['converged']:.0%} of the sequences converged\n"
        )

    def _is_shallow(self, step: int) -> bool:
        return step < self.shallow_steps


class ExplicitModel:
    """A causal language model without an equilibrium, such as GPT-2: it has a loss, and nothing else is asked of it."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    def check(self, task: LanguageModeling | CopyMemoryTask, training: TrainingArguments) -> None:
        """Refuse what the model cannot be trained with.

        Raises:
            ValueError: a solver's argument, a task that needs one of our models, or texts longer than the model reads.
        """
        model_type = self.config.model_type
        for name in SOLVER_ARGUMENTS:
            if getattr(training, name) != getattr(TrainingArguments, name):
                raise ValueError(f"{name} is for models that solve for an equilibrium: {model_type} does not; omit it.")
        if isinstance(task, CopyMemoryTask):
            raise ValueError(f"The copy_memory task reports on a solver: train {model_type} on language_modeling.")
        if task.data.carry_memory:
            raise ValueError(f"carry_memory needs a model that remembers: {model_type} does not; set it to false.")
        self._check_length("sequence_length", task.data.sequence_length)
        if training.sample_tokens:
            prompt = len(task.tokenizer(task.prompt(training))["input_ids"])
            self._check_length("the sample's prompt and sample_tokens", prompt + training.sample_tokens)

    def _check_length(self, name: str, length: int) -> None:
        field = self.config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        positions = getattr(self.config, field, None)
        if positions is not None and length > positions:
            raise ValueError(f"{field}={positions} must cover {name} ({length}): raise {field} to {length} or more.")

    def arguments(self, step: int, memory: None, training: TrainingArguments) -> dict:
        """None besides tokens and labels."""
        return {}

    def memory(self, outputs) -> None:
        """Nothing is remembered."""

    def measures(self, outputs, step: int, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The loss."""
        return {"loss": outputs.loss.detach()}

    def validation(self, metrics: dict[str, float]) -> dict[str, float]:
        """All but the solver's."""
        return {name: value for name, value in metrics.items() if name not in REPORTED}

    def describe(self, metrics: dict[str, float]) -> str:
        """There are no solves to speak of."""
        return ""


def model_kind(config: PreTrainedConfig, training: TrainingArguments) -> EquilibriumModel | ExplicitModel:
    """The only place that asks which of the two a model is."""
    return EquilibriumModel(config, training) if isinstance(config, DEQConfig) else ExplicitModel(config)


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict]:
    """Weight decay for linear maps and convolutions; none for norms, biases, embeddings and output layers.

    Of a normalised weight it shrinks the magnitude; on the direction it only sets the effective learning rate.
    """
    lookups = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]  # positions, too
    vocabulary = (*lookups, model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(parameter) for module in vocabulary for parameter in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        spared = parameter.dim() < 2 or name.endswith("bias") or id(parameter) in tables
        groups[spared]["params"].append(parameter)
    return groups
