"""lm-eval runs these models offline, turns their dial, and measures what we measure."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, TINY, TINY_TRELLISNET, script
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_deq.data import CorpusArguments, read_corpus
from hf_deq.evaluation import Protocol, evaluate_perplexity, load_model
from hf_deq.hub import export_hub_folder

pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install -e ".[harness]"')
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = ROOT / "scripts" / "lm_eval_tasks"
LENGTH = 16
FLAGS = {
    "transformer": TINY,
    "trellisnet": ["--model_type", "deq_trellisnet", *TINY_TRELLISNET],
    "words": [*TINY, "--word_level", "true", "--cutoffs", "20", "60"],
}
DIALS = [{}, {"solver_tolerance": 0.3}, {"solver_tolerance": 0, "solver_max_evaluations": 1}]
CONTEXTS = ["sentence number 3 is", "sentence", "number 12 is about the number 84, and nothing else", "and"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A text of documents, and a folder of lines: the places of two corpora."""
    folder = tmp_path_factory.mktemp("corpora")
    lines = [f"sentence number {n} is about the number {7 * n % 100}, with an é" for n in range(200)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    for split in ("train", "valid"):
        (folder / f"{split}.txt").write_text("\n".join([*lines[:50], "", " = <unk> = "]) + "\n")
    return {"text": str(folder / "text.txt"), "words": str(folder)}


@pytest.fixture(scope="module", params=FLAGS)
def trained(request, corpora, tmp_path_factory):
    """A model's folder, and the validation stream of its corpus."""
    folder = tmp_path_factory.mktemp(request.param)
    words = request.param == "words"
    corpus = corpora["words" if words else "text"]
    finished = script("train.py", "--corpus", corpus, "--output_dir", folder, *FLAGS[request.param])
    assert finished.returncode == 0, finished.stderr[-2000:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return str(folder), read_corpus(CorpusArguments(corpus, word_level=words)).encode("validation", tokenizer)


def ours(folder: str, stream, **dial) -> tuple[float, float]:
    """Bits per byte and word perplexity."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoTokenizer.from_pretrained(folder).eos_token_id
    report = evaluate_perplexity(model, stream, start, Protocol(LENGTH, LENGTH), **dial)
    return report.bits_per_byte, report.word_perplexity


def theirs(folder: str, metadata: dict | None = None, **arguments) -> tuple[float, float]:
    """The same, of the task."""
    arguments = {"pretrained": folder, "max_length": LENGTH} | arguments
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=arguments | (metadata or {}))
    lm = HFLM(device="cpu", batch_size=4, **arguments)
    results = evaluate(lm, tasks.load(["deq_corpus"]), bootstrap_iters=0)["results"]["deq_corpus"]
    return results["bits_per_byte,none"], results["word_perplexity,none"]


def harness(folder: str, batch_size: int = 1, **arguments) -> HFLM:
    return HFLM(pretrained=folder, device="cpu", batch_size=batch_size, **arguments)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def test_it_measures_what_we_measure_at_every_setting_of_the_dial(trained):
    folder, stream = trained
    results = [theirs(folder, **dial) for dial in DIALS]
    for dial, result in zip(DIALS, results, strict=True):
        assert result == pytest.approx(ours(folder, stream, **dial), rel=1e-6), dial
    assert len({round(bits_per_byte, 4) for bits_per_byte, _ in results}) == len(DIALS)


def test_the_corpus_and_the_split_can_be_others(trained, corpora):
    folder, _ = trained
    words = "words" in Path(folder).name
    metadata = {"corpus": corpora["words"] + ("" if words else "/train.txt"), "split": "train"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = read_corpus(CorpusArguments(metadata["corpus"], word_level=words)).encode("train", tokenizer)
    assert theirs(folder, metadata) == pytest.approx(ours(folder, stream), rel=1e-6)
    with pytest.raises(ValueError, match="no split 'test'"):
        theirs(folder, {"split": "test"})


def test_padding_changes_no_likelihood(trained):
    """lm-eval pads on the right and gives no mask."""
    pairs = requests("loglikelihood", [(context, " about the number 9") for context in CONTEXTS])
    one, four = (harness(trained[0], size).loglikelihood(pairs, disable_tqdm=True) for size in (1, 4))
    assert [nats for nats, _ in four] == pytest.approx([nats for nats, _ in one], rel=1e-6)


def test_it_generates_what_generate_does(trained):
    folder, _ = trained
    asked = requests("generate_until", [(context, {"until": ["sentence"], "max_gen_toks": 12}) for context in CONTEXTS])
    lm = harness(folder, batch_size=4)
    expected = []
    for context in CONTEXTS:
        inputs = lm.tokenizer(context, return_tensors="pt")
        ids = lm.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        continuation = lm.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(continuation.split("sentence")[0])
    assert lm.generate_until(asked, disable_tqdm=True) == expected


def test_a_misspelt_dial_is_refused(trained):
    with pytest.raises(TypeError, match="solver_tolerence"):
        harness(trained[0], solver_tolerence=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["transformer", "trellisnet"], indirect=True)
def test_a_folder_with_its_code_needs_no_network(trained, tmp_path):
    """Given by name, the task is loaded after the model, and this package with it: the code is that of the folder."""
    folder, stream = trained
    exported, dial = tmp_path / "exported", {"solver_tolerance": 0.3, "solver_max_evaluations": 5}
    export_hub_folder(load_model(folder), exported, AutoTokenizer.from_pretrained(folder))
    shutil.copyfile(Path(folder) / "recipe.yaml", exported / "recipe.yaml")
    arguments = {"pretrained": exported, "trust_remote_code": True, "max_length": LENGTH} | dial
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--include_path", TASKS, "--tasks", "deq_corpus", "--output_path", tmp_path / "results"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    finished = subprocess.run(list(map(str, command)), env=os.environ | offline, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert list((tmp_path / "modules").rglob("modeling_deq_*.py"))
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["deq_corpus"]
    assert results["bits_per_byte,none"] == pytest.approx(ours(folder, stream, **dial)[0], rel=1e-6)
