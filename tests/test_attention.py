"""What heads look at, and CircuitsVis's page of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import xarray as xr

import workbench as wb
from workbench.data.prompts import build_prompts
from workbench.discovery.attended import attended
from workbench.figures.attention import attention, bundle
from workbench.models import context_length

HEADS = wb.HeadSet.parse("L3H5, L0H1")
HOSTILE = '</script><img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def prompt(testbed_model):
    examples = wb.load_examples("testbed", users=1)
    return build_prompts(examples, testbed_model.tokenizer, context_length(testbed_model))[17]


def test_attention_is_the_pattern_of_the_positions_that_predict_the_target(testbed_model, prompt):
    found = attended(testbed_model, prompt, HEADS)
    tokens = torch.tensor([[*prompt.ids, *prompt.target_ids]])
    with torch.inference_mode():
        _, kept = testbed_model.run_with_cache(tokens)
    first = len(prompt.ids) - 1
    for row, head in enumerate(HEADS):
        pattern = kept[f"blocks.{head.layer}.attn.hook_pattern"][0, head.head]
        rows = [pattern[p] for p in range(first, first + len(prompt.target_ids))]
        # The same float32 numbers, averaged in the same order.
        np.testing.assert_allclose(found[row], sum(rows) / len(rows), atol=1e-6)
    assert found["head"].values.tolist() == ["L3H5", "L0H1"]
    assert float(found[:, -1].max()) == 0


def test_tokens_read_as_the_text_they_make(testbed_model, prompt):
    found = attended(testbed_model, prompt, HEADS)
    ids = [*prompt.ids, *prompt.target_ids]
    whole = testbed_model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(found["token"].values.tolist()) == whole
    assert found["part"].values.tolist().count("target") == len(prompt.target_ids)


@pytest.mark.parametrize(
    ("heads", "told"), [("", "needs a head"), ("L9H0", "not a head of this model")]
)
def test_heads_that_can_not_be_shown_are_refused(testbed_model, prompt, heads, told):
    with pytest.raises(wb.InputError, match=told):
        attended(testbed_model, prompt, wb.HeadSet.parse(heads))


def test_a_layer_without_a_pattern_is_named(testbed_model, prompt, monkeypatch):
    monkeypatch.setattr("workbench.discovery.attended.PATTERN", "blocks.{}.nothing")
    with pytest.raises(wb.InputError, match="pattern of layer 0, 3"):
        attended(testbed_model, prompt, HEADS)


def hostile_table():
    return xr.DataArray(
        [[0.25, 0.75]],
        {"head": ["L0H0"], "token": ("position", ["a", HOSTILE])},
        ("head", "position"),
    )


@pytest.mark.parametrize("alone", [True, False])
def test_no_markup_of_a_token_reaches_the_page(alone):
    page = attention(hostile_table(), "one", alone=alone)
    assert page.count("</script") == 1
    assert page.endswith("</script>")
    assert "<img" not in page.rpartition("CircuitsVis.render")[2]
    assert ("var CircuitsVis" in page) == alone


def test_page_asks_for_nothing_from_a_network():
    assert "sourceMappingURL" not in bundle()
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:""", attention(hostile_table(), "one"))


@pytest.mark.browser
def test_tokens_are_drawn_as_text_in_a_browser(rendered, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><meta charset='utf-8'><title>0</title>"
        f"<script>{bundle()}</script>{attention(hostile_table(), 'one', alone=False)}"
    )
    drawn = rendered(page)
    body = drawn.partition('<div id="one"')[2].partition("<script")[0]
    assert "&lt;/script&gt;&lt;img" in body.replace("</span>", "")
    assert "<img" not in body
    assert "<title>0</title>" in drawn
