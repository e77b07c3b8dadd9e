"""Folders that earlier versions saved: they load, and give the numbers that they gave then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_deq

SAVED = (
    Path(__file__).parent / "fixtures" / "saved_by_0_1"
)  # by export_hub_folder, without the code; the fields say which f it is


@pytest.mark.parametrize(
    "name, norm_position",
    [
        ("transformer", "post"),
        ("transformer-closed-pre-norm", "pre"),
        ("transformer-authors-pre-norm", "pre_normalized_residual"),
        ("transformer-open-pre-norm", "pre_open"),
        ("trellisnet", None),
    ],
)
def test_a_folder_of_the_first_version_gives_the_same_logits(name, norm_position, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(SAVED / name).eval()
    ids, expected = torch.arange(9)[None] % 8, load_file(SAVED / "logits.safetensors")[name]
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-8)
    assert getattr(model.config, "norm_position", None) == norm_position
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert not {"shallow_steps", "closing_norm", "normalized_residual"} & again.config.to_dict().keys()


def test_an_f_that_is_gone_is_refused():
    fields = {"norm_position": "pre", "normalized_residual": True, "closing_norm": True}
    with pytest.raises(ValueError, match="an f that hf_deq no longer has; norm_position is one of"):
        hf_deq.DEQTransformerConfig.from_dict(fields)
