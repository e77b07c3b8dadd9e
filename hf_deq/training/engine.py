"""The engines of accelerate that can train: one process, data parallelism (DDP), and sharded weights (FSDP2).

A sharded model is whole only while all processes compute with it. So all of them take part whenever it is called, in
evaluations and samples too, and they call it equally often.
"""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel


def check_engine(accelerator: Accelerator) -> None:
    """Refuse an engine that cannot train these models, or that was asked for and is not there.

    Raises:
        ValueError: for DeepSpeed, for FSDP of the first version, and if accelerate does not shard although it should.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed gathers weights by hooks on modules inside f, which would run in every evaluation; it was not "
            "tried with these models. Use FSDP2, which shards as well: --use_fsdp --fsdp_version 2."
        )
    if is_sharded(accelerator):
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP of version 1 hooks into the gradient of f: add --fsdp_version 2.")
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            f"FSDP was asked for, but accelerate does not shard on {accelerator.num_processes} process(es) of "
            f"{accelerator.device.type}: it needs several accelerator devices. Leave --use_fsdp out."
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether every process holds a part of the weights."""
    return accelerator.distributed_type == DistributedType.FSDP


def save_whole(model: PreTrainedModel, accelerator: Accelerator, folder: Path) -> None:
    """Save the whole model of all processes as `save_pretrained` does. All processes must call this.

    Args:
        model: as accelerate has prepared it.
        folder: where to save.
    """
    bare = accelerator.unwrap_model(model)
    if not is_sharded(accelerator):
        if accelerator.is_main_process:
            bare.save_pretrained(folder)
        return
    whole = accelerator.get_state_dict(model)  # on the main process; elsewhere it is empty
    if accelerator.is_main_process:
        tied = getattr(bare, "all_tied_weights_keys", {})  # copies here, which the file must not have twice
        bare.save_pretrained(folder, state_dict={name: tensor for name, tensor in whole.items() if name not in tied})
