"""What the training loop asks of a model: of a deep equilibrium model, or of an explicit model to compare with.

    kind = model_kind(config, run)
    outputs = model(ids, labels=labels, shift_labels=labels, **kind.forward_arguments(step, memory))
    kind.measures(outputs, step, model)          # what the log says of the step

Any causal language model of Transformers can be the explicit one. It gets the same tokens, optimizer and schedule.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_deq import DEQConfig, fits_given_weights
from ..data import read_recipe
from ..evaluation import check_length
from ..generation_deq import REPORTED
from ..tasks import Task, task_of
from .arguments import RunArguments

logger = logging.get_logger(__name__)

SOLVER_ARGUMENTS = ("train_solver_tolerance", "shallow_steps", "shallow_depth")  # of RunArguments


class EquilibriumModel:
    """A model of this package. It has a dial and a memory, and reports its solves."""

    def __init__(self, config: DEQConfig, run: RunArguments):
        self.config, self.run = config, run

    def check(self, task: Task) -> None:
        """Refuse what the model cannot learn. A warning says if no step of the training is solved, or to no tolerance.

        Raises:
            ValueError: if training is to begin with shallow steps, and the model is never solved.
        """
        if self.run.shallow_steps and self.config.gradient == "unrolled":
            depth, used = self.run.shallow_depth, self.config.solver_max_evaluations
            raise ValueError(
                f"shallow_steps={self.run.shallow_steps} would train with {depth} applications of f, but "
                f'gradient="unrolled" always uses {used} (solver_max_evaluations): set shallow_steps to 0.'
            )
        if self.run.train_solver_tolerance is not None and self.config.gradient in ("unrolled", "reversible"):
            logger.warning(
                f"train_solver_tolerance={self.run.train_solver_tolerance:g} has no effect: with "
                f'gradient="{self.config.gradient}" every training step has a fixed number of evaluations.'
            )
        if self.run.shallow_steps >= self.run.max_steps:
            logger.warning(
                f"shallow_steps={self.run.shallow_steps} covers all of max_steps={self.run.max_steps}: no step of this "
                "training solves for the equilibrium. Lower shallow_steps."
            )

    def forward_arguments(self, step: int, memory: tuple | None) -> dict:
        """Arguments of `forward` besides tokens and labels. Shallow pretraining unrolls; afterwards f is solved."""
        dial = {"unroll_steps": self.run.shallow_depth} if self._is_shallow(step) else {}
        if self.run.train_solver_tolerance is not None:
            dial["solver_tolerance"] = self.run.train_solver_tolerance
        return {"memory": memory} | dial

    def memory(self, outputs) -> tuple | None:
        """What is handed on to the next segment."""
        return outputs.memory

    def measures(self, outputs, step: int, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Scalars for the log, after the backward pass. Their `loss` is the cross-entropy alone."""
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

    def scores(self, scores: dict[str, float]) -> dict[str, float]:
        """The scores of a validation that make sense for this kind of model: all of them."""
        return scores

    def describe(self, scores: dict[str, float]) -> str:
        """Say in a line how the solves of a validation went."""
        what = "unrolled" if self.config.gradient == "unrolled" else "equilibrium"
        return (
            f"{what}: {scores['num_evaluations']:.1f} evaluations to a residual of {scores['residual']:.1e}, "
            f"{scores['converged']:.0%} of the sequences converged\n"
        )

    def _is_shallow(self, step: int) -> bool:
        return step < self.run.shallow_steps


class ExplicitModel:
    """A causal language model without an equilibrium, such as GPT-2. The loop needs only its loss."""

    def __init__(self, config: PreTrainedConfig, run: RunArguments):
        self.config, self.run = config, run

    def check(self, task: Task) -> None:
        """Refuse what the model cannot learn.

        Raises:
            ValueError: if an argument is for a solver, or sequences are longer than the model can read.
        """
        model_type = self.config.model_type
        for name in SOLVER_ARGUMENTS:
            if getattr(self.run, name) != getattr(RunArguments, name):
                raise ValueError(f"{name} is for models that solve for an equilibrium: {model_type} does not; omit it.")
        check_length(self.config, "the training sequences (sequence_length)", len(task.examples[0]["input_ids"]))
        check_length(self.config, "the sample's prompt and sample_tokens", task.sample_length)

    def forward_arguments(self, step: int, memory: None) -> dict:
        """No arguments besides tokens and labels."""
        return {}

    def memory(self, outputs) -> None:
        """Nothing is remembered."""

    def measures(self, outputs, step: int, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The loss."""
        return {"loss": outputs.loss.detach()}

    def scores(self, scores: dict[str, float]) -> dict[str, float]:
        """All scores except those of solves."""
        return {name: value for name, value in scores.items() if name not in REPORTED}

    def describe(self, scores: dict[str, float]) -> str:
        """Nothing: there are no solves."""
        return ""


def check_trained_on(folder: str, task: type[Task]) -> None:
    """Refuse to start from a folder whose recipe names another task.

    Raises:
        ValueError: if it does.
    """
    recipe = read_recipe(folder)
    if recipe and task_of(recipe) is not task:
        raise ValueError(
            f"init_from={folder!r} was trained on task: {task_of(recipe).name}, but this run is for task: {task.name}."
        )


def pretrained(folder: str, model_type: str, fields: dict) -> PreTrainedModel:
    """Load the model that a training starts from, in single precision.

    Args:
        folder: a model folder, or a name on the Hub.
        model_type: the type that the model must have.
        fields: fields of its configuration that the run asks for. Those of the equilibrium and of dropout replace the
            model's own. All others must be as they are in the folder, except a smaller vocabulary, and ids that the
            folder does not set.

    Raises:
        ValueError: if the model has another type, or a field contradicts it.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != model_type:
        raise ValueError(
            f"init_from={folder!r} holds a {config.model_type}, but model_type is {model_type}: leave model_type out."
        )
    changed = {name: value for name, value in fields.items() if fits_given_weights(name)}
    for name, value in fields.items():
        theirs = config.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(config, name, None)
        if name in changed or value is None or theirs == value:
            continue
        if name.endswith("_token_id"):
            changed |= {name: value} if theirs is None else {}
        elif name != "vocab_size" or value > theirs:
            raise ValueError(
                f"{name}={value} contradicts init_from={folder!r}, where it is {theirs}: leave {name} out, or start "
                "from another folder."
            )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changed)


def model_kind(config: PreTrainedConfig, run: RunArguments) -> EquilibriumModel | ExplicitModel:
    """The only place that asks which of the two a model is."""
    return (EquilibriumModel if isinstance(config, DEQConfig) else ExplicitModel)(config, run)


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict]:
    """Group parameters: weight decay for linear maps and convolutions, none for norms, biases and vocabulary tables.

    For a normalised weight, decay shrinks the magnitude. For its direction, it only changes the effective learning
    rate.
    """
    lookups = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]  # positions, too
    vocabulary = (*lookups, model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(parameter) for module in vocabulary for parameter in module.parameters()}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        spared = parameter.dim() < 2 or name.endswith("bias") or id(parameter) in tables
        groups[spared]["params"].append(parameter)
    return groups
