"""Perplexity of a trained model, and what the equilibrium is worth: the dial as a table.

    python scripts/evaluate.py deq-model
    python scripts/evaluate.py deq-model --corpus my_text.txt --tolerances 1e-2 1e-3 --budgets 1 2 4

The first row bypasses the solver: one application of f to the zero state. The rows by budget stop
after so many evaluations, the rows by tolerance at that residual.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import hf_deq  # noqa: F401  registers the model types
from hf_deq.data import BUILT_IN_CORPUS, corpus_fingerprint, encode_corpus, load_corpus
from hf_deq.evaluation import dial_table, format_table

COLUMNS = ("bits_per_byte", "perplexity", "word_perplexity", "num_evaluations", "residual", "converged")


@dataclass
class EvaluateArguments:
    """What to evaluate on, and at which settings of the dial."""

    corpus: str | None = field(
        default=None, metadata={"help": "As for training; default: what the model was trained on."}
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    validation_file: str | None = field(default=None, metadata={"help": "Local text file to evaluate on."})
    split: str = field(default="validation", metadata={"help": "Split of the corpus."})
    tolerances: list[float] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3], metadata={"help": "Rows by tolerance."})
    budgets: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Rows by evaluations of f."})
    length: int = field(default=128, metadata={"help": "Tokens per window."})
    stride: int | None = field(default=None, metadata={"help": "Tokens a window advances; default: half of it."})
    batch_size: int = field(default=16, metadata={"help": "Windows per forward pass."})
    output: str | None = field(default=None, metadata={"help": "Also write the table to this JSON file."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu, cuda, mps."})


def load_stream(model_folder: str, tokenizer, arguments: EvaluateArguments):
    """The stream to evaluate on: what the arguments name, else what the model's recipe names."""
    recipe_file = Path(model_folder) / "recipe.yaml"
    recipe = yaml.safe_load(recipe_file.read_text()) if recipe_file.is_file() and arguments.corpus is None else {}
    corpus = load_corpus(
        arguments.corpus or recipe.get("corpus", BUILT_IN_CORPUS),
        arguments.corpus_config or recipe.get("corpus_config"),
        arguments.validation_file or recipe.get("validation_file"),
    )
    if arguments.split not in corpus:
        raise ValueError(f"the corpus has no split {arguments.split!r}; it has {sorted(corpus)}.")
    fingerprint = corpus_fingerprint(corpus)
    if recipe.get("corpus_fingerprint", fingerprint) != fingerprint:
        print(
            f"note: this corpus ({fingerprint}) is not the one the model was trained on "
            f"({recipe['corpus_fingerprint']}); the built-in one differs between Python versions, and parts of it may "
            "have been trained on."
        )
    return encode_corpus(corpus[arguments.split], tokenizer)


def main(model_folder: str, arguments: EvaluateArguments) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).to(arguments.device)
    stream = load_stream(model_folder, tokenizer, arguments)
    settings = [{"solver_max_evaluations": budget, "solver_tolerance": 0.0} for budget in arguments.budgets]
    settings += [{"solver_max_evaluations": None, "solver_tolerance": tolerance} for tolerance in arguments.tolerances]
    rows = dial_table(
        model,
        stream,
        tokenizer.eos_token_id,
        settings,
        length=arguments.length,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        progress=True,
    )
    print(
        f"{model_folder} on {len(stream.ids):,} tokens ({stream.num_words:,} words, {stream.num_bytes:,} bytes), "
        f"windows of {arguments.length}, stride {arguments.stride or arguments.length // 2}\n"
    )
    print(format_table([label(row) | {name: row[name] for name in COLUMNS} for row in rows]))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(rows, indent=1))


def label(row: dict) -> dict:
    if row["solver_max_evaluations"] is None:
        return {"dial": f"tolerance {row['solver_tolerance']:.0e}"}
    budget = row["solver_max_evaluations"]
    return {"dial": "no solver, f(0)" if budget == 1 else f"{budget} evaluations"}


if __name__ == "__main__":
    parser = HfArgumentParser(EvaluateArguments, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Model folder or Hub repository.")
    parsed, positional = parser.parse_args_into_dataclasses()
    try:
        main(positional.model, parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
