"""Attractor models made of pretrained decoders: every layer computes what it computed; what does not fit is named."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from hf_deq.hub.retrofit import retrofit

SIZES = dict(
    **dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=4, head_dim=8),
    **dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
)
LLAMA3_ROPE = dict(
    **dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    original_max_position_embeddings=64,
)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
ORIGINALS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-scaled-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=3),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}
originals = pytest.mark.parametrize("config", ORIGINALS.values(), ids=ORIGINALS)


def pretrained(config):
    """A model with weights of ordinary size, whose norms and biases are not what they were at the start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1)
    model.tie_weights()
    return model


@pytest.fixture
def in_double_precision(monkeypatch):
    """Let Transformers compute in double precision where it casts to single precision: in norms and rotary angles."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@originals
@torch.no_grad()
def test_every_part_computes_what_it_computed(config, in_double_precision):
    original, ids = pretrained(config).double(), torch.randint(3, 61, (2, 9))
    layers, exact = original.config.num_hidden_layers, dict(rtol=1e-10, atol=1e-10)
    model = retrofit(original, num_prelude_layers=layers - 1, num_head_layers=1)
    expected = original(ids, output_hidden_states=True).hidden_states
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for ours, theirs in zip(states[:layers], expected[:layers], strict=True):
        torch.testing.assert_close(ours, theirs, **exact)
    logits = model._logits(expected[-1])
    torch.testing.assert_close(logits, original.lm_head(expected[-1]), **exact)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert torch.equal(model.model.norm.weight, original.model.norm.weight)
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    layer = model.model.layers[0]
    shorter = retrofit(original, num_prelude_layers=layers - 2, num_head_layers=1).model.layers[0]
    for ours, theirs in zip(shorter.head[0].parameters(), layer.prelude[layers - 2].parameters(), strict=True):
        assert torch.equal(ours, theirs)  # so a head adds what the prelude's layer was shown to add


@originals
def test_it_is_a_model_like_any_other(config, tmp_path):
    model = retrofit(pretrained(config), 1, 2)
    model.save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(3, 61, (1, 6))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 9)
    loaded(ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 3}, {"tie_word_embeddings": False}, {"sliding_window": 4}, {"logit_scale": 2.0}]
)
def test_fields_that_would_change_the_copy_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} follows from the original: leave it out"):
        retrofit(pretrained(ORIGINALS["llama"]), 2, 1, **fields)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("initializer_range", [0.02, 0.3])
def test_half_precision_is_no_difference(dtype, initializer_range):
    """Neither where a layer adds little to its input, nor where rounded rotary frequencies or weights of norms show."""
    one_head = dict(num_attention_heads=1, num_key_value_heads=1, head_dim=128)
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES | one_head | dict(hidden_size=128, initializer_range=initializer_range))
    )
    for name, weight in original.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.5)
    original = original.to(dtype)
    model = retrofit(original, 2, 1)
    assert model.dtype == dtype and original.dtype == dtype
    weight = original.model.layers[0].mlp.down_proj.weight
    assert torch.equal(model.model.layers[0].prelude[0].mlp.down_proj.weight, weight)


def test_half_precision_hides_no_difference():
    original = AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, residual_multiplier=0.98)).bfloat16()
    with pytest.raises(ValueError, match="its layer 0 computes something else"):
        retrofit(original, 2, 1)


def test_it_generates_as_the_original_was_configured():
    model = pretrained(LlamaConfig(**SIZES))
    model.generation_config.update(temperature=0.7, do_sample=True, eos_token_id=[2, 5])
    ours = retrofit(model, 1, 1).generation_config
    assert (ours.temperature, ours.do_sample, ours.eos_token_id) == (0.7, True, [2, 5])
    assert ours is not model.generation_config


def test_the_equilibrium_may_be_configured():
    model = retrofit(pretrained(ORIGINALS["llama"]), 2, 1, solver="broyden", solver_tolerance=1e-4)
    assert model.config.solver == "broyden" and model.config.solver_tolerance == 1e-4


def test_weights_that_are_not_finite_are_refused_by_name():
    original = pretrained(ORIGINALS["llama"])
    original.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model.layers.3.mlp.up_proj.weight has numbers that are not finite"):
        retrofit(original, 2, 1)


def test_a_classifier_is_refused():
    classifier = AutoModelForSequenceClassification.from_config(ORIGINALS["llama"])
    with pytest.raises(ValueError, match="no linear output layer of tokens"):
        retrofit(classifier, 2, 1)


def test_an_original_that_is_refused_stays_in_training():
    original = pretrained(ORIGINALS["llama"]).train()
    original.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match="cannot be retrofitted"):
        retrofit(original, 2, 1)
    assert original.training


@pytest.mark.parametrize("training", [True, False])
def test_the_original_stays_as_it_was(training):
    original = pretrained(ORIGINALS["llama"]).train(training)
    before = {name: weight.clone() for name, weight in original.state_dict().items()}
    model = retrofit(original, 2, 1)
    assert original.training == training and not model.training
    assert all(torch.equal(weight, before[name]) for name, weight in original.state_dict().items())


def test_gates_may_be_added():
    model = retrofit(pretrained(ORIGINALS["llama"]), 2, 1, layer_scale_init_value=0.5)
    assert model.model.layers[0].head[0].attention_scale.weight.isfinite().all()
    assert model.config.layer_scale_init_value == 0.5


def test_a_limit_of_no_gates_is_refused():
    for fields in ({}, {"layer_scale_init_value": None}):
        with pytest.raises(ValueError, match="layer_scale_max limits gates: give layer_scale_init_value, too"):
            retrofit(pretrained(ORIGINALS["llama"]), 2, 1, layer_scale_max=0.5, **fields)
    config = retrofit(pretrained(ORIGINALS["llama"]), 2, 1, layer_scale_max=0.5, layer_scale_init_value=0.5).config
    assert config.layer_scale_max == 0.5


def test_other_norms_are_refused_with_what_is_supported():
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    message = "its configuration has no rms_norm_eps. Give .* the layers of Llama: Llama, Mistral, Qwen2 or Qwen3"
    with pytest.raises(ValueError, match=f"StableLmForCausalLM cannot be retrofitted: {message}"):
        retrofit(pretrained(StableLmConfig(**sizes, partial_rotary_factor=1.0)), 1, 1)


@pytest.mark.parametrize(
    "config, what",
    [
        (GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2), "no list of decoder layers with rotary positions"),
        (Ministral3Config(**SIZES), "positions scale the queries"),
        (GemmaConfig(**SIZES), "layer 0 computes something else"),  # its norms multiply by 1 + weight
        (Gemma2Config(**SIZES), "layer 0 has post_feedforward_layernorm, which has no counterpart"),
        (GraniteConfig(**SIZES, residual_multiplier=0.2), "layer 0 computes something else"),
        (
            GraniteConfig(**SIZES, attention_multiplier=8**-0.5, embedding_multiplier=3.0),
            "embedding computes something else",
        ),
        (
            GraniteConfig(**SIZES, attention_multiplier=8**-0.5, logits_scaling=4.0),
            "output layer computes something else",
        ),
        (Olmo2Config(**SIZES), "layer 0 has no input_layernorm"),
        (HeliumConfig(**SIZES), r"layer 0 has self_attn.o_proj.weight of shape \(16, 16\)"),
        (MixtralConfig(**SIZES, num_local_experts=2), "layer 0 has no mlp.down_proj"),
        (
            Qwen3Config(**SIZES, layer_types=["full_attention", "sliding_attention"] * 2),
            "layers differ in their attention",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_does_not_fit_is_named(config, what):
    with pytest.raises(ValueError, match=f"cannot be retrofitted: its {what}|cannot be retrofitted: it has {what}"):
        retrofit(pretrained(config), 1, 1)


@pytest.mark.parametrize("arguments", [(4, 1), (-1, 1), (1, 0), (0, 5)])
def test_layers_that_do_not_exist_are_refused(arguments):
    with pytest.raises(ValueError, match="do not fit: the model has 4 layers, and the head needs at least one"):
        retrofit(pretrained(ORIGINALS["llama"]), *arguments)
