"""Turn a checkpoint of the authors' code into a model folder of this package.

    hf-deq convert checkpoint.safetensors --family deq_transformer --arguments arguments.json
    hf-deq convert attractor-140m --family attractor

The file holds a state dict: safetensors, or a pickle of tensors alone. A whole pickled model, as the authors' scripts
save it, runs code when it is loaded: load it there, with their code, and save its `state_dict()`. The arguments are
those of the language model's constructor, as a JSON object. A folder holds the state dict (model.safetensors, model.pt
or pytorch_model.bin) and, as config.json, the arguments.
"""

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ..hub.conversion import FAMILIES, convert_checkpoint
from ..hub.export import require_empty
from . import run

STATE_DICT_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin")

CARD = """---
{{ card_data }}
---

# {{ name }}

A {{ model_type }} of {{ parameters }} parameters, converted from `{{ checkpoint }}` (family `{{ family }}`).

```python
import hf_deq
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ folder }}")
```

Converted by `hf-deq convert {{ checkpoint }} --family {{ family }} --arguments ...` from a model
that was made with

```json
{{ arguments }}
```

Its quality was not measured here: `hf-deq evaluate {{ folder }} --corpus ...` measures it.
"""


@dataclass
class ConvertArguments:
    """What to convert, and where to."""

    family: str = field(metadata={"help": "Which code base it is from.", "choices": list(FAMILIES)})
    arguments: str | None = field(
        default=None,
        metadata={"help": "JSON file with the arguments of the model's constructor there; default: a folder's config."},
    )
    output_dir: str = field(default="converted-model", metadata={"help": "New or empty folder for the model."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer to put beside it (folder or Hub name), with ids of the same order."}
    )


def main() -> None:
    """Convert as the command line says."""
    run(convert, __doc__, ConvertArguments, checkpoint="File with the state dict, or folder.")


def convert(checkpoint: str, options: ConvertArguments) -> None:
    """Write the model folder of a checkpoint.

    Raises:
        ValueError: if the output folder is not empty.
    """
    require_empty("output_dir", options.output_dir)
    file, arguments_file = find_files(Path(checkpoint), options.arguments)
    state_dict, arguments = read_state_dict(file), read_arguments(arguments_file)
    print(f"{checkpoint}: {len(state_dict)} tensors, to be converted ...", flush=True)
    model = convert_checkpoint(state_dict, arguments, options.family)
    if options.tokenizer:
        sizes = {model.config.vocab_size, arguments.get("vocab_size", model.config.vocab_size)}  # padded, and not
        save_tokenizer(options.tokenizer, sizes, options.output_dir)
    model.save_pretrained(options.output_dir)
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["deep-equilibrium-model"]),
        template_str=CARD,
        name=Path(options.output_dir).name,
        model_type=model.config.model_type,
        parameters=f"{model.num_parameters():,}",
        checkpoint=Path(checkpoint).name,
        family=options.family,
        folder=options.output_dir,
        arguments=json.dumps(arguments),
    )
    card.save(Path(options.output_dir) / "README.md")
    print(f"{options.output_dir}: {model.config.model_type} of {model.num_parameters():,} parameters")


def find_files(checkpoint: Path, arguments: str | None) -> tuple[Path, Path]:
    """The file with the state dict, and the one with the constructor's arguments.

    Raises:
        ValueError: if a folder has no state dict, or there is a file and no arguments are given.
    """
    if checkpoint.is_dir():
        file = next((checkpoint / name for name in STATE_DICT_FILES if (checkpoint / name).is_file()), None)
        if file is None:
            raise ValueError(f"{checkpoint} holds none of {', '.join(STATE_DICT_FILES)}: name the file itself.")
        return file, Path(arguments or checkpoint / "config.json")
    if arguments is None:
        raise ValueError("--arguments is missing: a JSON file with the arguments of the model's constructor.")
    return checkpoint, Path(arguments)


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name.

    Raises:
        ValueError: if there is no such file, or it holds more than tensors.
    """
    if not file.is_file():
        raise ValueError(f"there is no checkpoint {str(file)!r}.")
    try:
        loaded = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} is not a file of tensors alone ({str(error).splitlines()[0]}). If it is a pickled model, load it "
            "with the code that made it and save its state_dict()."
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):  # beside it: an optimizer, a step
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{file} holds more than a state dict: save model.state_dict() alone.")
    return loaded


def read_arguments(file: Path) -> dict:
    """The constructor's arguments.

    Raises:
        ValueError: if there is no such file, or it is not a JSON object.
    """
    if not file.is_file():
        raise ValueError(f"there is no file of arguments {str(file)!r}.")
    try:
        arguments = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(arguments, dict):
        raise ValueError(f'{file} must be a JSON object of constructor arguments, such as {{"n_token": 10000, ...}}.')
    return arguments


def save_tokenizer(name: str, vocab_sizes: set[int], folder: str) -> None:
    """Put a tokenizer into the folder.

    Raises:
        ValueError: if it has another number of tokens than the model, with the padding of its vocabulary or without.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) not in vocab_sizes:
        sizes = " or ".join(f"{size:,}" for size in sorted(vocab_sizes))
        raise ValueError(f"tokenizer {name!r} has {len(tokenizer):,} tokens, the model {sizes}.")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
