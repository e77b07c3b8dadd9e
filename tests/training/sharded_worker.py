"""One process of a sharded run: trains as its flags say, and counts how often weights are gathered.

accelerate does not shard on CPUs, so its choice of the engine is overruled here. From there on all is its own code.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

if sys.argv[1] == "trainer":  # which saves a whole model from whole weights only
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"

import torch
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_deq.commands.train import parse
from hf_deq.training import loop

initialize, gather = state.AcceleratorState.__init__, _fsdp_param_group.foreach_all_gather
gathered = []


def initialize_sharded(self, *arguments, fsdp_plugin=None, **how):
    initialize(self, *arguments, fsdp_plugin=fsdp_plugin, **how)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def counting(*arguments, **how):
    gathered.append(1)
    return gather(*arguments, **how)


state.AcceleratorState.__init__ = initialize_sharded
_fsdp_param_group.foreach_all_gather = counting
optimize, per_step = loop._Trainer._optimize, []


def optimize_counting(self, micro_batches):
    gathered.clear()
    optimize(self, micro_batches)
    per_step.append(len(gathered))


loop._Trainer._optimize = optimize_counting
torch.set_num_threads(1)


def train_with_trainer(folder: Path, model_folder: str) -> None:
    """Transformers' own Trainer: rows of numbers, AdamW, no dropout."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, 60, (80, 12), generator=generator)]
    each = 8 // int(os.environ.get("WORLD_SIZE", 1))
    how = dict(max_steps=10, logging_steps=1, per_device_train_batch_size=each, learning_rate=1e-3, report_to="none")
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", **how)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    if int(os.environ["RANK"]) == 0:
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        sharded = trainer.accelerator.distributed_type == DistributedType.FSDP
        (folder / "outcome.json").write_text(json.dumps({"losses": losses, "sharded": sharded}))
    trainer.accelerator.free_memory(trainer.model_wrapped)
    trainer.accelerator.end_training()


flags = sys.argv[1:]
if flags[0] == "trainer":
    train_with_trainer(Path(flags[1]), flags[2])
    sys.exit()
try:
    loop.train(*parse(flags))
    outcome = "finished"
except ValueError as error:
    outcome = str(error)
if int(os.environ["RANK"]) == 0:
    folder = Path(flags[flags.index("--output_dir") + 1])
    (folder / "outcome.json").write_text(json.dumps({"outcome": outcome, "gathered": per_step}))
