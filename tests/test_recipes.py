"""Published recipes: their models have the published sizes, switch by switch, and their cards say what is built."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from hf_deq.commands.train import parse
from hf_deq.hub.conversion import FAMILIES
from hf_deq.training import make_optimizer, make_schedule

ROOT = Path(__file__).parents[1]


class Published(NamedTuple):
    """What the literature says of a model.

    Attributes:
        millions: of parameters.
        family: of `conversion.py`.
        arguments: of the constructor in the authors' code that differ from its family's below.
        tolerance: of the number of parameters. The script of the medium-adaptive models does not give the 110M of the
            paper's table, nor that of the TrellisNet its 180M; their cards say so.
    """

    millions: int
    family: str
    arguments: dict
    tolerance: float = 0.02


WIKITEXT_103, PENN_TREEBANK = 267_735, 10_000
CUTOFFS, TIED = [20_000, 40_000, 200_000], [False, True, True, True]
ADAPTIVE = dict(d_model=700, d_embed=700, n_head=10, d_head=70, d_inner=48_000, div_val=4, tie_projs=TIED)
FULL_WIDTH = dict(d_model=500, d_embed=500, n_head=10, d_head=50, tie_projs=TIED)
REGULARIZED = dict(mem_len=300, dropout=0.06, dropatt=0.01)
WITHOUT_EQUILIBRIUM = dict(n_layer=3, d_inner=14_800)
TRELLISNET = dict(n_layer=40, ninp=500, nhid=1500, nout=500, splits=[2800, 20_000, 76_000])
PENN = dict(n_token=PENN_TREEBANK, n_layer=58, ninp=400, nhid=1000, nout=400, emb_dropout=0.1, wdrop=0.5)
ATTRACTOR = dict(
    **dict(n_embd=1024, intermediate_size=4096, num_attention_heads=8, n_backbone_layers=7, n_fp_blocks=1),
    **dict(vocab_size=32_768, padding_multiple=64, block_size=2048, tie_embeddings=True, qk_norm=True, norm_eps=1e-5),
    **dict(block_class_name="TransformerPreNormBlock", norm_class_name="RMSNorm", nonlin_name="ReLU2"),
    **dict(layer_scale_init=0.75, gamma_max=0.75, init_strategy="scaled-zero"),
)
ARGUMENTS = {
    "attractor": {},
    "deq_transformer": dict(
        n_layer=2, dropout=0.05, tgt_len=150, mem_len=150, cutoffs=CUTOFFS, wnorm=True, pretrain_steps=32_000
    ),
    "torchdeq_lm": dict(dropout=0.05, tgt_len=150, mem_len=150, cutoffs=CUTOFFS),
    "deq_trellisnet": dict(dropout=0.1, dropouti=0.1, dropouth=0.1, pretrain_steps=30_000),
}
PUBLISHED = {
    "deq-transformer-wikitext103-small": Published(138, "deq_transformer", FULL_WIDTH | dict(d_inner=2000)),
    "deq-transformer-wikitext103-medium": Published(172, "deq_transformer", FULL_WIDTH | dict(d_inner=36_000)),
    "deq-transformer-wikitext103-medium-adaptive": Published(110, "deq_transformer", ADAPTIVE, 0.12),
    "deq-transformer-wikitext103-jacobian-post": Published(110, "deq_transformer", ADAPTIVE | REGULARIZED, 0.12),
    "deq-transformer-wikitext103-jacobian-pre": Published(
        110, "deq_transformer", ADAPTIVE | REGULARIZED | dict(pre_lnorm=True), 0.12
    ),
    "deq-lm-wikitext103": Published(98, "torchdeq_lm", ADAPTIVE | WITHOUT_EQUILIBRIUM),
    "deq-trellisnet-wikitext103": Published(180, "deq_trellisnet", TRELLISNET, 0.04),
    "deq-attractor-140m": Published(140, "attractor", ATTRACTOR, 0.05),
    "deq-trellisnet-ptb": Published(24, "deq_trellisnet", PENN | dict(dropout=0.45, dropouti=0.45, dropouth=0.28)),
}
OF_THE_SOLVER = re.compile("^(solver|backward|phantom|jacobian)_|^(solver|gradient|use_cache|initializer_range)$")
each = pytest.mark.parametrize("name", PUBLISHED)


def recipe_file(name: str) -> Path:
    return ROOT / "model_cards" / name / "recipe.yaml"


def configuration(name: str):
    """The recipe's, with the vocabulary that its corpus has."""
    data, _, fields, model_type = parse([str(recipe_file(name))])
    words = {"vocab_size": PENN_TREEBANK if name.endswith("ptb") else WIKITEXT_103} if data.word_level else {}
    return AutoConfig.for_model(model_type, **(fields | words))


def card_row(name: str, row: str) -> str:
    card = (ROOT / "model_cards" / name / "README.md").read_text()
    return re.search(rf"^\| {row} \| (.*) \|$", card, re.M)[1]


def test_every_published_recipe_is_checked():
    cards = ROOT.glob("model_cards/*/README.md")
    assert {card.parent.name for card in cards if "| parameters published |" in card.read_text()} == set(PUBLISHED)


@each
def test_sizes_are_the_published_ones_and_the_card_says_so(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(configuration(name)).num_parameters()
    assert built == pytest.approx(published.millions * 1e6, rel=published.tolerance)
    assert card_row(name, "parameters built here") == f"{built:,}"
    difference = built / (published.millions * 1e6) - 1
    assert card_row(name, "parameters published") == f"{published.millions}M ({difference:+.1%} here)"


@each
def test_every_switch_is_that_of_the_authors_constructor(name):
    """What `convert_checkpoint` makes of the arguments in the published scripts, but for how it is solved."""
    published = PUBLISHED[name]
    words = {} if published.family == "attractor" else {"n_token": WIKITEXT_103}
    arguments = words | ARGUMENTS[published.family] | published.arguments
    state_dict = {"weight_v": None}  # torchdeq's weight norm shows in the names alone
    expected = FAMILIES[published.family].config(arguments, state_dict, {}).to_dict()
    ours = configuration(name).to_dict()
    different = {field: (ours[field], value) for field, value in expected.items() if ours[field] != value}
    assert {field: values for field, values in different.items() if not OF_THE_SOLVER.search(field)} == {}


@each
def test_the_recipe_says_everything_and_where_it_is_from(name):
    data, run, *_ = parse([str(recipe_file(name))])
    lines = recipe_file(name).read_text().splitlines()
    unexplained = [line for line in lines if ": " in line and "#" not in line]
    assert {line.split(":")[0] for line in unexplained} <= {"model_type", "task"}
    recipe = yaml.safe_load(recipe_file(name).read_text())
    wanted = {"optimizer", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "max_steps", "seed"}
    wanted |= {"batch_size", "max_grad_norm", "mixed_precision", "id_order", "sequence_length", "gradient", "solver"}
    assert wanted <= recipe.keys()
    card = (ROOT / "model_cards" / name / "README.md").read_text()
    assert f"model_cards/{name}/recipe.yaml" in card and re.search(r"needs about [\d.]+ GPU-days", card)
    segment = run.batch_size * data.sequence_length
    assert card_row(name, "training") == f"{run.max_steps:,} steps of {segment:,} tokens"


@pytest.mark.slow
@each
def test_full_width_takes_steps(name):
    """At the published sizes: a row of 16 random words, shallow pretraining and the equilibrium, memory carried."""
    _, run, _, _ = parse([str(recipe_file(name))])
    torch.manual_seed(0)
    config = configuration(name)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = make_optimizer(model, run)
    schedule = make_schedule(optimizer, run)
    before, memory = next(model.model.layers[0].parameters()).detach().clone(), None
    for step in range(3):
        ids = torch.randint(config.vocab_size, (1, 17))
        unroll = {"unroll_steps": run.shallow_depth} if step == 0 and run.shallow_steps else {}
        outputs = model(
            ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:], memory=memory, use_cache=False, **unroll
        )
        outputs.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
        assert torch.isfinite(outputs.loss) and torch.isfinite(norm) and norm > 0
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        memory = outputs.memory
    assert (memory is not None) == bool(model.model.layers[0].memory_sizes)
    assert not torch.equal(before, next(model.model.layers[0].parameters()))
