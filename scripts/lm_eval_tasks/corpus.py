"""The task of corpus.yaml: a split of a corpus as the one document of an lm-eval task.

    lm_eval --model hf --model_args pretrained=deq-model,max_length=128 --tasks scripts/lm_eval_tasks/corpus.yaml
    lm_eval ... --metadata '{"corpus": "my_text.txt", "split": "validation"}'

lm-eval predicts every token of a document once, the first one from the beginning-of-text token. Its windows of
`max_length` tokens do not overlap, except the last one, which reaches back to be as long as the others. These are the
windows of `python scripts/evaluate.py deq-model --length 128 --stride 128`, if the tokens are the same. So the
documents of the corpus are joined here by the token that ends each of them in training. Words and bytes are counted
as there: an end-of-text token is neither a word nor a byte, but its nats count.

lm-eval passes its metadata and the arguments of the model to the functions of a task. A task that is given as a file
is read before the model is loaded. So importing hf_deq here lets lm-eval load a model that scripts/train.py wrote.
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
        ValueError: the corpus is not there, has no such split, or no text in it, or the tokenizer lacks words of it.
    """
    names = [field.name for field in fields(CorpusArguments)]
    corpus = read_corpus_of(read_recipe(pretrained), {name: arguments.get(name) for name in names})
    tokenizer = AutoTokenizer.from_pretrained(arguments.get("tokenizer", pretrained))
    stream = corpus.encode(split, tokenizer)
    if stream.num_unknown:
        raise ValueError(
            f"{stream.num_unknown:,} words of the {split} split are not in the vocabulary, and <unk> stands for them: "
            "a score per word or byte would not be one of the text. Take a corpus whose words the model has."
        )
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
