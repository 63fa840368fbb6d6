"""`workbench steer` with every contrast, streamed, and on texts of one's own."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from workbench.cli.commands import app
from workbench.errors import InputError

HEADS = ("--heads", "L0H3,L1H6,L2H1")
SHORT = ("--limit", "1", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def call():
    os.environ.setdefault("COLUMNS", "80")
    runner = CliRunner()

    def run(*arguments):
        done = runner.invoke(app, ["steer", *map(str, arguments)])
        if isinstance(done.exception, InputError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "lily.txt"
    path.write_text("a quiet tale\n\nlisten fresh news\r\n\r\na dark tale about a cowboy\n")
    return path


def answers(text):
    return json.loads(text)["answers"]


@pytest.mark.parametrize(
    ("contrast", "title"),
    [
        ("dps", "DPS, γ = 2"),
        ("cad", "CAD, γ = 1"),
        ("dola", "DoLa, low"),
        ("dps+cad+dola", "DPS, γ = 2 + CAD, γ = 1 + DoLa, low"),
    ],
)
def test_each_contrast_moves_the_model_and_is_named(call, contrast, title):
    found = call(
        *HEADS, *SHORT, "--json", "--contrast", contrast, "--gamma", "2", "--cad-gamma", "1"
    )
    assert json.loads(found)["contrast"] == title
    assert all(answer["kl"] > 0 for answer in answers(found))


def test_limits_hold_for_the_whole_contrast(call):
    strong = ("--contrast", "dps+cad", "--gamma", "4", "--json", *HEADS, *SHORT)
    free = answers(call(*strong))[0]["kl"]
    (bound,) = answers(call(*strong, "--max-kl", "0.0001"))
    steps = 8 + 1
    assert 0 < bound["kl"] <= 0.0001 * steps * 1.01 < free


def test_entropy_is_a_strength_with_a_cap(call):
    loose = answers(call(*HEADS, *SHORT, "--json", "--gamma", "entropy"))[0]
    tight = answers(call(*HEADS, *SHORT, "--json", "--gamma", "entropy", "--cap", "0.01"))[0]
    assert 0 < tight["kl"] < loose["kl"]
    shown = call(*HEADS, *SHORT, "--gamma", "entropy-share", "--cap", "0.5")
    assert "DPS, γ = min(H/lnV, 0.5)" in shown


def test_a_shared_prefill_is_another_method_and_says_so(call):
    strong = (*HEADS, *SHORT, "--gamma", "4")
    masked = answers(call(*strong, "--json"))[0]
    shared = answers(call(*strong, "--json", "--prefill", "shared"))[0]
    assert masked["kl"] != shared["kl"]
    assert "shared prefill" in call(*strong, "--prefill", "shared")


def test_decore_takes_a_file_of_heads(call, tmp_path):
    (tmp_path / "copying.json").write_text(
        '{"format": "workbench.heads/1", "ties": 0, "heads": ["L1H7"]}'
    )
    found = call(
        *SHORT, "--json", "--contrast", "decore", "--retrieval-heads", tmp_path / "copying.json"
    )
    assert json.loads(found)["contrast"] == "DeCoRe"
    assert answers(found)[0]["kl"] > 0


def test_streamed_text_is_the_text(call):
    options = (*HEADS, "--limit", "2", "--max-new-tokens", "12", "--user", "discovery-003")
    whole = answers(call(*options, "--json", "--gamma", "2"))
    shown = call(*options, "--stream", "--gamma", "2")
    for answer in whole:
        assert f"query {answer['query']}" in shown
        for title, name in (("plain", "plain"), ("DPS, γ = 2", "steered")):
            assert f"{title}\n{answer[name]}\n(" in shown
    assert "moved by" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_profile_of_ones_own_is_three_items_and_a_query(call, story):
    from workbench.cli.steer import _own
    from workbench.data.prompts import build_prompts
    from workbench.models import context_length, load_model

    own = _own(story, "a tale about")
    assert [item["text"] for item in own.profile] == [
        "a quiet tale",
        "listen fresh news",
        "a dark tale about a cowboy",
    ]
    assert own.user == "lily"
    model = load_model()
    (prompt,) = build_prompts([own], model.tokenizer, context_length(model), new_tokens=4)
    words = model.tokenizer.decode(prompt.ids, skip_special_tokens=True).split()
    assert " ".join(words).endswith(
        "tale listen fresh news a dark tale about a cowboy a tale about"
    )
    shown = call("--profile", story, "--query", "a tale about", *HEADS, *SHORT, "--stream")
    assert "text/1" in shown
    assert "user wrote" not in shown, "nobody has"


BAD = {
    "gamma": (["--gamma", "x"], "gamma is a number, entropy or entropy-share, got 'x'"),
    "negative": (["--gamma", "-1"], "gamma must be >= 0"),
    "cap of a number": (["--cap", "1"], "--cap limits the strength of --gamma entropy"),
    "contrast": (["--contrast", "magic"], "wanted one or several of dps, cad, dola, decore"),
    "twice": (["--contrast", "dps+dps"], "wanted one or several of"),
    "prefill": (["--prefill", "half"], "prefill must be masked or shared, got 'half'"),
    "no list": (["--contrast", "decore"], "DeCoRe needs --retrieval-heads FILE"),
    "layers": (["--contrast", "dola", "--layers", "top"], "layers are low, high or numbers"),
    "outside": (["--contrast", "dola", "--layers", "9"], "wanted layers between 0 and 3, got 9"),
    "cut": (["--plausible", "1"], "plausible must be in"),
    "limit": (["--max-kl", "-1"], "max_kl must be >= 0 nats"),
    "query alone": (["--query", "a tale"], "--profile FILE and --query TEXT go together"),
    "no file": (["--profile", "nowhere.txt", "--query", "a"], "nowhere.txt: no such file"),
    "two forms": (["--stream", "--json"], "--stream prints text as it comes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_in_a_line(call, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = BAD[name]
    with pytest.raises(InputError, match=r"^[^\n]*$") as caught:
        call(*HEADS, *SHORT, *options)
    assert message in str(caught.value)


def test_an_empty_profile_or_query_is_refused(call, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n \n")
    with pytest.raises(InputError, match=r"empty\.txt: holds no text"):
        call("--profile", tmp_path / "empty.txt", "--query", "a", *HEADS)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"latin\.txt: can't be read as UTF-8"):
        call("--profile", tmp_path / "latin.txt", "--query", "a", *HEADS)
    (tmp_path / "full.txt").write_text("a tale")
    with pytest.raises(InputError, match="--query is empty"):
        call("--profile", tmp_path / "full.txt", "--query", " ", *HEADS)
