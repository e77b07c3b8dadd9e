"""Checkpoints of the authors' Attractor models: the same numbers here, in float64."""

import json
import logging
from pathlib import Path

import pytest
import torch
from families import application_of_f
from safetensors.torch import load_file

from hf_deq import AndersonSolver, PicardSolver
from hf_deq.hub import convert_checkpoint
from hf_deq.hub.conversion import FAMILIES
from hf_deq.iterations import AndersonIteration

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
SOLVED = dict(solver_tolerance=1e-14, solver_max_evaluations=400)
EXACT = dict(backward_solver="anderson", backward_tolerance=1e-14, backward_max_evaluations=400)
pytestmark = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference implementation's tensors are not distributed with the package"
)


class Reference:
    """A variant of the authors' code: its tensors, and the model that they convert to."""

    def __init__(self, variant: str):
        self.arguments = json.loads((REFERENCE / variant / "config.json").read_text())["constructor"]
        self.state_dict = load_file(REFERENCE / variant / "model.safetensors")
        self.tensors = load_file(REFERENCE / variant / "io.safetensors")

    def convert(self, changes=None, arguments=None, **fields):
        return convert_checkpoint(
            self.state_dict | (changes or {}), self.arguments | (arguments or {}), "attractor", **(SOLVED | fields)
        )

    def gradient(self, name: str, config, kind: str = "grad") -> torch.Tensor:
        """The gradient of one of our parameters; of a scaled tensor, by the chain rule."""
        source = FAMILIES["attractor"].sources(config)[name]
        theirs = source.read({key: self.tensors[f"{kind}.{key}"] for key in source.keys})
        return theirs / source.scale**2


@pytest.fixture(params=["attractor_anderson", "attractor_two_blocks"])
def reference(request) -> Reference:
    return Reference(request.param)


def loss_of(model, tensors) -> torch.Tensor:
    logits = model(tensors["data"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensors["target"].flatten())


@torch.no_grad()
def test_prelude_and_one_application(reference):
    model, tensors, outputs = reference.convert(), reference.tensors, []
    for block in model.model.layers[0].prelude:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    image, _ = application_of_f(model, tensors["data"], tensors["z_rand"])
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, tensors[f"prelude.{i}.out"], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[-1], tensors["context"], rtol=0, atol=1e-12)
    torch.testing.assert_close(image, tensors["f_z_rand"], rtol=0, atol=1e-12)


@torch.no_grad()
def test_fixed_point_logits_and_likelihood(reference):
    model, tensors, found = reference.convert(), reference.tensors, []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: found.append(output.solution.value))
    output = model(tensors["data"])
    close = dict(rtol=0, atol=1e-8)
    torch.testing.assert_close(found[0], tensors["z_star"], **close)
    torch.testing.assert_close(output.logits, tensors["logits"], **close)
    nats = -output.logits.log_softmax(-1).gather(-1, tensors["target"][..., None])[..., 0]
    torch.testing.assert_close(nats, tensors["nll"], **close)
    labels = tensors["target"]
    loss = model(tensors["data"], labels=labels, shift_labels=labels).loss
    torch.testing.assert_close(loss.double()[None], tensors["loss"], rtol=0, atol=1e-6)  # theirs is in float64


@pytest.mark.parametrize("kind, fields, largest", [("grad", EXACT, 1e-6), ("onestep_grad", {}, 1e-8)])
def test_gradients(reference, kind, fields, largest):
    model = reference.convert(**fields)
    loss_of(model, reference.tensors).backward()
    for name, parameter in model.named_parameters():
        exact = reference.gradient(name, model.config, kind)
        assert (parameter.grad - exact).norm() <= largest * exact.norm(), name


class AuthorsIteration(AndersonIteration):
    """With the authors' regularization, whose size does not follow the residuals, and their undamped first step."""

    def propose(self, own):
        return self.images.slots[0].clone() if self.remembered == 1 else super().propose(own)

    def regularized(self, gram):
        return gram + 1e-4 * self.identity


class AuthorsAnderson(AndersonSolver):
    def _iteration(self, z0, positions):
        return AuthorsIteration(z0, positions, self.history, self.damping)


@pytest.mark.parametrize("evaluations", [8, 16])
def test_iterates_of_the_reference_solvers(reference, evaluations):
    model, tensors, images = reference.convert(), reference.tensors, []
    config, layer = model.config, model.model.layers[0]
    theirs = dict(scope="sequence", history=config.solver_history, damping=config.solver_damping)

    def solve(f, z0, dial, rows):
        for solver in (AuthorsAnderson(0.0, evaluations, **theirs), PicardSolver(0.0, evaluations)):
            solver(lambda z: images.append(f(z)) or images[-1], z0)
        return type(layer).solve(layer, f, z0, dial, rows)

    layer.solve = solve
    model(tensors["data"])
    close = dict(rtol=0, atol=1e-6)  # they return the last image of f
    torch.testing.assert_close(images[evaluations - 1], tensors[f"solver.anderson.{evaluations}.result_f64"], **close)
    torch.testing.assert_close(images[-1], tensors[f"solver.plain.{evaluations}.result"], **close)


def test_vocabulary_padding_is_kept_and_said(reference, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, "transformers"):
        model = reference.convert()
    used, padded = reference.arguments["vocab_size"], reference.arguments["padded_vocab_size"]
    assert model.config.vocab_size == padded and f"{used} ids and is padded to {padded}" in caplog.text
    computed = reference.convert(arguments={"padded_vocab_size": None})
    assert computed.config.vocab_size == padded


def test_names_with_prefixes_and_without_second_copies(reference):
    ids = reference.tensors["data"]
    expected = reference.convert()(ids).logits
    state_dict = {f"module._orig_mod.{name}": tensor for name, tensor in reference.state_dict.items()}
    if reference.arguments["tie_embeddings"]:  # safetensors keeps one of two names for one tensor
        del state_dict["module._orig_mod.lm_head.weight"]
    del state_dict["module._orig_mod.freqs_cis"]
    model = convert_checkpoint(state_dict, reference.arguments, "attractor", **SOLVED)
    assert torch.equal(model(ids).logits, expected)


def test_rotary_settings_may_be_absent(reference):
    ids = reference.tensors["data"]  # the default is what both fixtures have
    assert torch.equal(
        reference.convert(arguments={"rope_settings": None})(ids).logits, reference.convert()(ids).logits
    )


def test_other_names_do_not_matter(reference):
    ids = reference.tensors["data"]
    named = reference.convert(arguments={"name": "attractor-small", "hf_config": {"name": "attractor"}})
    assert torch.equal(named(ids).logits, reference.convert()(ids).logits)


@pytest.mark.parametrize("solver, damping", [("anderson", 0.9), ("fpi", 1.0), ("picard", 1.0)])
def test_only_anderson_is_damped(reference, solver, damping):
    config = reference.convert(arguments={"solver": solver, "anderson_beta": 0.9}).config
    assert config.solver_damping == damping


def test_variants_that_no_fixture_shows(reference):
    """Every switch of the equations makes another model, and each loads, solves and saves."""
    variants = [
        {"rope_settings": {"rope_base": 10_000, "rope_condense_ratio": 2}},
        {"qk_norm": not reference.arguments["qk_norm"]},
        {"nonlin_name": "SiLU"},
        {"norm_eps": 1e-2},
        {"gamma_max": 0.95},
    ]
    ids = reference.tensors["data"]
    logits = reference.convert()(ids).logits
    without_table = {name: tensor for name, tensor in reference.state_dict.items() if name != "freqs_cis"}
    for variant in variants:
        other = convert_checkpoint(without_table, reference.arguments | variant, "attractor", **SOLVED)
        assert (other(ids).logits - logits).abs().max() > 1e-6, variant


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_backbone_layers": 5}, "missing: transformer.prelude.4.attn.c_q.weight"),
        ({"n_fp_blocks": 5}, "missing: transformer.core_block.4.norm_1.weight"),
        ({"gamma_max": 0.0}, "gamma_max=0.0 must be positive"),
        ({"gamma_max": -1}, "gamma_max=-1 must be positive"),
        ({"gamma_max": float("nan")}, "gamma_max=nan must be positive"),
        ({"layer_scale_init": None}, "left over: transformer.core_block.0.raw_gamma_attn"),
        ({"rope_settings": {"rope_base": 10_000}}, "freqs_cis .* is not the table .*base 10000"),
        ({"rope_settings": {"use_rope": False}}, "use_rope=False"),
        ({"rope_settings": {"rope_theta": 10_000}}, r"rope_settings has \['rope_theta'\]; known are \['rope_base', "),
        ({"name": "Gemma-attractor"}, "the name 'Gemma-attractor' has Gemma in it, .* multiply by 1 [+] weight"),
        ({"name": "", "hf_config": {"name": "Gemma-2b"}}, "the name 'Gemma-2b' has Gemma in it"),
        ({"name": "", "hf_config": "Gemma-2b"}, "hf_config='Gemma-2b' must be a dictionary"),
        ({"rope_settings": "default"}, "rope_settings='default' must be a dictionary"),
        ({"nonlin_name": "Softplus"}, "nonlin_name='Softplus' cannot be converted"),
        ({"block_class_name": "SandwichBlock"}, "only 'TransformerPreNormBlock' can be converted"),
        ({"mlp_class_name": "GatedMLP"}, r"mlp.fc.weight is \(64, 32\), but should be \(128, 32\)"),
        ({"init_strategy": "takase_scaled"}, "init_strategy='takase_scaled' cannot be converted; known are"),
        ({"backward_type": "jfb"}, "backward_type='jfb' cannot be converted; known are"),
        ({"depth": 3}, r"constructor_arguments has \['depth'\]"),
        ({"num_attention_heads": 3}, "must divide hidden_size=32"),
    ],
)
def test_arguments_that_contradict_the_tensors_are_refused(reference, arguments, message):
    with pytest.raises(ValueError, match=message):
        reference.convert(arguments=arguments)


@pytest.mark.parametrize("field", [{"embedding_multiplier": 2.0}, {"qk_norm": None}, {"layer_scale_max": 1.0}])
def test_fields_that_make_another_model_are_refused(reference, field):
    with pytest.raises(ValueError, match=f"config_fields: {next(iter(field))} follows from the checkpoint"):
        reference.convert(**field)


def test_a_state_dict_of_another_family_is_refused(reference):
    with pytest.raises(ValueError, match="constructor_arguments lacks"):
        convert_checkpoint(reference.state_dict, reference.arguments, "deq_transformer")
    theirs = load_file(REFERENCE / "trellisnet_lstm" / "model.safetensors")
    with pytest.raises(ValueError, match="missing: transformer.wte.weight(.|\n)*left over: encoder.weight"):
        convert_checkpoint(theirs, reference.arguments, "attractor")
