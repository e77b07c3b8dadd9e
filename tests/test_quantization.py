"""Eight-bit weights: the equilibrium moves no further than theory says, and Transformers' way of loading them works."""

import copy
import importlib.util
import warnings

import pytest
import torch
from families import every_family, random_ids
from transformers import AutoModelForCausalLM

from hf_deq.evaluation.convergence import captured_map, spectral_radii
from hf_deq.layer_deq import Dial


def rounded(model):
    """A copy whose matrices are rounded to 8 bits, with one scale for each row."""
    other = copy.deepcopy(model)
    for parameter in other.model.layers.parameters():
        if parameter.dim() > 1:
            scale = parameter.data.flatten(1).abs().amax(1).view(-1, *[1] * (parameter.dim() - 1)) / 127
            parameter.data = (parameter.data / scale).round() * scale
    return other


@every_family
@torch.no_grad()
def test_the_equilibrium_of_rounded_weights_is_near(family):
    """Its distance is about that of one application of f, over 1 - spectral radius."""
    model, ids = family.model(), random_ids(4, 8)
    other = rounded(model)
    (f, z0), (g, other_z0) = captured_map(model, ids), captured_map(other, ids)
    solver = model.model.layers[0].forward_solver
    dial = Dial()
    exact, moved = solver(dial)(f, z0), solver(dial)(g, other_z0)
    assert moved.converged.all()
    one_application = (g(exact.value) - f(exact.value)).norm()
    radius = float(spectral_radii(model, ids).max())
    distance = (moved.value - exact.value).norm()
    assert 0 < distance <= 3 * one_application / (1 - radius)  # not normal, so a little more than the radius says
    assert distance < 0.1 * exact.value.norm()


@every_family
def test_transformers_loads_weights_of_eight_bits(family, tmp_path):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao, which Transformers quantises with: pip install torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        model = family.model(solver_tolerance=1e-4).float()
        model.save_pretrained(tmp_path)
        how = TorchAoConfig(Int8WeightOnlyConfig())
        quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how).eval()
        ids = random_ids(2, 8)
        with torch.no_grad():
            expected, found = model(ids), quantised(ids)
    assert found.converged.all()
    assert (found.logits - expected.logits).abs().max() < 0.2
    assert quantised.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (2, 10)
