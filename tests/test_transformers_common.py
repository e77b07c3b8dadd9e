"""Transformers' own tests of a model hold for ours: ModelTesterMixin, ConfigTester and TrainingTesterMixin.

They are no part of the installed library, so the source distribution of its version is fetched from the package index.
What is tested, and what is excluded for which reason, is in `transformers_common/common_tests.py`.
"""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FETCHED = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")
# What these import of the library's tests and no source distribution has.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "utils/__init__.py": "",
    # Fields that a configuration must keep; none of these is a default.
    "utils/test_configuration_utils.py": """config_common_kwargs = dict(
        return_dict=False, output_hidden_states=True, dtype="float16", chunk_size_feed_forward=5,
        architectures=["Model"], id2label={0: "label"}, label2id={"label": 0}, problem_type="regression",
        tie_word_embeddings=False, bos_token_id=6, pad_token_id=7, eos_token_id=8,
    )""",
}


@pytest.fixture(scope="module")
def library_tests(tmp_path_factory) -> Path:
    """A folder with the library's tests as the package `library_tests`."""
    pytest.importorskip("parameterized", reason="Transformers' tests need it: pip install parameterized")
    folder = tmp_path_factory.mktemp("transformers")
    for name, text in STUBS.items():
        path = folder / "library_tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with tarfile.open(fetch(f"transformers=={version('transformers')}", folder)) as archive:
        for member in archive.getmembers():
            parents, name = member.name.rpartition("/")[::2]
            if parents.endswith("/tests") and name in FETCHED:
                (folder / "library_tests" / name).write_bytes(archive.extractfile(member).read())
    (folder / "pytest.ini").write_text("[pytest]")
    return folder


def fetch(requirement: str, folder: Path) -> Path:
    """The source distribution, or a skip if there is none to be had."""
    name = requirement.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-binary", name, "--dest", folder, requirement]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if finished.returncode:
        pytest.skip(f"no source distribution of {requirement}: {finished.stderr.strip().splitlines()[-1]}")
    return next(folder.glob("*.tar.gz"))


@pytest.mark.parametrize(
    "tests, at_least",
    [("DEQTransformerTest", 100), ("DEQTrellisNetTest", 70), ("DEQAttractorTest", 100)],
    ids=["transformer", "trellisnet", "attractor"],
)
def test_the_library_s_own_tests_hold(library_tests, tests, at_least):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(library_tests), str(HERE)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    options = ["-q", "--noconftest", "--disable-warnings", "--tb=short", "-rsxfE", "-c", library_tests / "pytest.ini"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"{HERE / 'transformers_common/common_tests.py'}::{tests}"],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=library_tests,
        env=environment,
    )
    print(finished.stdout, finished.stderr)
    failed = re.findall(r"^(?:FAILED|SUBFAILED|ERROR).*", finished.stdout, re.MULTILINE)
    assert finished.returncode == 0, "\n".join(failed) or finished.stdout[-2000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert int(passed[1]) >= at_least, "too many of the library's tests were skipped"
