"""The noise floor: how far rounding moves a mean over some examples."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb
from workbench.data.prompts import build_prompts
from workbench.discovery.check import noise
from workbench.discovery.scorer import REFERENCE, Job, Scorer


@pytest.fixture(scope="module")
def rounded(one_thread):
    """64 prompts in bfloat16, and what another arrangement of the sums moves every score by."""
    model = wb.load_model("testbed", device="cpu", dtype="bfloat16")
    # Every third, so that no two stand next to each other behind one profile.
    examples = wb.load_examples("testbed", users=8)[::3]
    prompts = build_prompts(examples, model.tokenizer, model.cfg.n_ctx)
    assert len(prompts) == 64
    job = Job("exact", "replay", 2048)
    found = Scorer(model, job).scores(prompts)[0]
    other = Scorer(model, Job("exact", REFERENCE, 1024)).scores(prompts[::-1])[0].flip(0)
    return model, prompts, job, (found - other).numpy().astype(np.float64)


def test_noise_of_a_mean_falls_with_the_root_of_its_examples(rounded):
    moved = rounded[-1]
    floor = np.quantile(np.abs(moved), 0.95)
    rng = np.random.default_rng(0)
    for n in (4, 16):
        shares = []
        for _ in range(20):
            groups = moved[rng.permutation(64)].reshape(64 // n, n, -1)
            shares.append(np.mean(np.abs(groups.mean(axis=1)) > floor / n**0.5))
        # 5 % if all errors were alike. Some examples are rounded more than others, which makes
        # single scores stand out more often than means; a bias would do the reverse.
        assert 0.003 < np.mean(shares) < 0.08


def test_measured_noise_is_that_of_the_whole_run(rounded):
    model, prompts, job, moved = rounded
    found = noise(model, prompts, job)["p95"]
    # 8 prompts stand for 64 of which some are rounded ten times as much as others.
    assert 0.5 < found / np.quantile(np.abs(moved), 0.95) < 2
