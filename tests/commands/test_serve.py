"""The server, asked by the client of OpenAI over the loopback interface."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_line import ROOT, script
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from hf_deq.hub import load_model

PROMPTS = ("The iterator ", "A dictionary is a ", "Return the number of ")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
needs_the_server = pytest.mark.skipif(
    not is_serve_available(), reason='the packages of the server are not installed: pip install -e ".[serve]"'
)


class Server:
    """A server in a process of its own, and what it should say."""

    def __init__(self, folder: Path, flags: list[str], log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.log = str(folder), log
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), load_model(folder)
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        command = [sys.executable, ROOT / "scripts" / "serve.py", folder, *where, *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)

    def wait_until_it_answers(self, seconds: int = 120) -> None:
        for _ in range(seconds):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health")
                return
            except urllib.error.URLError:
                time.sleep(1)
        raise AssertionError(f"no answer after {seconds} s: {self.log.read_text()[-3000:]}")

    def client(self):
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def complete(self, prompt: str, tokens: int, **how) -> str:
        """The answer to a prompt, from a new client."""
        arguments = dict(model=self.name, prompt=prompt, max_tokens=tokens, temperature=0)
        answer = self.client().completions.create(**arguments | how)
        return "".join(part.choices[0].text for part in (answer if how.get("stream") else [answer]))

    def expected(self, prompt: str, tokens: int) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        text = self.model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
        return self.tokenizer.decode(text, skip_special_tokens=True)


@pytest.fixture(scope="module", params=["one-by-one", "continuous"])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    source = ROOT / "model_cards" / "deq-transformer-tiny"
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    pages = ["--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "128"]
    server = Server(folder, pages if request.param == "continuous" else [], folder / "log")
    try:
        server.wait_until_it_answers()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)


@needs_the_server
@pytest.mark.slow
def test_answers_are_those_of_generate(server):
    for prompt in PROMPTS:
        expected = server.expected(prompt, 20)
        assert server.complete(prompt, 20) == expected != ""
        assert server.complete(prompt, 20, stream=True) == expected


@needs_the_server
@pytest.mark.slow
def test_clients_at_once_do_not_disturb_each_other(server):
    asked = [(prompt, tokens) for prompt, tokens in zip(PROMPTS, (60, 30, 45), strict=True)]
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = [clients.submit(server.complete, *one, stream=True) for one in asked]
        assert [answer.result() for answer in answers] == [server.expected(*one) for one in asked]


@needs_the_server
@pytest.mark.slow
def test_chat_answers_what_the_template_makes_of_the_messages(server):
    messages = [{"role": "user", "content": PROMPTS[0]}]
    answer = server.client().chat.completions.create(model=server.name, messages=messages, max_tokens=9, temperature=0)
    assert answer.choices[0].message.content == server.expected(PROMPTS[0], 9)


@needs_the_server
@pytest.mark.slow
def test_bad_requests_get_an_answer_and_harm_no_other(server):
    from openai import BadRequestError, InternalServerError

    with pytest.raises(BadRequestError) as refused:
        server.complete("The", 3, model="another/model")
    assert f"Server is pinned to '{server.name}'; requested 'another/model'." in refused.value.response.text
    with pytest.raises(InternalServerError):
        server.complete("", 3)
    for _ in range(20):  # the log follows the answer
        if "is empty: give at least one token" in server.log.read_text():
            break
        time.sleep(0.5)
    else:
        raise AssertionError(server.log.read_text()[-3000:])
    assert server.complete(PROMPTS[1], 5) == server.expected(PROMPTS[1], 5)


def test_what_stops_the_server_is_said_in_a_line(tmp_path):
    finished = script("serve.py", tmp_path, "--device", "cpu")
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    reason = str(tmp_path) if is_serve_available() else 'pip install "hf_deq[serve]"'
    assert finished.stderr.startswith("error: ") and reason in finished.stderr
