"""What several test files need: a fresh state, a contractive causal map, the variants of model families."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the Hub, and asking for what is not there takes time
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny and every core has a worker

import pytest
import torch

from hf_deq.fixed_point import FixedPointSolver

pytest.register_assert_rewrite("model_laws", "generation_laws")


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts from the same seed, and every first failure to converge warns."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # training in this process may have taken all cores
    FixedPointSolver._warned.clear()


class CausalMap(torch.nn.Module):
    """f(z)_t = tanh(W z_t + A mean of z_<=t + x_t): causal, contractive, and not symmetric."""

    def __init__(self, features: int = 6, strength: float = 0.5):
        super().__init__()
        own, past = (torch.randn(features, features, dtype=torch.float64) for _ in range(2))
        self.own = torch.nn.Parameter(strength * own / torch.linalg.matrix_norm(own, 2))
        self.past = torch.nn.Parameter(strength * 0.8 * past / torch.linalg.matrix_norm(past, 2))

    def forward(self, z, x):
        count = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)[:, None]
        return torch.tanh(z @ self.own + (z.cumsum(1) / count) @ self.past + x)


@pytest.fixture
def causal_map():
    return CausalMap()


def pytest_generate_tests(metafunc):
    """Laws that take `fields` run once for every variant of their class's model family; laws that take
    `decoding_fields`, once for every variant of f."""
    if hasattr(metafunc.cls, "family"):
        family = metafunc.cls.family
        for name, variants in (("fields", family.variants), ("decoding_fields", family.decoding_variants)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, variants.values(), ids=variants.keys())
