"""Put a finished model on the Hub, with its code and a card.

    hf-deq evaluate deq-model --output deq-model/results.json
    hf-deq plot deq-model --output deq-model           # figures for the card, if wanted
    hf-deq push deq-model --repo-id user/name --dry-run     # look at it first
    hf-deq push deq-model --repo-id user/name --private

The uploaded model loads with `trust_remote_code=True` where hf_deq is not installed. The card has the recipe, the cost
and the evaluation that lie in the model's folder.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer

from ..hub import RunRecord, export_hub_folder, load_model, read_config, read_record
from ..hub.export import require_empty
from . import run


@dataclass
class PushArguments:
    """Where the model goes, and what the card says besides."""

    repo_id: str = field(metadata={"help": "Repository on the Hub: user/name."})
    private: bool = field(default=False, metadata={"help": "Make the repository private, if it is new."})
    dry_run: bool = field(default=False, metadata={"help": "Upload nothing: leave the folder in output and list it."})
    output: str = field(default="hub-folder", metadata={"help": "Folder that a dry run leaves."})
    license: str = field(default="apache-2.0", metadata={"help": "License of the weights, as the Hub calls it."})
    language: str | None = field(
        default=None, metadata={"help": "ISO 639 code; default: en for corpora known to be English, else left out."}
    )


def main() -> None:
    """Upload as the command line says."""
    run(push, __doc__, PushArguments, model="Model folder, as `hf-deq train` writes it.")


def push(folder: str, options: PushArguments) -> None:
    """Export a model folder and upload it, or leave it for a look."""
    record = check(folder, options)
    if options.dry_run:
        export(folder, options.output, record, options)
        print(f"{options.output}, for {options.repo_id}:\n{listing(Path(options.output))}\nnothing was uploaded.")
        return
    with tempfile.TemporaryDirectory() as exported:
        export(folder, exported, record, options)
        print(f"{options.repo_id}:\n{listing(Path(exported))}")
        print(f"uploaded to {upload(exported, options)}")


def check(folder: str, options: PushArguments) -> RunRecord:
    """Return what the run recorded, if nothing is missing that an upload needs.

    Raises:
        ValueError: if the repository id is malformed, the model, its results or the token is missing, or the output
            folder is not empty.
    """
    validate_repo_id(options.repo_id)
    if "/" not in options.repo_id:
        raise ValueError(f"repo_id must be user/name, got {options.repo_id!r}.")
    record = read_record(folder, read_config(folder))
    if not record.results:
        missing = (
            f"{folder} has no results.json, so the card would have no metrics: write it by\n"
            f"  hf-deq evaluate {folder} --output {Path(folder) / 'results.json'}"
        )
        if not options.dry_run:
            raise ValueError(missing)
        print(f"warning: {missing}", file=sys.stderr)
    if options.dry_run:
        require_empty("output", options.output)
    elif get_token() is None:
        raise ValueError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")
    return record


def export(folder: str, output: str, record: RunRecord, options: PushArguments) -> None:
    """Write the self-contained folder of a model folder."""
    has_tokenizer = (Path(folder) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    export_hub_folder(load_model(folder), output, tokenizer, options.repo_id, record, options.license, options.language)


def listing(folder: Path) -> str:
    """Files and their sizes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "\n".join(f"{file.stat().st_size:>15,}  {file.relative_to(folder)}" for file in files)


def upload(folder: str, options: PushArguments) -> str:
    """Upload a folder; returns the address of the repository.

    Raises:
        OSError: if the Hub cannot be reached, or refuses the card or the upload.
    """
    api = HfApi()
    try:
        ModelCard.load(Path(folder) / "README.md").validate()  # by the Hub's own rules
        repository = api.create_repo(options.repo_id, private=options.private or None, exist_ok=True)
        api.upload_folder(
            repo_id=options.repo_id,
            folder_path=folder,
            commit_message="Upload model, code and card",
            delete_patterns=["*.safetensors*"],  # shards of an earlier upload would be loaded instead
        )
    except Exception as error:  # the library's network errors depend on what it is built on
        raise OSError(f"{options.repo_id} was not uploaded: {error}") from error
    return str(repository)


if __name__ == "__main__":
    main()
