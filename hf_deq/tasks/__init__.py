"""What there is to learn.

    task = make_task(LanguageModelingArguments(), {"hidden_size": 192})

A new task is a file with a `Task`, and its name in the list below.
"""

from .copy_memory import CopyMemoryArguments, CopyMemoryTask
from .language_modeling import LanguageModeling, LanguageModelingArguments, TextArguments, held_out_text
from .state_tracking import StateTracking, StateTrackingArguments
from .task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (LanguageModeling, CopyMemoryTask, StateTracking)}


def make_task(arguments, model_fields: dict) -> Task:
    """Make the task that these arguments belong to; see `task_for`."""
    return task_for(arguments)(arguments, model_fields)


def task_for(arguments) -> type[Task]:
    """The task that these arguments belong to."""
    return next(task for task in TASKS.values() if task.arguments is type(arguments))


def task_of(recipe: dict) -> type[Task]:
    """The task that a model was trained on; language modeling if its recipe does not say.

    Raises:
        ValueError: if there is no such task.
    """
    name = recipe.get("task", LanguageModeling.name)
    if name not in [*TASKS]:  # it may be anything that YAML has
        raise ValueError(f"the recipe says task: {name}, which does not exist; there are {', '.join(TASKS)}.")
    return TASKS[name]


__all__ = [
    "TASKS",
    "CopyMemoryArguments",
    "CopyMemoryTask",
    "LanguageModeling",
    "LanguageModelingArguments",
    "StateTracking",
    "StateTrackingArguments",
    "Task",
    "TextArguments",
    "held_out_text",
    "make_task",
    "task_for",
    "task_of",
]
