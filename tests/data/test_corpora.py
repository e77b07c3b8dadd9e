"""Corpora, tokenizers, streams and blocks."""

import json
import os

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer

from hf_deq.data import (
    ContiguousBatches,
    Corpus,
    CorpusArguments,
    SequenceBlocks,
    StepBatches,
    corpora,
    encode_documents,
    read_corpus,
    read_corpus_of,
    tokens,
    train_tokenizer,
)
from hf_deq.data.files import read_documents
from hf_deq.data.tokens import END_OF_TEXT


def splits(name, validation_file=None):
    return read_corpus(CorpusArguments(str(name), validation_file=validation_file and str(validation_file))).splits


@pytest.fixture(scope="module")
def built_in():
    return splits("cpython_docs")


def test_built_in_corpus_is_english_documentation(built_in):
    sizes = {split: sum(map(len, built_in[split]["text"])) for split in built_in}
    assert 1.5e6 < sizes["train"] < 4e6 and 0.05 < sizes["validation"] / sizes["train"] < 0.2
    text = "\n".join([*built_in["train"]["text"], *built_in["validation"]["text"]])
    assert "Return the absolute value of the argument" not in text  # builtins are compiled, hence not read
    assert "Raise KeyboardInterrupt" in text or "iterator" in text
    assert not set(built_in["train"]["text"]) & set(built_in["validation"]["text"])


@pytest.mark.slow
def test_built_in_corpus_is_the_same_every_time(built_in):
    assert read_corpus(CorpusArguments()).fingerprint == Corpus("cpython_docs", built_in).fingerprint


def test_fingerprint_sees_every_character(built_in):
    for split in built_in:
        changed = built_in[split].to_dict()["text"]
        changed[3] = changed[3][:-1] + "~"
        other = type(built_in)(built_in | {split: Dataset.from_dict({"text": changed})})
        assert Corpus("other", other).fingerprint != Corpus("built in", built_in).fingerprint, split


def test_tokenizer_round_trips_any_text_and_is_reproducible(built_in, tmp_path):
    tokenizer = train_tokenizer(built_in["train"], 400)
    assert len(tokenizer) == 400 and tokenizer.eos_token == END_OF_TEXT
    text = "Nothing is lost: naïve café, 日本, \t tabs\n\n and emoji 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert train_tokenizer(built_in["train"], 400).get_vocab() == tokenizer.get_vocab()


def test_stream_counts_and_ends_every_document():
    split = Dataset.from_dict({"text": ["one two", "", "drei"]})
    tokenizer = train_tokenizer(split, 257)
    stream = encode_documents(split, tokenizer)
    assert (stream.num_bytes, stream.num_words) == (11, 3)
    assert stream.ids.tolist().count(tokenizer.eos_token_id) == 2 and stream.ids[-1] == tokenizer.eos_token_id
    assert len(stream.ids) == 11 + 2


@pytest.mark.parametrize(
    "name, pattern_of", [("data[1].txt", "data1.txt"), ("what?.txt", "whats.txt"), ("a*b.txt", "acb.txt")]
)
def test_a_file_name_is_taken_as_given(tmp_path, name, pattern_of):
    """To `datasets` it is a pattern, which may find another file."""
    (tmp_path / "x[y]").mkdir()
    for folder in (tmp_path, tmp_path / "x[y]"):
        named, other = folder / name, folder / pattern_of
        named.write_text("\n\n".join(["the text that was meant"] * 20))
        other.write_text("\n\n".join(["some other text"] * 20))
        for corpus in (splits(named), splits(other, validation_file=named)):
            assert set(corpus["validation"]["text"]) == {"the text that was meant"}
        assert set(splits(named)["train"]["text"]) == {"the text that was meant"}
    chained = tmp_path / "a::b.txt"
    chained.write_text("text\n\n" * 20)
    assert set(splits(chained)["train"]["text"]) == {"text"}
    rows = tmp_path / "a[1].csv"
    rows.write_text("text\n" + "row\n" * 20)
    (tmp_path / "a1.csv").write_text("text\n" + "other\n" * 20)
    assert set(splits(rows)["train"]["text"]) == {"row"}
    (tmp_path / "a::b.csv").write_text("text\nrow\n")
    with pytest.raises(ValueError, match="'::' in its name.*rename it"):
        splits(tmp_path / "a::b.csv")


def test_local_files(tmp_path):
    text, validation = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("\n\n".join(f"paragraph {i}\nwith two lines" for i in range(30)))
    validation.write_text("held out\n\nseparately")
    held_out = splits(text)
    assert len(held_out["train"]) == 27 and held_out["validation"]["text"][0].startswith("paragraph 27")
    assert splits(text, validation_file=validation)["validation"]["text"] == ["held out", "separately"]
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"line {i}" for i in range(20)))
    assert len(splits(lines)["train"]) == 18


def test_blocks_predict_every_token_of_the_stream_once():
    blocks = SequenceBlocks(torch.arange(21), 5)
    assert len(blocks) == 4
    for name, first in (("input_ids", 0), ("labels", 1)):
        assert torch.equal(torch.cat([blocks[i][name] for i in range(4)]), torch.arange(first, first + 20))


@pytest.mark.parametrize("pieces", [1, 2])
def test_contiguous_batches_go_on_where_each_row_stopped(pieces):
    batches = list(ContiguousBatches(num_blocks=11, rows=4, pieces=pieces, first=0, last=5))
    steps = [[block for batch in batches[i : i + pieces] for block in batch] for i in range(0, len(batches), pieces)]
    assert steps == [[0, 2, 4, 6], [1, 3, 5, 7], [0, 2, 4, 6], [1, 3, 5, 7], [0, 2, 4, 6]]
    assert all(len(batch) == 4 // pieces for batch in batches)
    resumed = list(ContiguousBatches(11, 4, pieces, first=3, last=5))
    sampler = ContiguousBatches(11, 4, pieces, 0, 5)
    assert [sampler.starts_anew_at(step) for step in range(5)] == [True, False, True, False, True]
    assert resumed == batches[3 * pieces :] and len(ContiguousBatches(11, 4, pieces, 3, 5)) == len(resumed)
    with pytest.raises(ValueError, match="3 sequences, less than one for each of 4 streams"):
        ContiguousBatches(3, 4, pieces, 0, 5)


def test_batches_are_epochs_of_permutations_and_resume_anywhere():
    batches = list(StepBatches(num_blocks=10, batch_size=4, seed=3, first=0, last=5))
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert list(StepBatches(10, 4, 3, first=2, last=5)) == batches[2:]
    assert list(StepBatches(10, 4, 4, first=0, last=5)) != batches


def test_bad_corpora_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing.txt.*no such file"):
        splits(tmp_path / "missing.txt")
    text = tmp_path / "a.txt"
    text.write_text("one line only")
    with pytest.raises(ValueError, match="give validation_file"):
        splits(text)
    with pytest.raises(ValueError, match="does not exist"):
        splits(text, validation_file=tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="less than one sequence of 5"):
        SequenceBlocks(torch.arange(5), 5)
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(Dataset.from_dict({"text": ["a"]}), 256)
    with pytest.raises(ValueError, match="no text in this split"):
        encode_documents(Dataset.from_dict({"text": [""]}), train_tokenizer(Dataset.from_dict({"text": ["a"]}), 257))


def test_hub_corpora_need_the_right_splits_and_column(tmp_path):
    """The same check for any `datasets.load_dataset`, shown on a local folder of CSV files."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("text\nhello world\n")
    assert splits(f"{tmp_path}/")["train"]["text"] == ["hello world"]
    (tmp_path / "train.csv").write_text("sentence\nhello\n")
    (tmp_path / "validation.csv").write_text("sentence\nhello\n")
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['sentence'\]"):
        splits(f"{tmp_path}/")
    (tmp_path / "validation.csv").unlink()
    with pytest.raises(ValueError, match="no split 'validation'"):
        splits(f"{tmp_path}/")


def test_a_corpus_to_evaluate_on_is_that_of_the_training_or_a_warning_says_so(tmp_path, caplog, monkeypatch):
    """What is given wins over the recipe, and a corpus that is given has nothing of the recipe's but how it is read."""
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("\n\n".join(f"paragraph {i}" for i in range(30)))
    other.write_text("\n\n".join(f"another {i}" for i in range(30)))
    recipe = {"corpus": str(one), "corpus_fingerprint": read_corpus(CorpusArguments(str(one))).fingerprint}
    assert read_corpus_of(recipe, {}).fingerprint == recipe["corpus_fingerprint"] and not caplog.text
    assert read_corpus_of(recipe, {"corpus": str(other), "word_level": None}).name == str(other) and not caplog.text
    assert read_corpus_of(recipe, {"validation_file": str(other)}).splits["validation"][0]["text"] == "another 0"
    assert "is not the one the model was trained on" in caplog.text and "Python" not in caplog.text
    monkeypatch.setitem(corpora.BUILT_IN_CORPORA, "cpython_docs", lambda: splits(one))  # the true one takes seconds
    assert read_corpus_of({}, {}).name == "cpython_docs" and "No recipe says" in caplog.text
    with pytest.raises(ValueError, match="no split 'test'; it has \\['train', 'validation'\\]"):
        read_corpus_of(recipe, {}).split("test")


def test_blank_lines_separate_documents_however_few(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\ntwo lines\r\n \t\r\n\r\ntwo")
    assert splits(file)["train"]["text"] == ["one\ntwo lines"] and splits(file)["validation"]["text"] == ["two"]


@pytest.mark.parametrize("before, after", [("", ""), ("\n", ""), ("", "\n\n"), (" \n\n", "\n \n")])
def test_blank_lines_around_a_text_separate_nothing(tmp_path, before, after):
    (tmp_path / "a.txt").write_text(f"{before}one\ntwo\nthree\n{after}")
    assert read_documents(tmp_path / "a.txt")["text"] == ["one", "two", "three"]


def test_a_byte_order_mark_is_no_text_and_a_changed_file_is_read_anew(tmp_path):
    file = tmp_path / "a.txt"
    for word in ("first", "other"):  # equal size and time
        file.write_text(f"\ufeff{word}\n\nsecond")
        os.utime(file, (1, 1))
        assert splits(file)["train"]["text"] == [word]
    rows = tmp_path / "a.jsonl"
    for word in ("first", "other"):
        rows.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(9)))
        os.utime(rows, (1, 1))
        assert splits(rows)["train"][0]["text"] == f"{word} 0"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_files_of_rows_have_a_column_of_texts(tmp_path, suffix):
    file, rows = (
        tmp_path / f"a{suffix}",
        Dataset.from_dict({"story": [f"story {i}" for i in range(20)], "n": range(20)}),
    )
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](file)
    corpus = read_corpus(CorpusArguments(str(file), text_column="story"))
    assert corpus.splits["train"][0]["text"] == "story 0" and len(corpus.splits["validation"]) == 2
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['story', 'n'\]: set text_column"):
        splits(file)
    with pytest.raises(ValueError, match="has no text in its column 'n'"):
        read_corpus(CorpusArguments(str(file), text_column="n"))
    file.write_bytes(b"\x00\x01{")
    with pytest.raises(ValueError, match="cannot be read as|has no column 'text'"):
        splits(file)


@pytest.mark.parametrize(
    "content, message",
    [
        ("gr\u00fcn".encode("utf-16"), r"is not text in UTF-8 \(it seems to be UTF-16\): convert it.*iconv -f UTF-16"),
        ("gr\u00fcn und blau".encode("latin-1"), r"byte 0xfc at 2 is not\): convert it.*iconv -f LATIN1"),
        (b"fine, but for \xff one byte", "byte 0xff at 14 is not"),
        (b"", "has no text in it"),
        (b"\n \n\n\t\n", "has no text in it"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, content, message):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        splits(file)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(validation_file="short.txt"), "validation_file='short.txt' goes with a local file as corpus"),
        (dict(corpus_config="raw"), "corpus_config='raw' does not go with a built-in corpus"),
        (dict(corpus=__file__, corpus_config="raw"), "corpus_config='raw' is for a dataset on the Hub"),
        (dict(text_column="story"), "text_column='story' does not go with a built-in corpus"),
    ],
)
def test_arguments_without_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_corpus(CorpusArguments(**arguments))
    with pytest.raises(ValueError, match=message):
        read_corpus_of({}, arguments)


@pytest.mark.parametrize("argument", ["corpus_config", "text_column"])
def test_arguments_without_effect_on_a_folder_of_words_are_refused(tmp_path, argument):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("one two\n")
    with pytest.raises(ValueError, match=f"{argument}='raw' has no effect on a folder of text files"):
        read_corpus(CorpusArguments(str(tmp_path), word_level=True, **{argument: "raw"}))


def test_a_special_token_in_a_text_is_text():
    split = Dataset.from_dict({"text": [f"one {END_OF_TEXT} two"]})
    tokenizer = train_tokenizer(split, 300)
    ids = encode_documents(split, tokenizer).ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == f"one {END_OF_TEXT} two"


def test_text_without_spaces_trains_a_tokenizer_in_linear_time(monkeypatch):
    """No run that is longer than the limit reaches the trainer, and ordinary text reaches it as it is."""
    seen = []
    monkeypatch.setattr(Tokenizer, "train_from_iterator", lambda self, texts, trainer: seen.extend(texts))
    train_tokenizer(Dataset.from_dict({"text": ["ACGT" * 10_000, "ordinary words  with\nspaces"]}), 257)
    assert "".join(seen[:-1]) == "ACGT" * 10_000 and max(map(len, seen)) == tokens.LONGEST_WORD
    assert seen[-1] == "ordinary words  with\nspaces"
