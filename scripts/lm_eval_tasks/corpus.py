"""The task of corpus.yaml: a split of a corpus as the one document of an lm-eval task.

    lm_eval --model hf --model_args pretrained=deq-model,max_length=128 --tasks scripts/lm_eval_tasks/corpus.yaml
    lm_eval ... --metadata '{"corpus": "my_text.txt", "split": "validation"}'

lm-eval predicts every token of a document once, the first one from the beginning-of-text token, in windows of
`max_length` that do not overlap, but for the last one, which reaches back to be as long as the others. Of the same
tokens these are the windows of `python scripts/evaluate.py deq-model --length 128 --stride 128`. For the tokens to be
the same, the documents of the corpus are joined here by what ends each of them in training, and counted as there: what
the end-of-text tokens cost is shared out among words and bytes, but they are neither.

lm-eval hands its metadata to the functions of a task, and the model's arguments with it. A task that is given as a file
is read before the model is loaded: importing hf_deq here lets it load what scripts/train.py writes.
"""

from dataclasses import fields

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from hf_deq.data import CorpusArguments, read_corpus_of, read_recipe


def as_one_document(pretrained: str, split: str = "validation", **arguments) -> DatasetDict:
    """A split with its words and bytes, in one row of `text`, `num_words`, `num_bytes`.

    Args:
        pretrained: the model's folder or Hub repository, whose tokenizer says what ends a text.
        split: of the corpus: `"validation"`, `"test"` or `"train"`.
        arguments: the fields of `CorpusArguments`, as for training; without a `corpus`
            they are those of the model's recipe.yaml, or the built-in corpus. `tokenizer`, if not the model's. The
            model's other arguments are ignored.

    Raises:
        ValueError: the corpus is not there, has no such split, or no text in it.
    """
    names = [field.name for field in fields(CorpusArguments)]
    corpus = read_corpus_of(read_recipe(pretrained), {name: arguments.get(name) for name in names})
    tokenizer = AutoTokenizer.from_pretrained(arguments.get("tokenizer", pretrained))
    stream = corpus.encode(split, tokenizer)
    end = "\n" if corpus.word_level else tokenizer.eos_token
    text = "".join(document + end for document in corpus.split(split)["text"] if document or corpus.word_level)
    rows = {"text": [text], "num_words": [stream.num_words], "num_bytes": [stream.num_bytes]}
    return DatasetDict({"test": Dataset.from_dict(rows)})


def share_out(document: dict, results: list[float]) -> dict[str, tuple[float, int]]:
    """The log-likelihood of a document, and what each metric divides it by."""
    (log_likelihood,) = results
    per_byte = (log_likelihood, document["num_bytes"])
    return {
        "word_perplexity": (log_likelihood, document["num_words"]),
        "byte_perplexity": per_byte,
        "bits_per_byte": per_byte,
    }
