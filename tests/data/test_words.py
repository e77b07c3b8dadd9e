"""Word-level corpora: lines, words, ids, and the counts of the published ones."""

import json
import math
import re
import runpy

import pytest
from command_line import ROOT, TINY, script
from datasets import Dataset, DatasetDict
from families import TRANSFORMER
from transformers import AutoTokenizer

from hf_deq.data import CorpusArguments, SequenceBlocks, read_corpus, train_tokenizer, words
from hf_deq.data.words import (
    PENN_TREEBANK,
    WIKITEXT_103,
    KnownCorpus,
    encode_words,
    known_corpus,
    train_word_tokenizer,
)
from hf_deq.evaluation import evaluate_perplexity
from hf_deq.tasks import LanguageModeling, LanguageModelingArguments


def lines_of(folder):
    """The splits of a corpus of words."""
    return read_corpus(CorpusArguments(str(folder), word_level=True)).splits


PTB = ROOT.parent / "shared" / "data" / "ptb"
needs_ptb = pytest.mark.skipif(
    not (PTB / "train.txt").is_file(),
    reason=f"the Penn Treebank is not ours to distribute: put train.txt, valid.txt and test.txt into {PTB} to test it",
)

# Odd on purpose: empty lines, white space of several kinds, <unk> inside of a word, no line break at the end.
TRAIN = " the cat sat \n\n the\tdog <unk>s\u00a0on the <unk> \n"
VALID = "a cat <unk>\n \nthe dog"
TEST = "the bird\n"


@pytest.fixture
def folder(tmp_path):
    for name, text in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_lines_are_split_on_white_space_and_end_in_eos(folder):
    corpus = lines_of(folder)
    assert {split: len(corpus[split]) for split in corpus} == {"train": 3, "validation": 3, "test": 1}
    tokenizer = train_word_tokenizer(corpus)
    stream = encode_words(corpus["train"], tokenizer)
    expected = "the cat sat <eos> <eos> the dog <unk>s on the <unk> <eos>"
    assert " ".join(tokenizer.convert_ids_to_tokens(stream.ids)) == expected
    assert stream.num_words == 9  # without <eos>
    assert stream.num_bytes == len(b"the cat sat") + len("the\tdog <unk>s\u00a0on the <unk>".encode())
    expected = "<unk> cat <unk> <eos> <eos> the dog <eos>"  # "a" is new to it
    validation = encode_words(corpus["validation"], tokenizer)
    assert " ".join(tokenizer.convert_ids_to_tokens(validation.ids)) == expected
    assert (stream.num_unknown, validation.num_unknown) == (0, 1)  # an <unk> that is written does not count


def test_ids_by_frequency_or_by_appearance(folder):
    corpus = lines_of(folder)
    vocabulary = train_word_tokenizer(corpus, "frequency").get_vocab()
    assert sorted(vocabulary, key=vocabulary.get) == ["<eos>", "the", "cat", "sat", "dog", "<unk>s", "on", "<unk>"]
    vocabulary = train_word_tokenizer(corpus, "appearance").get_vocab()
    expected = ["the", "cat", "sat", "<eos>", "dog", "<unk>s", "on", "<unk>", "a", "bird"]
    assert sorted(vocabulary, key=vocabulary.get) == expected
    everywhere = KnownCorpus("all parts", {}, 10, counted=("train", "validation", "test"))
    vocabulary = train_word_tokenizer(corpus, "frequency", everywhere).get_vocab()
    expected = ["<eos>", "the", "cat", "dog", "<unk>", "sat", "<unk>s", "on", "a", "bird"]
    assert sorted(vocabulary, key=vocabulary.get) == expected


@pytest.mark.parametrize("id_order", words.ID_ORDERS)
def test_the_saved_tokenizer_reads_as_the_corpus_reader(folder, tmp_path, id_order):
    corpus = lines_of(folder)
    train_word_tokenizer(corpus, id_order).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<eos>"
    assert tokenizer.unk_token == "<unk>"
    for split, text in (("train", TRAIN), ("validation", VALID + "\n"), ("test", TEST)):
        assert tokenizer(text)["input_ids"] == encode_words(corpus[split], tokenizer).ids.tolist()
    for white_space in "\x1c\x1d\x1e\x1f\x85\u2028\u3000\x0b\x0c":
        assert tokenizer(f"the{white_space}cat") == tokenizer("the cat")
    assert tokenizer.decode(tokenizer("the cat\n")["input_ids"]) == "the cat <eos>"


def test_other_file_names_and_datasets_of_lines(folder, tmp_path):
    for split, name in (("train", "wiki.train.tokens"), ("valid", "wiki.valid.tokens"), ("test", "wiki.test.tokens")):
        (folder / f"{split}.txt").rename(folder / name)
    corpus = lines_of(folder)
    hub = tmp_path / "hub"  # rows as on the Hub: a line with its line break
    hub.mkdir()
    for split in corpus:
        rows = [json.dumps({"text": f"{line}\n"}) for line in corpus[split]["text"]]
        (hub / f"{split}.jsonl").write_text("\n".join(rows))
    other = lines_of(hub)
    tokenizer = train_word_tokenizer(corpus)
    assert train_word_tokenizer(other).get_vocab() == tokenizer.get_vocab()
    for split in ("train", "validation", "test"):
        one, two = (encode_words(each[split], tokenizer) for each in (corpus, other))
        assert one.ids.tolist() == two.ids.tolist() and one.num_bytes == two.num_bytes


def test_what_cannot_be_read_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is a file: word_level reads a folder"):
        lines_of(folder / "train.txt")
    corpus = lines_of(folder)
    with pytest.raises(ValueError, match="id_order must be one of frequency, appearance, got 'size'"):
        train_word_tokenizer(corpus, "size")
    with pytest.raises(ValueError, match="id_order must be one of frequency, appearance, got 'size'"):
        LanguageModelingArguments(id_order="size")
    with pytest.raises(ValueError, match="id_order='appearance' orders words: set word_level, or leave id_order out"):
        LanguageModelingArguments(id_order="appearance")
    with pytest.raises(ValueError, match="with word_level put valid.txt"):
        LanguageModelingArguments(word_level=True, validation_file="valid.txt")
    with pytest.raises(ValueError, match="needs a tokenizer of words"):
        encode_words(corpus["train"], train_tokenizer(corpus["train"], 257))
    plain = DatasetDict({"train": Dataset.from_dict({"text": ["a b"]})})
    tokenizer = train_word_tokenizer(plain)
    assert tokenizer.unk_token is None
    with pytest.raises(ValueError, match=r"word 'c' is not in the vocabulary.*replace rare words by <unk>"):
        encode_words(Dataset.from_dict({"text": ["a c"]}), tokenizer)
    with pytest.raises(ValueError, match="no text in this split"):
        encode_words(Dataset.from_dict({"text": [""]}), tokenizer)
    (folder / "valid.txt").unlink()
    with pytest.raises(ValueError, match="no validation part: add valid.txt"):
        lines_of(folder)


def test_a_corpus_must_be_what_it_is_called(folder, monkeypatch):
    called = folder / "ptb"
    called.mkdir()
    for name in ("train", "valid", "test"):
        (called / f"{name}.txt").write_bytes((folder / f"{name}.txt").read_bytes())
    with pytest.raises(ValueError, match=r"is called Penn Treebank, whose train part has 929,589 tokens.*it has 12"):
        lines_of(called)
    tiny = KnownCorpus("Tiny", {"train": 12, "validation": 8, "test": 3}, vocab_size=9, counted=("train",))
    monkeypatch.setitem(words.KNOWN_CORPORA, "ptb", tiny)
    corpus = lines_of(called)
    with pytest.raises(ValueError, match="Tiny has 9 kinds of words, this corpus 8"):
        train_word_tokenizer(corpus, known=known_corpus(str(called)))


def test_names_of_the_published_corpora():
    assert known_corpus("Salesforce/wikitext", "wikitext-103-v1") is WIKITEXT_103
    assert known_corpus("data/wikitext-103/") is known_corpus("data/WikiText_103") is WIKITEXT_103
    assert known_corpus("../data/ptb/") is known_corpus("data/penn") is PENN_TREEBANK
    assert known_corpus("Salesforce/wikitext", "wikitext-103-raw-v1") is known_corpus("my_text") is None
    assert WIKITEXT_103.num_tokens == {"train": 103_227_021, "validation": 217_646, "test": 245_569}
    assert WIKITEXT_103.vocab_size == 267_735


def test_it_is_a_task_to_learn(folder):
    task = LanguageModeling(
        LanguageModelingArguments(corpus=str(folder), word_level=True, sequence_length=4), {"vocab_size": 99}
    )
    assert task.model_fields == {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert "12 training and 8 validation tokens of 8 kinds" in str(task)
    assert isinstance(task.examples, SequenceBlocks) and len(task.examples) == 2
    task.save(folder / "model", TRANSFORMER.config())
    again = LanguageModelingArguments(
        corpus=str(folder), word_level=True, sequence_length=4, tokenizer=str(folder / "model")
    )
    assert LanguageModeling(again, {}).train.ids.tolist() == task.train.ids.tolist()


@needs_ptb
@pytest.mark.parametrize("id_order", words.ID_ORDERS)
def test_penn_treebank_is_what_papers_count(id_order, tmp_path):
    corpus = lines_of(PTB)
    tokenizer = train_word_tokenizer(corpus, id_order, known_corpus(str(PTB)))
    assert len(tokenizer) == 10_000
    streams = {split: encode_words(corpus[split], tokenizer) for split in corpus}
    assert {split: len(stream.ids) for split, stream in streams.items()} == PENN_TREEBANK.num_tokens
    assert [streams[split].num_words for split in ("train", "validation", "test")] == [887_521, 70_390, 78_669]
    assert streams["train"].ids.unique().numel() == 10_000
    tokenizer.save_pretrained(tmp_path)
    text = (PTB / "valid.txt").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == streams["validation"].ids.tolist()
    first = tokenizer.convert_ids_to_tokens(range(3))
    assert first == (["<eos>", "the", "<unk>"] if id_order == "frequency" else ["aer", "banknote", "berlitz"])


@pytest.mark.filterwarnings("ignore::hf_deq.ConvergenceWarning")
def test_training_and_evaluation_from_the_command_line(folder, tmp_path, caplog):
    """On words, and on the test part with another memory and the literature's streams."""
    model = tmp_path / "model"
    flags = ["--corpus", folder, "--word_level", "true", *TINY, "--max_steps", 2, "--batch_size", 1]
    flags += ["--sequence_length", 4, "--carry_memory", "true", "--memory_length", 4, "--output_dir", model]
    finished = script("train.py", *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "memory carried (at most 4 tokens); solver anderson, scope causal" in finished.stdout
    assert "sample:\n<eos>" in finished.stdout
    assert "no score per word or byte: 1 words are not in the vocabulary" in finished.stdout
    assert "None" not in finished.stdout and "n-grams" not in finished.stdout
    dial = ["--tolerances", 1e-2, "--budgets", 1, "--device", "cpu"]
    more = ["--split", "train", "--memory_length", 9, "--drop_remainder", "--batch_size", 2, "--length", 3]
    finished = script("evaluate.py", model, *dial, *more)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "the train split: 10 of 12 tokens counted (9 words, " in finished.stdout
    how = "2 streams in segments of 3, memory carried (at most 9 tokens), remainder dropped; solver anderson, scope"
    assert how in finished.stdout
    finished = script("evaluate.py", model, *dial, "--split", "test", "--batch_size", 1)
    counted = "3 of 3 tokens counted (2 words, 1 of them read as <unk>, 8 bytes), 1 streams"
    assert f"the test split: {counted}" in finished.stdout
    assert "memory carried (at most 4 tokens)" in finished.stdout
    finished = script("evaluate.py", model, *dial, "--memory_length", -1)
    assert "error: memory_length must not be negative, got -1" in finished.stderr
    for prompt, strange in (("the zebra", ["'zebra'"]), ("the <unk> cat", [])):
        finished = script("generate.py", model, "--prompt", prompt, "--max_new_tokens", 2)
        assert finished.returncode == 0, finished.stderr[-2000:]
        assert re.findall("does not know (.*) and reads <unk> instead", caplog.text) == strange
        caplog.clear()
    as_one_document = runpy.run_path(ROOT / "scripts" / "lm_eval_tasks" / "corpus.py")["as_one_document"]
    assert as_one_document(str(model), "train")["test"]["num_words"] == [9]
    with pytest.raises(ValueError, match="1 words of the validation split are not in the vocabulary"):
        as_one_document(str(model))


def test_unknown_words_leave_a_score_of_the_tokens_alone(folder):
    """An `<unk>` is easy to predict, so nats over it say nothing of the words or bytes that it stands for."""
    corpus = lines_of(folder)
    tokenizer, model = train_word_tokenizer(corpus), TRANSFORMER.model(vocab_size=8)
    for split, is_spelt in (("train", True), ("validation", False)):
        report = evaluate_perplexity(model, encode_words(corpus[split], tokenizer), 0)
        assert math.isfinite(report.perplexity)
        assert [score is not None for score in (report.word_perplexity, report.bits_per_byte)] == [is_spelt] * 2
