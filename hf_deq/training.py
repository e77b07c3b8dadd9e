"""Train a deep equilibrium language model with accelerate: the loop behind `scripts/train.py`.

    result = train(DataArguments(), TrainingArguments(output_dir="out"), model_fields)

The run is a function of its arguments: the batch of step k depends on the seed and k alone, so a
run that stops and resumes takes the same steps as one that does not, and several processes take
the steps of one.
"""

import json
import math
import os
import shutil
import signal
import time
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from .data import (
    SequenceBlocks,
    StepBatches,
    TokenStream,
    corpus_fingerprint,
    encode_corpus,
    load_corpus,
    train_tokenizer,
)
from .evaluation import evaluate_perplexity, ngram_bits_per_byte
from .training_arguments import DataArguments, TrainingArguments
from .training_log import Meter, MetricsFile, summary

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
    data: DataArguments, training: TrainingArguments, model_fields: dict, model_type: str = "deq_transformer"
) -> dict:
    """Train, save, evaluate against n-gram baselines and sample a text.

    Args:
        data, training: see there.
        model_fields: fields of the model's configuration that differ from the defaults.
        model_type: which configuration, as registered with `AutoConfig`.

    Returns:
        The last line of metrics.jsonl: validation metrics, baselines, wall time.

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
        task = _prepare_task(data, training, model_fields, model_type, accelerator.print)
    _check_divisible(training, accelerator.num_processes)
    set_seed(training.seed, device_specific=True)  # from here on: dropout, which processes must not share
    return _Trainer(task, training, folder, accelerator).run()


@dataclass
class _Task:
    """What a run has before it starts; the recipe says all that made it so."""

    model: torch.nn.Module
    tokenizer: object
    train: TokenStream
    validation: TokenStream
    blocks: SequenceBlocks
    recipe: dict


def _prepare_task(data: DataArguments, training: TrainingArguments, model_fields: dict, model_type: str, say) -> _Task:
    corpus = load_corpus(data.corpus, data.corpus_config, data.validation_file)
    fingerprint = corpus_fingerprint(corpus)
    if data.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    else:
        tokenizer = train_tokenizer(corpus["train"], model_fields.get("vocab_size", 2048))
    streams = {split: encode_corpus(corpus[split], tokenizer) for split in ("train", "validation")}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(model_type, **(model_fields | {"vocab_size": len(tokenizer)} | special))
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    model = AutoModelForCausalLM.from_config(config)
    say(
        f"{data.corpus} ({fingerprint}): {len(streams['train'].ids):,} training and {len(streams['validation'].ids):,} "
        f"validation tokens of {len(tokenizer):,} kinds; {model_type} with {model.num_parameters():,} parameters"
    )
    recipe = (
        {"model_type": model_type, "corpus_fingerprint": fingerprint} | asdict(data) | asdict(training) | model_fields
    )
    recipe = {name: value for name, value in recipe.items() if value is not None}
    blocks = SequenceBlocks(streams["train"].ids, data.sequence_length)
    return _Task(model, tokenizer, streams["train"], streams["validation"], blocks, recipe)


class _Trainer:
    """One run: optimizer, data and progress, the steps, checkpoints, and the report at the end."""

    def __init__(self, task: _Task, training: TrainingArguments, folder: Path, accelerator: Accelerator):
        self.task, self.arguments, self.folder, self.accelerator = task, training, folder, accelerator
        self.config = task.model.config
        self.step = 0
        self.stop_requested = False
        self.meter, self.metrics = Meter(accelerator.device), MetricsFile(folder, accelerator)
        optimizer = torch.optim.AdamW(
            _parameter_groups(task.model, training.weight_decay),
            lr=training.learning_rate,
            betas=(0.9, training.adam_beta2),
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, training.warmup_steps, training.max_steps)
        self.model, self.optimizer, self.schedule = accelerator.prepare(task.model, optimizer, schedule)

    @property
    def bare_model(self) -> torch.nn.Module:
        """The model without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def run(self) -> dict:
        if self.arguments.resume:
            self._load_checkpoint()
        self.metrics.keep_until(self.step)
        started = time.perf_counter()
        with _signals_as_requests(self):
            self._take_steps()
        seconds = time.perf_counter() - started
        self._save_model()
        return self._report(seconds)

    def _take_steps(self) -> None:
        arguments = self.arguments
        batches = iter(self._loader())
        bar = tqdm(
            total=arguments.max_steps,
            initial=self.step,
            desc="train",
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
                self.metrics.write({"step": self.step} | _prefixed("validation", asdict(self._validate())))
            if arguments.save_steps and self.step % arguments.save_steps == 0:
                self._save_checkpoint()
            self._stop_if_requested(bar)
        bar.close()

    def _loader(self) -> DataLoader:
        accumulation = self.arguments.gradient_accumulation_steps
        batches = StepBatches(
            len(self.task.blocks),
            self.arguments.batch_size // accumulation,
            self.arguments.seed,
            self.step * accumulation,
            self.arguments.max_steps * accumulation,
        )
        # A generator of its own: a loader draws one number when it starts, which would shift dropout on resuming.
        loader = DataLoader(self.task.blocks, batch_sampler=batches, generator=torch.Generator())
        return self.accelerator.prepare(loader)

    def _optimize(self, micro_batches: list[dict]) -> None:
        """One optimizer step. Shallow pretraining unrolls; afterwards the equilibrium is solved."""
        shallow = self.step < self.config.shallow_steps
        dial = {"unroll_steps": self.config.shallow_depth} if shallow else {}
        if self.arguments.train_solver_tolerance is not None:
            dial["solver_tolerance"] = self.arguments.train_solver_tolerance
        self.model.train()
        for batch in micro_batches:
            with self.accelerator.accumulate(self.model):
                ids = batch["input_ids"]
                outputs = self.model(ids, labels=ids, use_cache=False, **dial)
                self.accelerator.backward(outputs.loss)
                if self.accelerator.sync_gradients and self.arguments.max_grad_norm:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
                    self.meter.add(gradient_norm=norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self._measure(outputs, ids, shallow)

    def _measure(self, outputs, ids, shallow: bool) -> None:
        meter = self.meter
        meter.tokens += ids.shape[0] * (ids.shape[1] - 1) * self.accelerator.num_processes
        loss = outputs.loss.detach()
        if outputs.jacobian_loss is not None:  # logged by itself: the loss in the log is the cross-entropy
            meter.add(jacobian_loss=outputs.jacobian_loss)
            loss = loss - self.config.jacobian_loss_weight * outputs.jacobian_loss.detach()
        meter.add(
            loss=loss,
            forward_evaluations=outputs.num_evaluations.float().mean(),
            residual=outputs.residual.mean(),
            converged=outputs.converged.float().mean(),
        )
        backward = self.bare_model.model.layers[0].backward_evaluations
        if backward is not None and not shallow:
            meter.add(backward_evaluations=backward.float().mean())

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
        bar.set_postfix_str(summary(line))
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
        meter = self.meter.totals()
        self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {"step": self.step, "meter": meter, "recipe": self.task.recipe}
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
        theirs, ours = state["recipe"], self.task.recipe
        different = {n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n)} - set(FREE_ON_RESUME)
        if different:
            changes = ", ".join(f"{name}: {theirs.get(name)} -> {ours.get(name)}" for name in sorted(different))
            raise ValueError(
                f"resume: {path} belongs to a run with other arguments ({changes}); use those, or another output_dir."
            )
        self.accelerator.load_state(str(path))
        self.step = state["step"]
        if self.accelerator.is_main_process:  # it holds the sums of all processes
            self.meter.resume(state["meter"])

    def _save_model(self) -> None:
        if self.accelerator.is_main_process:
            self.bare_model.save_pretrained(self.folder)
            self.task.tokenizer.save_pretrained(self.folder)
            (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.task.recipe, sort_keys=False))
        self.accelerator.wait_for_everyone()

    def _validate(self):
        return evaluate_perplexity(
            self.bare_model,
            self.task.validation,
            self.task.tokenizer.eos_token_id,
            length=self.task.blocks.length,
            accelerator=self.accelerator,
            progress=True,
        )

    def _report(self, seconds: float) -> dict:
        task, say = self.task, self.accelerator.print
        report = self._validate()
        names = ("unigram", "bigram", "trigram")
        vocab_size, start = self.config.vocab_size, task.tokenizer.eos_token_id
        baselines = {
            name: ngram_bits_per_byte(task.train, task.validation, start, vocab_size, order)
            for order, name in enumerate(names, start=1)
        }
        say(
            f"\nvalidation: perplexity {report.perplexity:.2f} per token, {report.word_perplexity:.1f} per word; "
            f"{report.bits_per_byte:.3f} bits per byte over {report.num_tokens:,} tokens\n"
            "n-grams (Witten-Bell) on the same tokens: "
            + ", ".join(f"{name} {bits:.3f}" for name, bits in baselines.items())
            + f" bits per byte\nequilibrium: {report.num_evaluations:.1f} evaluations to a residual of "
            f"{report.residual:.1e}, {report.converged:.0%} of the sequences converged; "
            f"training took {seconds / 60:.1f} minutes"
        )
        line = {"step": self.step, "seconds": seconds, "num_processes": self.accelerator.num_processes}
        line |= _prefixed("validation", asdict(report)) | _prefixed("bits_per_byte", baselines)
        self.metrics.write(line)
        self._say_sample()
        say(
            f"\nLoad it:\n  import hf_deq; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'  model = AutoModelForCausalLM.from_pretrained("{self.folder}"); '
            f'tokenizer = AutoTokenizer.from_pretrained("{self.folder}")'
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
        model, tokenizer = self.bare_model.eval(), self.task.tokenizer
        inputs = tokenizer(self.arguments.sample_prompt, return_tensors="pt", return_token_type_ids=False).to(
            model.device
        )
        ids = model.generate(
            **inputs, max_new_tokens=self.arguments.sample_tokens, do_sample=True, top_p=0.9, temperature=0.8
        )
        self.accelerator.print(f"\nsample:\n{tokenizer.decode(ids[0], skip_special_tokens=True)}")


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


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of linear maps; none for embeddings, norms and biases."""
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        spared = parameter.dim() < 2 or name.endswith("bias") or id(parameter) in embeddings
        groups[spared]["params"].append(parameter)
    return groups


def _prefixed(prefix: str, values: dict) -> dict:
    return {f"{prefix}_{name}": value for name, value in values.items()}
