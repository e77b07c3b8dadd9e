"""Train a deep equilibrium language model with accelerate: the loop behind `scripts/train.py`.

    result = train(DataArguments(), TrainingArguments(output_dir="out"), model_fields)
    baseline = train(DataArguments(), TrainingArguments(output_dir="gpt2"), {"n_layer": 4}, "gpt2")

What is learnt is a task of `tasks.py`: a corpus for `DataArguments`, copy memory for `CopyMemoryArguments`. What is
asked of a model and read from it is in `training_models.py`: an explicit one takes the same steps as one of ours.

The run is a function of its arguments: the batch of step k depends on the seed and k alone, so a
run that stops and resumes takes the same steps as one that does not, and several processes take
the steps of one.
"""

import json
import math
import os
import shutil
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    set_seed,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from .optimizers import make_optimizer, make_schedule
from .tasks import CopyMemoryTask, LanguageModeling, make_task
from .training_arguments import CopyMemoryArguments, DataArguments, TrainingArguments
from .training_log import BAR, Clock, Meter, MetricsFile, Summary
from .training_memory import CarriedMemory
from .training_models import EquilibriumModel, ExplicitModel, model_kind

# What may differ between a run and its continuation.
FREE_ON_RESUME = (
    "output_dir",
    "resume",
    "num_threads",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "report_to",
    "sample_prompt",
    "sample_tokens",
)


class Interrupted(Exception):
    """Training was stopped by a signal; a checkpoint has been saved."""


def train(
    data: DataArguments | CopyMemoryArguments,
    training: TrainingArguments,
    model_fields: dict,
    model_type: str = "deq_transformer",
) -> dict:
    """Train, save, evaluate against the task's baselines and show a sample.

    Args:
        data, training: see there; `data` says which task it is.
        model_fields: fields of the model's configuration that differ from the defaults.
        model_type: which configuration, as registered with `AutoConfig`: one of ours, or that of an explicit causal
            language model such as "gpt2".

    Returns:
        The last line of metrics.jsonl: validation metrics, baselines, parameters, tokens trained on, and the seconds
        that training took, without validations and checkpoints.

    Raises:
        ValueError: arguments that do not fit each other, or a checkpoint of other arguments.
        OSError: `output_dir` cannot be written to; found out before anything else is done.
        Interrupted: after a checkpoint was saved on SIGINT or SIGTERM.
    """
    folder = _writable_folder(training.output_dir)
    accelerator = _make_accelerator(training, folder)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(training.num_threads or _cores_per_process())
    set_seed(training.seed)
    with accelerator.main_process_first():
        run = _prepare(data, training, model_fields, model_type, accelerator.print)
    _check_divisible(training, accelerator.num_processes)
    set_seed(training.seed, device_specific=True)  # from here on: dropout, which processes must not share
    return _Trainer(run, training, folder, accelerator).run()


@dataclass
class _Run:
    """What a run has before it starts; the recipe says all that made it so."""

    task: LanguageModeling | CopyMemoryTask
    model: torch.nn.Module
    kind: EquilibriumModel | ExplicitModel
    recipe: dict


def _prepare(data, training: TrainingArguments, model_fields: dict, model_type: str, say) -> _Run:
    task = make_task(data, model_fields)
    config = AutoConfig.for_model(model_type, **(model_fields | task.model_fields))
    task.adapt_to(config)
    kind = model_kind(config, training)
    kind.check(task, training)
    model = AutoModelForCausalLM.from_config(config)
    say(f"{task}; {model_type} with {model.num_parameters():,} parameters")
    recipe = {"task": data.task, "model_type": model_type} | task.recipe | asdict(data) | asdict(training)
    recipe = {name: value for name, value in (recipe | model_fields).items() if value is not None}
    return _Run(task, model, kind, recipe)


class _Trainer:
    """One run: optimizer, data and progress, the steps, checkpoints, and the report at the end."""

    def __init__(self, run: _Run, training: TrainingArguments, folder: Path, accelerator: Accelerator):
        self.task, self.kind, self.recipe = run.task, run.kind, run.recipe
        self.num_parameters = run.model.num_parameters()  # before it is shared out among processes
        self.arguments, self.folder, self.accelerator = training, folder, accelerator
        self.step = 0
        self.memory = CarriedMemory(accelerator, training.gradient_accumulation_steps)
        self.stop_requested = False
        optimizer = make_optimizer(run.model, training)
        schedule = make_schedule(optimizer, training)
        self.model, self.optimizer, self.schedule = accelerator.prepare(run.model, optimizer, schedule)
        self.metrics, self.clock = MetricsFile(folder, accelerator), Clock()
        self.meter = Meter(accelerator.device, self.clock)
        self.summary = Summary(getattr(sys.stderr, "encoding", None))

    @property
    def bare_model(self) -> torch.nn.Module:
        """The model without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def run(self) -> dict:
        if self.arguments.resume:
            self._load_checkpoint()
        self.metrics.keep_until(self.step)
        with _signals_as_requests(self):
            self._take_steps()
        seconds = self.clock.seconds()
        self._save_model()
        return self._report(seconds)

    def _take_steps(self) -> None:
        arguments = self.arguments
        batches = iter(self._loader())
        bar = tqdm(
            total=arguments.max_steps,
            initial=self.step,
            bar_format=BAR,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )
        while self.step < arguments.max_steps:
            self._optimize([next(batches) for _ in range(arguments.gradient_accumulation_steps)])
            self.step += 1
            bar.update()
            if self.step % arguments.logging_steps == 0 or self.step == arguments.max_steps:
                self._log(bar)
            if arguments.eval_steps and self.step % arguments.eval_steps == 0 and self.step < arguments.max_steps:
                with self.clock.paused():
                    self.metrics.write({"step": self.step} | _prefixed("validation", self._validate()))
            if arguments.save_steps and self.step % arguments.save_steps == 0:
                with self.clock.paused():
                    self._save_checkpoint()
            self._stop_if_requested(bar)
        bar.close()

    def _loader(self) -> DataLoader:
        self.sampler = self.task.batches(self.arguments, self.step)
        # A generator of its own: a loader draws one number when it starts, which would shift dropout on resuming.
        loader = DataLoader(self.task.examples, batch_sampler=self.sampler, generator=torch.Generator())
        return self.accelerator.prepare(loader)

    def _optimize(self, micro_batches: list[dict]) -> None:
        """One optimizer step."""
        self.model.train()
        for piece, batch in enumerate(micro_batches):
            with self.accelerator.accumulate(self.model):
                outputs = self.model(
                    batch["input_ids"],
                    labels=batch["labels"],
                    shift_labels=batch["labels"],  # they belong to the inputs of the same place already
                    use_cache=False,
                    **self.kind.arguments(self.step, self.memory.pieces[piece], self.arguments),
                )
                ends = self.sampler.starts_anew_at(self.step + 1)
                self.memory.pieces[piece] = None if ends else self.kind.memory(outputs)
                self.accelerator.backward(outputs.loss)
                if self.accelerator.sync_gradients and self.arguments.max_grad_norm:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
                    self.meter.add(gradient_norm=norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.meter.tokens += batch["labels"].numel() * self.accelerator.num_processes
            self.meter.add(**self.kind.measures(outputs, self.step, self.bare_model))

    def _log(self, bar: tqdm) -> None:
        line = {"step": self.step, "learning_rate": self.schedule.get_last_lr()[0]}
        line |= self.meter.means()
        line["perplexity"] = math.exp(min(line["loss"], 700))
        line["tokens_per_second"] = self.meter.tokens / self.meter.seconds()
        self.meter.reset()
        if not math.isfinite(line["loss"]):
            raise ValueError(
                f"The loss is {line['loss']} at step {self.step}: lower learning_rate or max_grad_norm, "
                "or raise warmup_steps."
            )
        bar.set_postfix_str(self.summary(line))
        self.metrics.write(line)

    def _stop_if_requested(self, bar: tqdm) -> None:
        if self.stop_requested:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():  # all processes leave at the same step
            bar.close()
            if self.step < self.arguments.max_steps:
                path = self._save_checkpoint()
                self._end()
                raise Interrupted(
                    f"stopped at step {self.step} of {self.arguments.max_steps}; saved {path}; continue with --resume"
                )

    # Checkpoints: accelerate saves model, optimizer, schedule and random states; the step is the data position.

    def _save_checkpoint(self) -> Path:
        path, fresh = self.folder / "checkpoint", self.folder / "checkpoint.new"
        meter, seconds = self.meter.totals(), self.clock.seconds()
        self.accelerator.save_state(str(fresh))
        self.memory.save(fresh)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {"step": self.step, "seconds": seconds, "meter": meter, "recipe": self.recipe}
            (fresh / "run.json").write_text(json.dumps(state, indent=1))
            shutil.rmtree(path, ignore_errors=True)  # only now that the new one is complete
            fresh.rename(path)
        self.accelerator.wait_for_everyone()
        return path

    def _load_checkpoint(self) -> None:
        path = self.folder / "checkpoint"
        if not path.exists():  # killed just before the new one took its place
            path = self.folder / "checkpoint.new"
        if not (path / "run.json").is_file():
            raise ValueError(f"resume: {self.folder} holds no checkpoint. Check output_dir, or start without --resume.")
        state = json.loads((path / "run.json").read_text())
        theirs, ours = state["recipe"], self.recipe
        different = {n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n)} - set(FREE_ON_RESUME)
        if different:
            changes = ", ".join(f"{name}: {theirs.get(name)} -> {ours.get(name)}" for name in sorted(different))
            raise ValueError(
                f"resume: {path} belongs to a run with other arguments ({changes}); use those, or another output_dir."
            )
        self.accelerator.load_state(str(path))
        self.memory.load(path)
        self.step = state["step"]
        self.clock.resume(state["seconds"])
        self.meter.reset()
        if self.accelerator.is_main_process:  # it holds the sums of all processes
            self.meter.resume(state["meter"])

    def _save_model(self) -> None:
        if self.accelerator.is_main_process:
            self.bare_model.save_pretrained(self.folder)
            self.task.save(self.folder)
            (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        self.accelerator.wait_for_everyone()

    def _validate(self) -> dict[str, float]:
        return self.kind.validation(self.task.validate(self.bare_model, self.accelerator))

    @property
    def num_tokens(self) -> int:
        """Predictions trained on so far; every example has the same number."""
        return self.step * self.arguments.batch_size * len(self.task.examples[0]["labels"])

    def _report(self, seconds: float) -> dict:
        say, metrics, baselines = self.accelerator.print, self._validate(), self.task.baselines()
        size = {"num_parameters": self.num_parameters, "num_tokens": self.num_tokens}
        say(
            f"\nvalidation: {self.task.describe(metrics, baselines)}\n{self.kind.describe(metrics)}"
            f"training: {self.num_parameters:,} parameters, {self.num_tokens:,} tokens in {seconds / 60:.1f} minutes"
        )
        line = {"step": self.step, "seconds": seconds, "num_processes": self.accelerator.num_processes} | size
        line |= _prefixed("validation", metrics) | baselines
        self.metrics.write(line)
        self._say_sample()
        say(
            "\nLoad it:\n  import hf_deq; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'  model = AutoModelForCausalLM.from_pretrained("{self.folder}")'
            + (f'; tokenizer = AutoTokenizer.from_pretrained("{self.folder}")' if self.task.tokenizer else "")
        )
        self._end()
        return line

    def _end(self) -> None:
        """Let go of the wrapped model before the process group goes: the other way round, gloo can deadlock."""
        self.model, self.optimizer, self.schedule = self.accelerator.free_memory(
            self.model, self.optimizer, self.schedule
        )
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _say_sample(self) -> None:
        if not self.accelerator.is_main_process or not self.arguments.sample_tokens:
            return
        self.accelerator.print(f"\nsample:\n{self.task.sample(self.bare_model.eval(), self.arguments)}")


class _signals_as_requests:
    """Within this context SIGINT and SIGTERM ask the trainer to stop after the step; a second one kills as usual."""

    def __init__(self, trainer: _Trainer):
        self.trainer, self.previous = trainer, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._request)

    def _request(self, number, frame):
        self.trainer.stop_requested = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _make_accelerator(training: TrainingArguments, folder: Path) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        # Micro-batches are fetched a step at a time, so the loader's end must not cut its last step into pieces.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=training.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # A batch is split over the processes: their number changes speed, not the run.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=training.report_to,
        project_config=ProjectConfiguration(project_dir=str(folder)),
    )
    if training.report_to:
        accelerator.init_trackers("hf_deq", config={k: v for k, v in asdict(training).items() if v is not None})
    return accelerator


def _cores_per_process() -> int:
    """Launchers set one thread a process where they see no GPU, which wastes the other cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _writable_folder(output_dir: str) -> Path:
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"output_dir {output_dir!r} cannot be written to ({error.strerror}); choose another.") from error
    return folder


def _check_divisible(training: TrainingArguments, num_processes: int) -> None:
    pieces = training.gradient_accumulation_steps * num_processes
    if training.batch_size % pieces:
        raise ValueError(
            f"batch_size={training.batch_size} must be divisible by gradient_accumulation_steps * processes = "
            f"{training.gradient_accumulation_steps} * {num_processes}."
        )


def _prefixed(prefix: str, values: dict) -> dict:
    return {f"{prefix}_{name}": value for name, value in values.items()}
