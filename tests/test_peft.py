"""Low-rank adapters of PEFT inside f and around it."""

import copy

import pytest
import torch
from families import TRANSFORMER, TRELLISNET, random_ids
from transformers import Trainer, TrainingArguments

from hf_deq import ConvergenceWarning, DEQTransformerForSequenceClassification
from hf_deq.training import EquilibriumCallback

peft = pytest.importorskip("peft", reason="adapters need peft: pip install peft")

PROJECTIONS = ["qkv_proj", "o_proj", "up_proj", "down_proj"]
IN_F = {"target_modules": PROJECTIONS}
UNTIED = {"tie_word_embeddings": False}

# What can be adapted in a model, and how: the fields of the model and those of its LoraConfig.
ADAPTERS = {
    "projections": (TRANSFORMER, {}, IN_F),
    "pre-norm, relative": (
        TRANSFORMER,
        {"norm_position": "pre", "position_embedding_type": "relative", "num_hidden_layers": 2},
        {"target_modules": [*PROJECTIONS, "relative_proj", "injection"]},
    ),
    # Normalised maps are no nn.Linear; the directions of their weights are adapted instead.
    "weight norm": (
        TRANSFORMER,
        {"weight_norm": True},
        {"target_parameters": [f"{name}.direction" for name in PROJECTIONS]},
    ),
    # Nor are convolutions: their directions are adapted, or they are trained whole.
    "vocabulary": (TRELLISNET, UNTIED, {"target_modules": ["lm_head", "embed_tokens"]}),
    "directions of convolutions": (
        TRELLISNET,
        UNTIED,
        {"target_parameters": ["injection.direction", "recurrence.direction"]},
    ),
    "convolution": (
        TRELLISNET,
        UNTIED,
        {"target_modules": ["lm_head"], "modules_to_save": ["injection", "recurrence"]},
    ),
}
every_adapter = pytest.mark.parametrize("family, fields, lora", ADAPTERS.values(), ids=ADAPTERS.keys())

# As in earnest, where the laws solve to round-off.
QUICK = dict(solver_tolerance=1e-3, solver_max_evaluations=30, backward_tolerance=1e-2, backward_max_evaluations=30)


def adapted(model, **lora):
    """The model with an adapter that has an effect, made the same way every time."""
    adapter = peft.get_peft_model(model, peft.LoraConfig(**({"r": 3} | lora))).double().eval()
    torch.manual_seed(0)
    for parameter in trained(adapter).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return adapter


def trained(adapter) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}


@every_adapter
def test_gradients_equal_those_of_200_unrolled_steps(family, fields, lora):
    ids = random_ids(2, 6)

    def gradients(**how):
        tolerances = dict(solver_tolerance=1e-12, backward_tolerance=1e-12)
        adapter = adapted(family.model(**fields, **tolerances, **how), **lora)
        adapter(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in trained(adapter).items()}

    implicit, unrolled = gradients(), gradients(gradient="unrolled", solver_max_evaluations=200)
    assert len(implicit) >= 4
    for name, exact in unrolled.items():
        error, size = torch.linalg.vector_norm(implicit[name] - exact), torch.linalg.vector_norm(exact)
        assert size > 0 and error <= 1e-6 * size, name


@torch.no_grad()
@every_adapter
def test_adapters_are_saved_loaded_switched_off_and_merged(family, fields, lora, tmp_path):
    model, ids = family.model(**fields), random_ids(2, 6)
    plain = model(ids).logits
    adapter = adapted(model, **lora)
    logits = adapter(ids).logits
    assert (logits - plain).abs().max() > 1e-3
    with adapter.disable_adapter():
        torch.testing.assert_close(adapter(ids).logits, plain, rtol=0, atol=1e-10)
    adapter.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    loaded = peft.PeftModel.from_pretrained(family.model(**fields), str(tmp_path)).double().eval()
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=0, atol=1e-12)
    merged = copy.deepcopy(adapter).merge_and_unload()
    assert type(merged) is family.model_class
    torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_adapter_is_applied_in_every_evaluation():
    model, calls = TRANSFORMER.model(), []
    adapter = adapted(model, **IN_F)
    for name, module in adapter.named_modules():
        if name.endswith("o_proj.lora_A.default"):
            module.register_forward_hook(lambda *args: calls.append(1))
    output = adapter(random_ids(1, 6))
    assert len(calls) == output.num_evaluations.item() > 5


@torch.no_grad()
def test_decoding_with_a_cache_uses_the_adapter():
    adapter, ids = adapted(TRANSFORMER.model(), **IN_F), random_ids(2, 4)
    tokens = adapter.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(adapter(tokens[:, :-1]).logits[:, 3:].argmax(-1), tokens[:, 4:])


def test_what_has_no_linear_maps_is_refused_by_name():
    for model, names in ((TRANSFORMER.model(weight_norm=True), PROJECTIONS), (TRELLISNET.model(), ["recurrence"])):
        with pytest.raises(ValueError, match="Target module (WeightNormLinear|CausalConvolution).* is not supported"):
            adapted(model, target_modules=names)


def test_dropout_of_an_adapter_in_f_is_reported():
    """It is drawn anew in every evaluation, which moves the fixed point: leave lora_dropout at 0 inside of f."""
    adapter = adapted(TRANSFORMER.model(solver_max_evaluations=30), **IN_F, lora_dropout=0.3).train()
    with pytest.warns(ConvergenceWarning, match="left 2 of 2 sequences"):
        assert not adapter(random_ids(2, 6), use_cache=False).converged.any()


def test_a_classifier_is_adapted_with_the_trainer(tmp_path):
    """Only adapter and scores move, the loss falls, and the callback finds the equilibrium within the wrappers."""
    torch.manual_seed(0)
    model = DEQTransformerForSequenceClassification(TRANSFORMER.config(num_labels=2, **QUICK))
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type=peft.TaskType.SEQ_CLS, **IN_F))
    data = [{"input_ids": ids, "labels": int(ids[0] > 30)} for ids in random_ids(16, 5)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(adapter, arguments, train_dataset=data, callbacks=[EquilibriumCallback()])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    assert all(log["forward_evaluations"] > 1 and log["backward_evaluations"] > 1 for log in logs)
    after = {name.replace(".base_layer", ""): value for name, value in model.model.named_parameters()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
