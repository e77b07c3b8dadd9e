"""`transformers.Trainer` with both model families, and `EquilibriumCallback`."""

import logging
import math

import pytest
import torch
import transformers
from datasets import Dataset
from families import TRANSFORMER, a_family, every_family, random_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from hf_deq import DEQTransformerForSequenceClassification
from hf_deq.hub import export_hub_folder
from hf_deq.training import EquilibriumCallback

PADDING = -100


def texts(count: int = 16, length: int = 7) -> list[dict[str, torch.Tensor]]:
    """Texts of which every other one has labels on its last tokens only, always the same ones."""
    torch.manual_seed(1)
    rows = []
    for i, ids in enumerate(random_ids(count, length)):
        labels = ids.clone()
        labels[: length - 2 if i % 2 else 0] = PADDING
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def make_model(family, **fields):
    """In single precision, as a Trainer's models are, and solved far below what the tests compare."""
    return family.model(**{"solver_tolerance": 1e-6, "backward_tolerance": 1e-6} | fields).float()


def make_trainer(model, folder, callbacks=(), data=None, **how) -> Trainer:
    usual = dict(per_device_train_batch_size=8, max_steps=2, learning_rate=1e-2, logging_steps=1, save_strategy="no")
    usual |= dict(report_to="none", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0)
    arguments = TrainingArguments(output_dir=str(folder), **(usual | how))
    data = texts() if data is None else data
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def logged(trainer: Trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


@every_family
def test_loss_is_that_of_a_plain_forward(family, tmp_path):
    """Trainer's first losses, with labels shifted inside, against logits and shift_labels from outside."""
    model = make_model(family)
    rows = texts(8)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    targets = F.pad(batch["labels"], (0, 1), value=PADDING)[:, 1:].contiguous()
    with torch.no_grad():
        inside, outside = model(**batch).loss, model(**batch, shift_labels=targets).loss
        by_hand = F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), targets.flatten())
    trainer = make_trainer(model, tmp_path, data=rows, max_steps=1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(inside.item(), rel=1e-5)
    trainer.train()
    assert inside.item() == pytest.approx(outside.item(), rel=1e-6) == pytest.approx(by_hand.item(), rel=1e-6)
    assert logged(trainer, "loss")[0] == pytest.approx(inside.item(), rel=1e-4)


@a_family
def test_label_smoothing_learns_the_next_token(family, tmp_path):
    """Trainer shifts the labels of models that it knows as causal. Others would learn to copy their input."""
    start = torch.randint(3, 61, (16, 1))
    rows = [{"input_ids": row, "labels": row} for row in 3 + (start - 3 + torch.arange(9)) % 58]
    model = make_model(family, solver_tolerance=1e-3, backward_tolerance=1e-2)
    type("Other", (family.model_class,), {})  # replaces no model on the list that Trainer reads
    how = dict(label_smoothing_factor=0.1, max_steps=60, learning_rate=2e-2, per_device_train_batch_size=16)
    make_trainer(model, tmp_path, data=rows, **how).train()
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        predicted = model.eval()(ids).logits.argmax(-1)
    assert (predicted[:, :-1] == ids[:, 1:]).float().mean() > 0.9
    assert (predicted[:, :-1] == ids[:, :-1]).float().mean() < 0.1


def accumulated(make, folder, **how) -> list[Trainer]:
    """The same steps in batches of 8, and in 4 micro-batches of 2."""
    trainers = []
    for size in (8, 2):
        steps = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        trainers.append(make_trainer(make(), folder, optim="sgd", learning_rate=0.1, **steps, **how))
        trainers[-1].train()
    return trainers


def assert_same_training(one: Trainer, other: Trainer):
    assert logged(other, "loss") == pytest.approx(logged(one, "loss"), rel=1e-4)
    weights = other.model.state_dict()
    for name, expected in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5, msg=name)


@every_family
def test_accumulated_micro_batches_are_the_step_of_one_batch(family, tmp_path):
    """Though micro-batches differ in their counts of labels."""
    assert_same_training(*accumulated(lambda: make_model(family), tmp_path))


@every_family
def test_accumulated_micro_batches_share_the_jacobian_loss(family, tmp_path):
    # The penalty dominates: counted in full by each of four micro-batches the loss would be four times what it is.
    fields = dict(jacobian_loss_weight=1000.0)
    one, parts = accumulated(lambda: make_model(family, **fields), tmp_path, max_steps=1)
    assert logged(one, "loss")[0] > 25
    assert logged(parts, "loss") == pytest.approx(logged(one, "loss"), rel=0.3)  # each draws its own estimate


@pytest.mark.parametrize("fields, label", [({"num_labels": 3}, int), ({"num_labels": 1}, float)])
def test_accumulated_micro_batches_of_classifiers(fields, label, tmp_path):
    def make():
        torch.manual_seed(0)
        return DEQTransformerForSequenceClassification(TRANSFORMER.config(**fields, solver_tolerance=1e-6))

    data = [row | {"labels": label(i % 3)} for i, row in enumerate(texts())]
    assert_same_training(*accumulated(make, tmp_path, data=data))


@every_family
def test_training_evaluating_and_predicting(family, tmp_path):
    model = make_model(family, solver_tolerance=1e-3, backward_tolerance=1e-2)
    trainer = make_trainer(model, tmp_path, max_steps=30, logging_steps=5, learning_rate=2e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    prediction = trainer.predict(texts(5))
    assert prediction.predictions.shape == (5, 7, family.model().config.vocab_size)  # logits, and no reports of solves
    loss, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(texts(3)), return_outputs=True)
    assert loss == outputs.loss and outputs.residual.shape == (3,)


@every_family
def test_resuming_from_a_checkpoint_gives_the_same_weights(family, tmp_path):
    # With every random draw that a step has: data order, dropout, the probes of the penalty.
    fields = dict(hidden_dropout=0.1, output_dropout=0.1, jacobian_loss_weight=0.1)
    saving = dict(save_strategy="steps", save_steps=2, max_steps=5)
    whole = make_trainer(make_model(family, **fields), tmp_path, **saving)
    whole.train()
    resumed = make_trainer(make_model(family, **fields), tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 5
    for name, expected in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], expected, rtol=0, atol=1e-6, msg=name)
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)


class Recorder(TrainerCallback):
    """What callbacks after `EquilibriumCallback` are given to report."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@every_family
def test_the_callback_logs_means_since_the_last_log(family, tmp_path):
    model, recorder = make_model(family, jacobian_loss_weight=0.1), Recorder()
    solves, vector_products, layer = [], [], model.model.layers[0]
    layer.register_forward_hook(lambda layer, inputs, output: solves.append((layer.training, output.solution)))

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            vector_products.append(layer.backward_evaluations.float().mean().item())

        on_substep_end = on_step_end

    how = dict(logging_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    how |= dict(max_steps=4, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=16)
    trainer = make_trainer(model, tmp_path, [EquilibriumCallback(), recorder, Watch()], **how)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    training = [solution for is_training, solution in solves if is_training]
    assert len(training) == len(vector_products) == 8 and len(solves) == 12
    for i, log in enumerate(logs):
        since = training[4 * i : 4 * i + 4]
        evaluations = torch.cat([solution.num_evaluations for solution in since]).float().mean().item()
        residual = torch.cat([solution.residual for solution in since]).mean().item()
        assert log["forward_evaluations"] == pytest.approx(evaluations)
        assert log["residual"] == pytest.approx(residual)
        assert log["backward_evaluations"] == pytest.approx(sum(vector_products[4 * i : 4 * i + 4]) / 4)
        assert log["converged"] == 1.0 and log["jacobian_loss"] > 0
    reported = [log for log in recorder.logs if "loss" in log]
    assert [log["residual"] for log in reported] == [log["residual"] for log in logs]
    others = [log for log in recorder.logs if "loss" not in log]
    assert len(others) == 5 and not any("residual" in log for log in others)  # four evaluations and the summary


def test_the_callback_leaves_no_hook(tmp_path):
    model = make_model(TRANSFORMER, gradient="unrolled", solver_max_evaluations=3)
    trainer = make_trainer(model, tmp_path, [EquilibriumCallback()], max_steps=1)
    for _ in range(2):
        trainer.train()
        assert not model.model.layers[0]._forward_hooks
    assert logged(trainer, "forward_evaluations") == [3.0]
    assert not logged(trainer, "backward_evaluations") and not logged(trainer, "jacobian_loss")


def test_the_callback_refuses_models_without_an_equilibrium(tmp_path):
    explicit = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(ValueError, match="no equilibrium in GPT2LMHeadModel: it is for models of hf_deq; leave it out"):
        make_trainer(explicit, tmp_path, [EquilibriumCallback()]).train()


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "the", "bank", "of", "new", "york", "said", "it", "will", "buy"]
    vocabulary = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), pad_token="<pad>", eos_token="</s>")
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


@every_family
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_trainer_loses_the_same_packed_padding_free_and_plain(family, tmp_path):
    """TRL's packing puts several texts into a row. Each is solved as if it were alone, at a loose tolerance too."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    tokenizer = word_tokenizer()
    data = Dataset.from_list(
        [
            {"text": text}
            for text in ("the bank of new york said it", "it said", "will it buy the bank of york", "buy new york")
        ]
    )
    losses = {}
    for name, way in (
        ("plain", {}),
        ("padding free", {"padding_free": True, "max_length": None}),
        ("packed", {"packing": True, "max_length": 24}),
    ):
        how = trl.SFTConfig(
            str(tmp_path), max_steps=3, logging_steps=1, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant",
            per_device_train_batch_size=4, save_strategy="no", report_to="none", use_cpu=True,
            bf16=False, disable_tqdm=True, **way,
        )  # fmt: skip
        model = family.model(solver_tolerance=3e-2, backward_tolerance=3e-2).float()
        trainer = trl.SFTTrainer(model, how, train_dataset=data, processing_class=tokenizer)
        rows = [batch["input_ids"].shape[0] for batch in trainer.get_train_dataloader()]
        assert rows == {"plain": [4], "padding free": [1], "packed": [1]}[name], name
        trainer.train()
        losses[name] = logged(trainer, "loss")
    assert losses["padding free"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["packed"] == pytest.approx(losses["plain"], rel=1e-5)


@every_family
def test_sft_trainer_learns_completions(family, tmp_path):
    """TRL's, as it is: with activation checkpointing, which it switches on by default, and the prompt left out."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    tokenizer = word_tokenizer()
    pairs = [
        {"prompt": "the bank of", "completion": " new york"},
        {"prompt": "it said it", "completion": " will buy it"},
    ]
    how = trl.SFTConfig(
        str(tmp_path), max_steps=10, learning_rate=5e-2, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    model = make_model(family)
    rows = [tokenizer(text["prompt"] + text["completion"] + " </s>").input_ids for text in pairs]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    labels = ids.masked_fill((ids == 0) | (torch.arange(ids.shape[1]) < 3), PADDING)
    with torch.no_grad():
        expected = model(ids, attention_mask=(ids != 0).long(), labels=labels, use_cache=False).loss
    data = Dataset.from_list(pairs)
    trainer = trl.SFTTrainer(
        model, how, train_dataset=data, processing_class=tokenizer, callbacks=[EquilibriumCallback()]
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    assert all(logged(trainer, "converged")) and model.model.layers[0].gradient_checkpointing


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of 61 words, as many as the models of the tests have ids."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(58))]
    plain = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


OF_TRL = dict(max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no")


@every_family
@pytest.mark.parametrize("exported", [False, True], ids=["with the package", "with its own code"])
def test_dpo_from_a_path_makes_its_own_reference_model(family, exported, words, tmp_path):
    from trl import DPOConfig, DPOTrainer

    model, folder = make_model(family, solver_tolerance=1e-3, backward_tolerance=1e-2), tmp_path / "model"
    model.save_pretrained(folder)
    if exported:
        export_hub_folder(model, folder, words)
    rows = [{"prompt": "w1 w2", "chosen": " w3 w4 w5", "rejected": " w9 w8 w7"}] * 4
    how = {"model_init_kwargs": {"trust_remote_code": True}} if exported else {}
    arguments = DPOConfig(output_dir=str(tmp_path / "out"), **OF_TRL, **how)
    trainer = DPOTrainer(str(folder), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=words)
    trainer.train()
    # Model and reference are equal at the start, so the loss is that of a coin.
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(math.log(2), abs=1e-3)


@a_family
def test_grpo_rewards_what_was_generated(family, words, tmp_path):
    """Completions are rewarded for a word; after some steps there are more of it."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **others) -> list[float]:
        return [completion.split().count("w7") / 8 for completion in completions]

    model = make_model(family, solver_tolerance=1e-3, backward_tolerance=1e-2)
    how = OF_TRL | dict(max_steps=30, per_device_train_batch_size=16, num_generations=8, max_completion_length=8)
    how |= dict(learning_rate=3e-2, logging_steps=1, max_grad_norm=0.0, generation_kwargs={"min_new_tokens": 8})
    arguments = GRPOConfig(output_dir=str(tmp_path), **how)
    data = Dataset.from_list([{"prompt": "w1 w2"}] * 16)
    trainer = GRPOTrainer(model, reward, arguments, train_dataset=data, processing_class=words)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) > 3 * sum(rewards[:3])


@every_family
def test_a_reward_model_learns_from_pairs(family, words, tmp_path):
    from trl import RewardConfig, RewardTrainer

    model_class = AutoModelForSequenceClassification
    config = family.config(num_labels=1, solver_tolerance=1e-3, backward_tolerance=1e-2)
    config.save_pretrained(tmp_path / "model")
    model_class.from_config(config).save_pretrained(tmp_path / "model")
    rows = [{"chosen": "w1 w2 w3", "rejected": "w1 w9 w8"}] * 4
    how = OF_TRL | dict(max_steps=15, learning_rate=2e-2, logging_steps=5, lr_scheduler_type="constant")
    arguments = RewardConfig(output_dir=str(tmp_path / "out"), **how)
    data = Dataset.from_list(rows)
    trainer = RewardTrainer(str(tmp_path / "model"), args=arguments, train_dataset=data, processing_class=words)
    trainer.train()
    assert logged(trainer, "loss")[-1] < 0.5 * math.log(2)  # at first, that of a coin


@every_family
@pytest.mark.parametrize("how", ["label smoothing", "compute_loss_func"])
def test_a_jacobian_loss_that_is_left_out_is_said(family, how, tmp_path, caplog):
    """Trainer computes these losses from the logits, so the model cannot add to them."""
    model = make_model(family, jacobian_loss_weight=0.5)
    trainer = make_trainer(model, tmp_path, max_steps=1, **({"label_smoothing_factor": 0.1} if "label" in how else {}))
    if how == "compute_loss_func":
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()
    logging.getLogger("transformers").propagate = True
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "jacobian_loss_weight is set, but the loss is computed outside of the model" in caplog.text


@every_family
def test_pipelines_know_the_classes(family, words, caplog):
    logging.getLogger("transformers").propagate = True
    model = AutoModelForSequenceClassification.from_config(family.config(num_labels=2)).eval()
    with caplog.at_level(logging.WARNING):
        scores = pipeline("text-classification", model=model, tokenizer=words, device="cpu")("w1 w2 w3")
    assert 0 < scores[0]["score"] < 1 and "not supported" not in caplog.text
