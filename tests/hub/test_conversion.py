"""Checkpoints of the authors' code: the same numbers here, in float64, for every variant of the reference."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import application_of_f
from safetensors.torch import load_file

from hf_deq import AndersonSolver, BroydenSolver
from hf_deq.hub.conversion import FAMILIES, convert_checkpoint

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
VARIANTS = {
    "transformer_postln": "deq_transformer",
    "transformer_preln_wnorm": "deq_transformer",
    "transformer_adaptive": "deq_transformer",
    "trellisnet_lstm": "deq_trellisnet",
    "trellisnet_splitcross": "deq_trellisnet",
    "torchdeq_deqlm": "torchdeq_lm",
}
SOLVED = dict(
    solver_tolerance=1e-13, solver_max_evaluations=300, backward_tolerance=1e-13, backward_max_evaluations=300
)
pytestmark = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference implementation's tensors are not distributed with the package"
)


@dataclass
class Reference:
    """A variant of the authors' code: its tensors, and the model that they convert to."""

    variant: str

    def __post_init__(self):
        said = json.loads((REFERENCE / self.variant / "config.json").read_text())
        self.family = VARIANTS[self.variant]
        self.arguments = said["constructor"]
        if said.get("criterion"):
            self.arguments["splits"] = said["criterion"]["splits"]
        self.state_dict = load_file(REFERENCE / self.variant / "model.safetensors")
        self.tensors = load_file(REFERENCE / self.variant / "io.safetensors")
        self.separate_gradients = dict(said.get("same_storage_distinct_parameters", []))

    def convert(self, **changes):
        # The weights of this torchdeq model were made to have a fixed point, which theirs have not.
        how = {"gradient": "implicit", "solver": "anderson"} if self.family == "torchdeq_lm" else {}
        return convert_checkpoint(self.state_dict | changes, self.arguments, self.family, **SOLVED, **how)

    def segment(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of a segment, batch first where ours are, by their original names."""
        tensors = {key.removeprefix(f"{name}."): value for key, value in self.tensors.items() if key.startswith(name)}
        time_first = ("data", "target", "logprobs", "nll", "mem_z_in", "mem_u_in", "mem_z_out", "mem_u_out", "mem_in")
        features_first = ("z_rand", "f_z_rand", "z_star", "z0_in")
        for key in tensors if self.family != "torchdeq_lm" else ():
            if key in time_first:
                tensors[key] = tensors[key].transpose(0, 1).contiguous()
            if key in features_first:
                tensors[key] = tensors[key].transpose(1, 2)
        return tensors

    def memory(self, segment: dict, config, suffix="_in") -> tuple[torch.Tensor, ...] | None:
        """The memory that the segment is given (or gives), as ours."""
        if "z0_in" in segment:  # the last state in the place of all before it, and no inputs
            states = segment["z0_in"].expand(-1, (config.kernel_size - 1) * config.dilation, -1)
            return states, states.new_zeros(len(states), config.kernel_size - 1, config.embedding_size)
        if f"mem_z{suffix}" not in segment:
            return None
        return segment[f"mem_z{suffix}"], segment[f"mem_u{suffix}"][..., self.feature_order(config)]

    def feature_order(self, config) -> torch.Tensor:
        """Injections there are ordered by head in torchdeq, by kind here."""
        sources = FAMILIES[self.family].sources(config)
        rows = sources["model.layers.0.injection.bias"].rows
        return torch.arange(3 * config.num_attention_heads * config.head_dim) if rows is None else rows

    def gradient(self, segment: dict, name: str, config) -> torch.Tensor:
        """What is said of one of our parameters; the two uses of a tied projection are counted apart there."""
        source = FAMILIES[self.family].sources(config)[name]
        (key,) = source.keys
        gradient = segment[f"grad.{key}"]
        if key in self.separate_gradients:
            gradient = gradient + segment[f"grad.{self.separate_gradients[key]}"]
        return source.read({key: gradient})


variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
@pytest.mark.parametrize("name", ["seg1", "seg2"])
def test_numbers_of_the_reference(variant, name):
    reference = Reference(variant)
    model, segment = reference.convert(), reference.segment(name)
    memory = reference.memory(segment, model.config)
    assert (memory is None) == (name == "seg1" and reference.family != "deq_trellisnet")
    image, output = application_of_f(model, segment["data"], segment["z_rand"], memory=memory)
    close = dict(rtol=0, atol=1e-8)
    torch.testing.assert_close(image, segment["f_z_rand"], rtol=0, atol=1e-12)
    torch.testing.assert_close(output.memory[0][:, -1], segment["z_star"][:, -1], **close)
    log_probabilities = output.logits.log_softmax(-1)
    torch.testing.assert_close(log_probabilities, segment["logprobs"], **close)
    nats = -log_probabilities.gather(-1, segment["target"][..., None])[..., 0]
    torch.testing.assert_close(nats, segment["nll"], **close)
    nats.mean().backward()
    for ours, parameter in model.named_parameters():
        exact = reference.gradient(segment, ours, model.config)
        assert (parameter.grad - exact).norm() <= 1e-6 * exact.norm(), ours


@variants
@pytest.mark.parametrize("name", ["seg1", "seg2"])
def test_fixed_point_and_new_memory(variant, name):
    reference = Reference(variant)
    model, segment = reference.convert(), reference.segment(name)
    memory = reference.memory(segment, model.config)
    layer, found = model.model.layers[0], []
    layer.register_forward_hook(lambda module, inputs, output: found.append(output))
    model(segment["data"], memory=memory)
    torch.testing.assert_close(found[0].solution.value, segment["z_star"], rtol=0, atol=1e-8)
    if reference.family == "deq_trellisnet":
        torch.testing.assert_close(found[0].memory[0][:, -1], segment["mem_out"][0], rtol=0, atol=1e-8)
        return
    for ours, theirs in zip(found[0].memory, reference.memory(segment, model.config, "_out"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@variants
def test_losses_and_generation_work_as_for_any_model(variant, tmp_path):
    reference = Reference(variant)
    model, segment = reference.convert(), reference.segment("seg1")
    nats = segment["nll"].mean()
    loss = model(segment["data"], labels=segment["target"], shift_labels=segment["target"]).loss
    torch.testing.assert_close(loss.double(), nats, rtol=0, atol=1e-6)  # Transformers' loss is in single precision
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    logits = model(segment["data"]).logits
    torch.testing.assert_close(loaded(segment["data"]).logits, logits, rtol=0, atol=1e-10)
    greedy = model.generate(segment["data"], max_new_tokens=2, do_sample=False)
    assert torch.equal(greedy[:, -2], logits[:, -1].argmax(-1))


class AuthorsAnderson(AndersonSolver):
    """With the authors' regularization, whose size does not follow the residuals."""

    def _iteration(self, z0, positions):
        iteration = super()._iteration(z0, positions)
        iteration.regularized = lambda gram: gram + 1e-4 * iteration.identity
        return iteration


@pytest.mark.parametrize("evaluations", [10, 20])
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_iterates_of_the_reference_solvers(solver, evaluations):
    """In sequence scope: their iterates, residual by residual, and their result."""
    reference = Reference("transformer_postln")
    model, segment = reference.convert(), reference.segment("seg1")
    if solver == "anderson":
        ours = AuthorsAnderson(0.0, evaluations, scope="sequence", history=6)
        first, small = 2, 1e-5  # their trace starts with the first mixture; what they add to the denominator
    else:
        ours = BroydenSolver(0.0, evaluations + 1, scope="sequence", history=evaluations)
        first, small = 1, 1e-9
    traces, results = {"abs": [], "rel": []}, []

    def solve(f, z0, dial, rows):
        def noting(z):
            image = f(z)
            residual = (image - z).norm()
            traces["abs"].append(residual)
            traces["rel"].append(residual / (image.norm() + small))
            return image

        results.append(ours(noting, z0).value)
        return type(model.model.layers[0]).solve(model.model.layers[0], f, z0, dial, rows)

    model.model.layers[0].solve = solve
    model(segment["data"])
    said = f"solver.{solver}.thr{evaluations}"
    for mode, trace in traces.items():
        expected = reference.tensors[f"{said}.{mode}_trace"]
        steps = trace[first : first + len(expected)]
        assert len(steps) >= len(expected) - 1
        torch.testing.assert_close(torch.stack(steps), expected[: len(steps)], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0], reference.tensors[f"{said}.result"].transpose(1, 2), rtol=0, atol=1e-6)


@variants
def test_state_dicts_that_do_not_fit_are_refused(variant):
    reference = Reference(variant)
    key = next(name for name in reference.state_dict if name.endswith(("qkv_net.bias", "o_net.bias", "decoder.bias")))
    missing = {name: tensor for name, tensor in reference.state_dict.items() if name != key}
    cases = {
        f"missing: {key}": missing,
        "left over: func.extra": reference.state_dict | {"func.extra": torch.zeros(1)},
        rf"{key} is \(3,\), but should be": reference.state_dict | {key: torch.zeros(3)},
    }
    for message, state_dict in cases.items():
        with pytest.raises(ValueError, match=f"does not fit the constructor arguments(.|\n)*{message}"):
            convert_checkpoint(state_dict, reference.arguments, reference.family)


@variants
def test_arguments_that_contradict_the_tensors_are_refused(variant):
    reference = Reference(variant)
    with pytest.raises(ValueError, match=r"n_token=201(.|\n)*is \((200|100), .*, but should be \((201|101), "):
        convert_checkpoint(reference.state_dict, reference.arguments | {"n_token": 201}, reference.family)
    with pytest.raises(ValueError, match=r"constructor_arguments has \['depth'\], which no model"):
        convert_checkpoint(reference.state_dict, reference.arguments | {"depth": 1}, reference.family)
    lacking = {name: value for name, value in reference.arguments.items() if name != "n_token"}
    with pytest.raises(ValueError, match="constructor_arguments lacks 'n_token'"):
        convert_checkpoint(reference.state_dict, lacking, reference.family)
    with pytest.raises(ValueError, match="family must be one of"):
        convert_checkpoint(reference.state_dict, reference.arguments, "deq")


def test_tensors_that_should_be_tied_and_are_not_are_refused():
    reference = Reference("transformer_adaptive")
    for key in ("crit.out_layers.1.weight", "crit.out_projs.2.weight"):
        changed = {key: reference.state_dict[key] + 1}
        with pytest.raises(
            ValueError, match=f"{key} and word_emb.*differ, but the constructor arguments say that they are tied"
        ):
            reference.convert(**changed)
    reference = Reference("trellisnet_lstm")
    with pytest.raises(ValueError, match="are one tensor in the authors' code, but differ"):
        reference.convert(**{"trellisnet.deq.func.full_conv.bias": torch.zeros(160, dtype=torch.float64)})


def test_torchdeqs_models_unroll_as_theirs_do():
    reference = Reference("torchdeq_deqlm")
    model = convert_checkpoint(reference.state_dict, reference.arguments, reference.family)
    output = model(reference.segment("seg1")["data"])
    assert model.config.gradient == "unrolled" and output.num_evaluations.tolist() == [12] * 3


def test_a_prefix_of_parallel_training_hides_nothing():
    reference = Reference("trellisnet_lstm")
    reference.state_dict = {f"module.{name}": tensor for name, tensor in reference.state_dict.items()}
    ids = reference.segment("seg1")["data"]
    assert torch.equal(reference.convert()(ids).logits, Reference("trellisnet_lstm").convert()(ids).logits)
    with pytest.raises(ValueError, match="are one tensor in the authors' code, but differ"):
        reference.convert(**{"module.trellisnet.deq.func.full_conv.bias": torch.zeros(160, dtype=torch.float64)})


def test_two_names_that_become_one_are_refused_unless_their_tensors_are_equal():
    reference = Reference("trellisnet_lstm")
    ids, tensor = reference.segment("seg1")["data"], reference.state_dict["encoder.weight"]
    expected = reference.convert()(ids).logits
    for name in ("module.encoder.weight", "_orig_mod.module.encoder.weight"):
        assert torch.equal(reference.convert(**{name: tensor.clone()})(ids).logits, expected)
        with pytest.raises(ValueError, match=f"^encoder.weight and {name} are one name .* their tensors are not equal"):
            reference.convert(**{name: torch.zeros_like(tensor)})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(number):
    reference = Reference("trellisnet_lstm")
    spoilt = reference.state_dict["decoder.bias"].clone()
    spoilt[3] = number
    with pytest.raises(ValueError, match="^decoder.bias has numbers that are not finite"):
        reference.convert(**{"decoder.bias": spoilt})


@pytest.mark.parametrize(
    "first, others, widest",
    [
        (torch.float16, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_the_widest_dtype_is_that_of_the_model(first, others, widest):
    reference = Reference("torchdeq_deqlm")
    tensors = {name: tensor.to(others) for name, tensor in reference.state_dict.items()}
    name = next(iter(tensors))
    assert reference.convert(**(tensors | {name: tensors[name].to(first)})).dtype == widest


@pytest.mark.parametrize(
    "arguments, message",
    [({"n_token": "200"}, "vocab_size"), ({"tie_weights": False}, "tied_projections"), ({"d_head": 0}, "head_dim")],
)
def test_arguments_that_make_no_model_are_refused(arguments, message):
    reference = Reference("transformer_adaptive")
    with pytest.raises(ValueError, match=f"constructor_arguments do not make a model(.|\\n)*{message}"):
        convert_checkpoint(reference.state_dict, reference.arguments | arguments, reference.family)


@pytest.mark.parametrize("field", [{"final_norm": True}, {"hidden_act": "gelu"}, {"num_attention_heads": 2}])
def test_fields_that_make_another_model_are_refused(field):
    reference = Reference("transformer_adaptive")
    with pytest.raises(ValueError, match=f"config_fields: {next(iter(field))} follows from the checkpoint .* leave it"):
        convert_checkpoint(reference.state_dict, reference.arguments, reference.family, **field)


def test_fields_that_make_no_other_model_are_free():
    reference = Reference("trellisnet_lstm")
    fields = {"solver": "broyden", "hidden_dropout": 0.1, "eos_token_id": 0, "cell_scan": True, "use_cache": False}
    model = convert_checkpoint(reference.state_dict, reference.arguments, reference.family, **SOLVED, **fields)
    assert {name: getattr(model.config, name) for name in fields} == fields
    ids = reference.segment("seg1")["data"]
    torch.testing.assert_close(model(ids).logits, reference.convert()(ids).logits, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="no field 'solver_tolerence'; did you mean 'solver_tolerance'"):
        convert_checkpoint(reference.state_dict, reference.arguments, reference.family, solver_tolerence=1e-4)


def test_untied_models_convert_too():
    reference = Reference("transformer_adaptive")
    tied = reference.convert()
    reference.arguments |= {"tie_weights": False, "tie_projs": [False, False, False]}
    untied = reference.convert()
    ids = reference.segment("seg1")["data"]
    assert untied.num_parameters() > tied.num_parameters()
    assert torch.equal(untied(ids).logits, tied(ids).logits)
