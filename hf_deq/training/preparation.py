"""What a run has before it starts: the task, the model, and the recipe that would start it again."""

from dataclasses import asdict, dataclass, replace

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..evaluation import check_remembers
from ..tasks import Task, make_task, task_for
from .arguments import RunArguments
from .models import EquilibriumModel, ExplicitModel, check_trained_on, model_kind, pretrained

# Arguments that belong to one start of a run. A recipe that kept them would overwrite the run that it came from.
OF_ONE_START = ("overwrite", "resume")


@dataclass(frozen=True)
class Prepared:
    """What a run has before it starts.

    Attributes:
        task: what is learned.
        model: what learns it, on the CPU.
        kind: what the training loop asks of the model.
        recipe: all arguments of the run by name, but those of `OF_ONE_START`.
    """

    task: Task
    model: nn.Module
    kind: EquilibriumModel | ExplicitModel
    recipe: dict


def prepare(task_arguments, run: RunArguments, model_fields: dict, model_type: str) -> Prepared:
    """Make task, model and recipe. The arguments are those of `train`.

    Raises:
        ValueError: if arguments do not fit each other.
    """
    if run.init_from is not None:
        check_trained_on(run.init_from, task_for(task_arguments))
        if getattr(task_arguments, "tokenizer", "") is None:
            task_arguments = replace(task_arguments, tokenizer=run.init_from)
    task = make_task(task_arguments, model_fields)
    check_decided_fields(task, model_fields)
    fields = model_fields | task.model_fields
    if run.init_from is None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    else:
        model = pretrained(run.init_from, model_type, fields)
    kind = model_kind(model.config, run)
    kind.check(task)
    if task.carries_memory:
        check_remembers(model.config)
    given = {name: fields[name] for name in model_fields}  # the task may have changed some, such as vocab_size
    arguments = asdict(task_arguments) | asdict(run)
    recipe = {"task": task.name, "model_type": model_type} | task.recorded | arguments | given
    recipe = {name: value for name, value in recipe.items() if value is not None and name not in OF_ONE_START}
    return Prepared(task, model, kind, recipe)


def check_decided_fields(task: Task, model_fields: dict) -> None:
    """Refuse fields of the model that a synthetic task decides. (A tokenizer may have fewer tokens than asked for.)

    Raises:
        ValueError: if a field has another value than the task gives it.
    """
    for name, value in task.model_fields.items():
        if task.tokenizer is None and model_fields.get(name, value) != value:
            raise ValueError(
                f"{name} must be {value} for the task {task.name}, got {model_fields[name]}: leave it out."
            )
