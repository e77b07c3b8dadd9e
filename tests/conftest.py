"""What several test files need: a contractive causal map and tiny models."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from hf_deq import DEQTransformerConfig, DEQTransformerForCausalLM
from hf_deq.fixed_point import FixedPointSolver


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts from the same seed, and every first failure to converge warns."""
    torch.manual_seed(0)
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


def tiny_config(**fields) -> DEQTransformerConfig:
    """Small enough for a test, solved to round-off unless told otherwise."""
    defaults = dict(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        solver_tolerance=1e-10,
        solver_max_evaluations=200,
        backward_tolerance=1e-10,
        backward_max_evaluations=200,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return DEQTransformerConfig(**(defaults | fields))


def tiny_model(**fields) -> DEQTransformerForCausalLM:
    """A float64 model in evaluation mode, made the same way every time."""
    torch.manual_seed(0)
    return DEQTransformerForCausalLM(tiny_config(**fields)).double().eval()


def random_ids(batch: int, length: int, vocab_size: int = 61) -> torch.Tensor:
    """Ids without the special ones."""
    return torch.randint(3, vocab_size, (batch, length))
