"""Train a model on a task with accelerate.

    result = train(LanguageModelingArguments(), RunArguments(output_dir="out"), model_fields)
    baseline = train(LanguageModelingArguments(), RunArguments(output_dir="gpt2"), {"n_layer": 4}, "gpt2")

Which task to learn follows from the class of its arguments, see `hf_deq.tasks`. What the loop asks of a model is in
`models.py`: an explicit model takes the same steps as one of ours.

The run is a function of its arguments. The batch of step k depends on the seed and k alone, so a run that stops and
resumes takes the same steps as one that does not stop, and several processes take the steps of one.
"""

import math
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict
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
from transformers.utils import logging

from .arguments import RunArguments
from .checkpoints import Checkpoints
from .engine import check_engine, save_whole
from .folder import alone_in, check_free, remove_model, writable_folder
from .log import BAR, Clock, Meter, MetricsFile, Summary
from .memory import CarriedMemory
from .optimizers import make_optimizer, make_schedule
from .preparation import Prepared, prepare
from .step_guard import Diverged, StepGuard

logger = logging.get_logger(__name__)


class Interrupted(Exception):
    """Training was stopped by a signal. The message says whether it can be continued."""


def train(
    task_arguments,
    run: RunArguments,
    model_fields: dict,
    model_type: str = "deq_transformer",
) -> dict:
    """Train, save, evaluate against the task's baselines and show a sample.

    Args:
        task_arguments: of the task to learn, such as `LanguageModelingArguments`.
        run: how to train.
        model_fields: fields of the model's configuration that differ from the defaults.
        model_type: which configuration, as registered with `AutoConfig`: one of ours, or that of an explicit causal
            language model such as "gpt2".

    Returns:
        The last line of metrics.jsonl: validation scores, baselines, parameters, tokens trained on, and the seconds
        that training took, without validations and checkpoints.

    Raises:
        ValueError: if arguments do not fit each other, a checkpoint has other arguments, the folder holds another run,
            or another training writes to it.
        OSError: if `output_dir` cannot be written to. This is checked before anything else is done.
        Interrupted: after a checkpoint was saved on SIGINT or SIGTERM, or on SIGINT in the report at the end.
        Diverged: if gradients are not finite in several steps in a row.
    """
    folder = writable_folder(run.output_dir)
    accelerator = _make_accelerator(run, folder)
    with alone_in(folder) if accelerator.is_main_process else nullcontext():
        check_free(folder, run, getattr(task_arguments, "tokenizer", None))
        _start_trackers(accelerator, run)
        return _train(task_arguments, run, model_fields, model_type, folder, accelerator)


def _train(task_arguments, run: RunArguments, model_fields: dict, model_type: str, folder: Path, accelerator) -> dict:
    check_engine(accelerator)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(run.num_threads or _cores_per_process())
    set_seed(run.seed)
    with accelerator.main_process_first():
        prepared = prepare(task_arguments, run, model_fields, model_type)
    accelerator.print(f"{prepared.task}; {model_type} with {prepared.model.num_parameters():,} parameters")
    _check_divisible(run, accelerator.num_processes)
    set_seed(run.seed, device_specific=True)  # from here on: dropout, which processes must not share
    return _Trainer(prepared, run, folder, accelerator).run()


class _Trainer:
    """One run: optimizer, data, progress, the steps, and the report at the end."""

    def __init__(self, prepared: Prepared, arguments: RunArguments, folder: Path, accelerator: Accelerator):
        self.task, self.kind, self.recipe = prepared.task, prepared.kind, prepared.recipe
        self.num_parameters = prepared.model.num_parameters()  # before processes share the parameters
        self.arguments, self.folder, self.accelerator = arguments, folder, accelerator
        self.step = 0
        self.memory = CarriedMemory(accelerator, arguments.gradient_accumulation_steps)
        self.checkpoints = Checkpoints(folder, accelerator, self.memory, self.recipe, arguments.keep_checkpoints)
        self.stop_requested = False
        optimizer = make_optimizer(prepared.model, arguments, accelerator.device)
        schedule = make_schedule(optimizer, arguments)
        self.model, self.optimizer, self.schedule = accelerator.prepare(prepared.model, optimizer, schedule)
        self.guard = StepGuard(accelerator, self.optimizer)
        self.metrics, self.clock = MetricsFile(folder, accelerator), Clock()
        self.meter = Meter(accelerator.device, self.clock)
        self.summary = Summary(getattr(sys.stderr, "encoding", None))

    @property
    def bare_model(self) -> torch.nn.Module:
        """The model without the wrapper of accelerate."""
        return self.accelerator.unwrap_model(self.model)

    def run(self) -> dict:
        self._prepare_folder()
        first = self.step
        with _signals_as_requests(self):
            try:
                self._take_steps()
            except Diverged:
                self.metrics.write({"step": self.step, "diverged": True})
                raise
            with self.clock.paused() as seconds:
                self._save_model()
            if self.step > first:
                self._save_last_step()
        if self._stops():  # also for a signal that came since the last step was saved
            self._release()
            raise Interrupted(f"stopped after the last step, before the report; {self._remedy()}")
        try:
            line = self._report(seconds)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped in the report after the last step; {self._remedy()}") from None
        if not self.arguments.save_steps:
            self.checkpoints.remove(self.step)
        self._release()
        return line

    def _prepare_folder(self) -> None:
        """Bring the folder to where the run starts: to a checkpoint, or without what an earlier run has left."""
        if self.arguments.resume:
            self._load_checkpoint()
        elif self.accelerator.is_main_process:
            self.checkpoints.remove_all()
            if self.arguments.overwrite:
                remove_model(self.folder)
        if self.accelerator.is_main_process:
            (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        self.metrics.keep_until(self.step)

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
                with self.clock.paused() as seconds:
                    line = {"step": self.step, "seconds": seconds}
                    self.metrics.write(line | _prefixed("validation", self._validate()))
            if self._saves_now():
                with self.clock.paused():
                    self._save_checkpoint()
            self._stop_if_requested(bar)
        bar.close()

    def _loader(self) -> DataLoader:
        arguments = self.arguments
        steps, pieces = range(self.step, arguments.max_steps), arguments.gradient_accumulation_steps
        self.sampler = self.task.batches(steps, arguments.batch_size, pieces, arguments.seed)
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
                    shift_labels=batch["labels"],  # they belong to the inputs at the same place already
                    use_cache=False,
                    **self.kind.forward_arguments(self.step, self.memory.pieces[piece]),
                )
                ends = self.sampler.starts_anew_at(self.step + 1)
                self.memory.pieces[piece] = None if ends else self.kind.memory(outputs)
                self.accelerator.backward(outputs.loss)
                if self.accelerator.sync_gradients:
                    limit = self.arguments.max_grad_norm or math.inf
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                    self.meter.add(gradient_norm=norm)
                    self.guard.step(norm)
                self.schedule.step()
                self.optimizer.zero_grad()
            self.meter.tokens += batch["labels"].numel() * self.accelerator.num_processes
            self.meter.add(**self.kind.measures(outputs, self.step, self.bare_model))

    def _log(self, bar: tqdm) -> None:
        line = {"step": self.step, "learning_rate": self.schedule.get_last_lr()[0]}
        line |= self.meter.means()
        if "loss" in line:  # unless it was not finite in any step
            line["perplexity"] = math.exp(min(line["loss"], 700))
            self.guard.watch(line["loss"], self.step)
        if skipped := int(self.guard.skipped):
            line["skipped_steps"] = skipped
        line["tokens_per_second"] = self.meter.tokens / self.meter.seconds()
        self.meter.reset()
        self.guard.check(self.step, self.checkpoints)
        bar.set_postfix_str(self.summary(line))
        self.metrics.write(line)

    def _stops(self) -> bool:
        """Whether a signal has asked any process to stop: all processes leave at the same step."""
        if self.stop_requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _stop_if_requested(self, bar: tqdm) -> None:
        if self.step < self.arguments.max_steps and self._stops():
            bar.close()
            path = self._save_checkpoint()
            self._release()
            raise Interrupted(
                f"stopped at step {self.step} of {self.arguments.max_steps}; saved {path}; continue with --resume"
            )

    def _saves_now(self) -> bool:
        """Whether `save_steps` asks for a checkpoint of this step."""
        return bool(self.arguments.save_steps) and self.step % self.arguments.save_steps == 0

    def _save_checkpoint(self) -> Path:
        self.guard.check(self.step, self.checkpoints)
        progress = {"step": self.step, "seconds": self.clock.seconds(), "meter": self.meter.totals()}
        return self.checkpoints.save(progress | {"guard": self.guard.state()})

    def _save_last_step(self) -> None:
        """Save a checkpoint before the report. A report may take long, and whatever ends it must not cost the training.

        The model is saved already. So if the checkpoint cannot be written, a single process goes on with a warning.
        """
        if self._saves_now():  # it is there
            return
        try:
            self._save_checkpoint()
        except OSError as error:
            if self.accelerator.num_processes > 1:  # the others wait for this one
                raise
            logger.warning(
                "The model of the last step is saved, but its checkpoint could not be written "
                f"({error.__cause__ or error}). If the report is interrupted: {self._remedy()}."
            )

    def _remedy(self) -> str:
        """What to do after an interruption: the last checkpoint may be missing."""
        if self.checkpoints.last is not None:
            return "continue with --resume"
        return f"there is no checkpoint to continue from, but the model is saved: hf-deq evaluate {self.folder}"

    def _load_checkpoint(self) -> None:
        progress = self.checkpoints.load()
        self.step = progress["step"]
        self.clock.resume(progress["seconds"])
        self.guard.resume(progress.get("guard", {}))  # checkpoints of earlier versions have none
        self.meter.reset()
        if self.accelerator.is_main_process:  # it holds the sums of all processes
            self.meter.resume(progress["meter"])

    def _save_model(self) -> None:
        save_whole(self.model, self.accelerator, self.folder)
        if self.accelerator.is_main_process:
            self.task.save(self.folder, self.bare_model.config)
        self.accelerator.wait_for_everyone()

    def _validate(self) -> dict[str, float]:
        scores = self.task.held_out.score(self.bare_model, self.accelerator, progress=True)
        return self.kind.scores(scores)

    @property
    def num_tokens(self) -> int:
        """Predictions trained on so far. Every example has the same number."""
        return self.step * self.arguments.batch_size * len(self.task.examples[0]["labels"])

    def _report(self, seconds: float) -> dict:
        say, scores, baselines = self.accelerator.print, self._validate(), self.task.baselines()
        size = {"num_parameters": self.num_parameters, "num_tokens": self.num_tokens}
        say(
            f"\nvalidation: {self.task.describe(scores, baselines, self.bare_model.config)}\n"
            f"{self.kind.describe(scores)}"
            f"training: {self.num_parameters:,} parameters, {self.num_tokens:,} tokens in {seconds / 60:.1f} minutes"
        )
        line = {"step": self.step, "seconds": seconds, "num_processes": self.accelerator.num_processes} | size
        line |= _prefixed("validation", scores) | baselines
        self.metrics.write(line)
        if math.isfinite(scores[self.task.held_out.headline]):  # no token can be drawn from weights that are not
            self._say_sample()
        say(
            "\nLoad it:\n  import hf_deq; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'  model = AutoModelForCausalLM.from_pretrained("{self.folder}")'
            + (f'; tokenizer = AutoTokenizer.from_pretrained("{self.folder}")' if self.task.tokenizer else "")
        )
        return line

    def _release(self) -> None:
        """Release the wrapped model before the process group ends. In the other order, gloo can deadlock."""
        self.model, self.optimizer, self.schedule = self.accelerator.free_memory(
            self.model, self.optimizer, self.schedule
        )
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _say_sample(self) -> None:
        set_seed(self.arguments.seed)  # all processes draw the same sample, because a sharded model needs all of them
        sample = self.task.sample(self.bare_model.eval())
        if sample is not None:
            self.accelerator.print(f"\nsample:\n{sample}")


class _signals_as_requests:
    """Within this context SIGINT and SIGTERM ask the trainer to stop after the step. A second signal kills as usual."""

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


def _make_accelerator(run: RunArguments, folder: Path) -> Accelerator:
    return Accelerator(
        mixed_precision=run.mixed_precision,
        # Micro-batches are fetched step by step, so the end of the loader must not split its last step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=run.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # A batch is split among the processes, so their number changes the speed and not the batches.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=run.report_to,
        project_config=ProjectConfiguration(project_dir=str(folder)),
    )


def _start_trackers(accelerator: Accelerator, run: RunArguments) -> None:
    if run.report_to:
        given = {name: value for name, value in asdict(run).items() if value is not None}
        plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in given.items()}
        accelerator.init_trackers("hf_deq", config=plain)


def _cores_per_process() -> int:
    """Cores for each process. Without a GPU, launchers set one thread per process, which wastes the other cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _check_divisible(run: RunArguments, num_processes: int) -> None:
    pieces = run.gradient_accumulation_steps * num_processes
    if run.batch_size % pieces:
        raise ValueError(
            f"batch_size={run.batch_size} must be divisible by gradient_accumulation_steps * processes = "
            f"{run.gradient_accumulation_steps} * {num_processes}."
        )


def _prefixed(prefix: str, values: dict) -> dict:
    return {f"{prefix}_{name}": value for name, value in values.items()}
