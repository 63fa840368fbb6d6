"""Prefix-matching scores against patterns read one by one, and what an inert head would have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from workbench.discovery.copying import ordinary_tokens
from workbench.discovery.induction import induction_line, induction_scores
from workbench.errors import InputError

LENGTH = 12


def by_hand(model, count, seed):
    """The same probes, a token and a head at a time, from the patterns of `run_with_cache`."""
    rng, vocabulary = np.random.default_rng(seed), ordinary_tokens(model)
    bos = model.tokenizer.init_kwargs.get("bos_token")
    first = [] if bos is None else [model.tokenizer.bos_token_id]
    scores = np.full((count, model.cfg.n_layers, model.cfg.n_heads), np.nan)
    for probe in range(count):
        tokens = rng.permutation(vocabulary)[:LENGTH].tolist()
        row = first + tokens + tokens
        _, cache = model.run_with_cache(torch.tensor([row]))
        for layer, _ in model.blocks_with("attn"):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            for head in range(pattern.shape[0]):
                weights = []
                for query in range(len(first) + LENGTH, len(row) - 1):
                    before = row.index(row[query])
                    assert before < query
                    weights.append(float(pattern[head, query, before + 1]))
                scores[probe, layer, head] = np.mean(weights)
    return scores


# Grouped queries, learned positions without a first token, and blocks without attention.
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_scores_are_the_weights_of_the_cached_patterns(tiny_model, kind):
    model = tiny_model(kind)
    scores = induction_scores(model, 3, LENGTH, seed=4, progress=False)
    # float32, sums in another order.
    np.testing.assert_allclose(scores.values, by_hand(model, 3, seed=4), atol=1e-6)


def test_batches_change_nothing(testbed_model):
    whole = induction_scores(testbed_model, 5, LENGTH, progress=False)
    single = induction_scores(testbed_model, 5, LENGTH, batch_tokens=1, progress=False)
    np.testing.assert_allclose(whole.values, single.values, atol=1e-6)


def test_a_head_that_looks_everywhere_alike_scores_chance(tiny_model):
    model = tiny_model("llama")
    hooks = [
        (f"blocks.{layer}.attn.hook_pattern", lambda p, hook: (p > 0) / (p > 0).sum(-1, True))
        for layer in range(model.cfg.n_layers)
    ]
    # Hooks see what earlier ones made of an activation.
    with model.hooks(fwd_hooks=hooks):
        scores = induction_scores(model, 2, LENGTH, progress=False)
    assert scores.values == pytest.approx(scores.attrs["chance"], rel=1e-6)
    assert 1 / (2 * LENGTH + 1) < scores.attrs["chance"] < 1 / LENGTH


def test_an_induction_head_scores_one(tiny_model):
    model = tiny_model("llama")

    def perfect(pattern, hook):
        shifted = torch.zeros_like(pattern)
        query = torch.arange(LENGTH + 1, pattern.shape[-1])
        shifted[:, 1, query, query - LENGTH + 1] = 1.0
        return shifted

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", perfect)]):
        scores = induction_scores(model, 2, LENGTH, progress=False)
    # The tokenizer of this model has a first token.
    assert scores[:, 1].values.tolist() == [[0, 1, 0, 0]] * 2


def test_the_seed_draws_the_tokens(testbed_model):
    same = [induction_scores(testbed_model, 2, LENGTH, seed=s, progress=False) for s in (1, 1, 2)]
    assert same[0].equals(same[1]) and not same[0].equals(same[2])


def test_the_row_is_as_long_as_the_model_allows_and_no_longer(tiny_model):
    model = tiny_model("llama")
    most = min(len(ordinary_tokens(model)), 127)  # a context of 256, one of it the first token
    assert induction_scores(model, 1, progress=False).attrs["length"] == min(50, most)
    for count, length in ((0, 5), (1, 1), (1, most + 1)):
        with pytest.raises(InputError, match=f"of 2 to {most} repeated tokens .* got {count} of"):
            induction_scores(model, count, length, progress=False)


def test_the_line_tells_induction_heads_from_heads_at_chance():
    values = np.random.default_rng(0).normal(0.02, 0.004, (16, 2, 3))
    scores = xr.DataArray(values, dims=("probe", "layer", "head"), attrs={"chance": 0.02})
    said = induction_line(scores, 2)
    assert said.startswith("0 of 6 heads look at what came after a token the last time more than")
    assert said.endswith("none of them is shown to be an induction head.")
    scores[:, 1, 2] = 0.8 + 0.01 * values[:, 0, 0]
    said = induction_line(scores, 2)
    assert said.startswith("1 of 6 heads") and "the top 2 score 0.800 (L1H2) to 0.0" in said
    assert said.endswith(".") and "none of them" not in said
