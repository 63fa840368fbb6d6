"""What the explorer does, without a browser: its clicks, and what can go wrong."""

import html
import re
from types import SimpleNamespace

import numpy as np
import pytest

import workbench as wb
from workbench.analysis.head_map import choose_heads, head_map
from workbench.figures.head_map import TRACES
from workbench.lab import long
from workbench.lab.explorer import Explorer
from workbench.lab.scored import Scored
from workbench.steering.contrast import Entropy
from workbench.steering.writing import write_steps


@pytest.fixture(scope="module")
def examples():
    loaded = wb.load_examples("testbed", users=3)
    users = list(dict.fromkeys(e.user for e in loaded))
    return [e for u in users for e in [e for e in loaded if e.user == u][::4]]


@pytest.fixture(scope="module")
def own(testbed_model, examples):
    return wb.score_heads(testbed_model, examples, progress=False)


@pytest.fixture(scope="module")
def stranger(testbed_model, examples):
    return wb.counterfactual_scores(testbed_model, examples, ("stranger",), progress=False)


@pytest.fixture
def explorer(testbed_model, examples, own):
    made = Explorer(testbed_model, examples, own)
    assert made.wait(30)
    yield made
    made.close()


def click(explorer, layer, head):
    explorer._click(None, SimpleNamespace(xs=[head], ys=[layer]), None)


def status(explorer):
    return explorer.controls.status.value


def test_it_begins_with_the_first_example_and_no_heads(explorer, examples, own):
    assert explorer.example == examples[0]
    assert explorer.reading.texts
    assert examples[0].query in explorer.controls.text.value
    assert "no heads" in explorer.controls.change.value
    expected = own.select(users=[examples[0].user]).data["pcs"].mean("example")
    drawn = np.array(explorer.controls.map.data[0].z, dtype=float)
    np.testing.assert_allclose(drawn, expected, atol=1e-6)


def test_a_click_takes_a_head_in_and_a_second_one_out(explorer, testbed_model):
    click(explorer, 0, 7)
    click(explorer, 2, 6)
    assert explorer.heads == wb.HeadSet.parse("L0H7, L2H6")
    assert explorer.controls.heads.value == "L0H7, L2H6"
    assert explorer.wait(30)
    frame = explorer.controls.map.data[TRACES.index("chosen")]
    assert list(zip(frame.y, frame.x, strict=True)) == [(0, 7), (2, 6)]
    expected = wb.token_change(testbed_model, explorer.example, explorer.heads)
    shown = explorer.reading.token_change()
    np.testing.assert_allclose(shown["ablated"], expected["ablated"], atol=1e-5)
    assert 'data-heads="L0H7, L2H6"' in explorer.controls.change.value
    # The head that was clicked last is the one whose attention is drawn.
    assert explorer.controls.attending.value == "L2H6"
    assert explorer.controls.attention.properties["labels"] == ["L2H6"]
    click(explorer, 0, 7)
    assert explorer.heads == wb.HeadSet.parse("L2H6")


def test_the_panels_show_what_the_functions_give(explorer, testbed_model):
    explorer.choose("L0H7, L1H1")
    explorer.controls.gamma.value = 1.5
    assert explorer.wait(30)
    contrast = wb.DPS(explorer.heads, 1.5)
    assert explorer.contrast == contrast
    one = explorer.example
    table = wb.next_tokens(testbed_model, one, explorer.heads, contrast, k=8)
    assert wb.figures.next_tokens(table) == explorer.controls.next.value
    explorer.controls.view.value = "steered"
    change = wb.token_change(testbed_model, one, explorer.heads, contrast)
    assert wb.figures.token_change(change, "steered") == explorer.controls.change.value


def test_the_code_makes_the_same_of_the_same(explorer, testbed_model, examples):
    explorer.choose("L0H7, L1H1")
    see = explorer.controls
    see.contrast.value, see.gamma.value = "DPS + CAD", 1.3
    see.strength.value, see.plausible.value, see.max_kl.value = "times the entropy", 0.1, 0.5
    names = ran(explorer, {"examples": examples, "model": testbed_model})
    assert names["heads"] == explorer.heads
    assert names["example"] == explorer.example
    limits = {"plausible": 0.1, "max_kl": 0.5}
    heads, strength = explorer.heads, Entropy(1.3)
    expected = wb.DPS(heads, strength, **limits) + wb.CAD(strength, **limits)
    assert names["contrast"] == explorer.contrast == expected


def test_the_code_gives_what_is_shown_with_other_prompts_too(testbed_model, examples):
    settings = wb.PromptSettings(items=1)
    scores = wb.score_heads(testbed_model, examples[:4], prompt=settings, progress=False)
    made = Explorer(testbed_model, examples[:4], scores)
    made.choose("L0H7, L0H5")
    made.controls.gamma.value, made.controls.tokens.value = 2.0, 5
    made.work.write()
    assert made.wait(60)
    names = ran(made, {"examples": examples, "model": testbed_model})
    assert names["results"][0].equals(made.reading.token_change())
    assert names["results"][1].steered.tokens == made.pair.steered.tokens
    assert names["results"][1].max_new_tokens == 5
    made.close()


def ran(explorer, names):
    """The code that an explorer shows, run as a user would run it."""
    code = html.unescape(re.sub("<[^>]+>", "", explorer.controls.code.value))
    names |= {"wb": wb, "results": []}
    for line in code.splitlines():
        kept = f"results.append({line})" if line.startswith("wb.") else line
        exec(kept, names)  # noqa: S102 - what a user would paste
    return names


@pytest.mark.parametrize("name", ["DPS", "CAD", "DPS + CAD", "DoLa"])
def test_every_contrast_answers(explorer, name):
    explorer.choose("L0H7")
    explorer.controls.contrast.value = name
    assert explorer.wait(30)
    assert explorer.reading.contrast == explorer.contrast
    assert status(explorer).count("error") == 0


def test_presets_and_k(explorer):
    table = head_map(explorer.scored.parts["PCS"], "user", explorer.example.user)
    explorer._preset("top K")
    assert explorer.heads == choose_heads("top", table, 8)
    explorer.controls.k.value = 3
    assert explorer.heads == choose_heads("top", table, 3)
    explorer._preset("random")
    first = explorer.heads
    assert sorted(h.layer for h in first) == sorted(h.layer for h in choose_heads("top", table, 3))
    draws = set()
    for _ in range(6):
        explorer._preset("random")
        draws.add(explorer.heads)
    assert len(draws) > 1
    # Another map, another top K; a set made by hand stays as it is.
    explorer._preset("top K")
    explorer.controls.of.value = "everyone"
    everyone = head_map(explorer.scored.parts["PCS"])
    assert explorer.heads == choose_heads("top", everyone, 3)
    explorer.choose("L1H1")
    explorer.controls.of.value = "this user"
    explorer.controls.k.value = 5
    assert explorer.heads == wb.HeadSet.parse("L1H1")
    explorer._preset("top K")
    click(explorer, 1, 1)
    changed = explorer.heads
    explorer.controls.k.value = 4
    assert explorer.heads == changed
    explorer._preset("none")
    assert len(explorer.heads) == 0


def test_capability_heads_are_scored_when_they_are_first_asked_for(explorer, monkeypatch):
    asked = []
    few = wb.neutral_examples("testbed", 4)
    monkeypatch.setattr(long, "neutral_examples", lambda source: asked.append(source) or few)
    explorer._preset("capability")
    assert explorer.controls.write.disabled
    assert explorer.wait(60)
    assert asked == ["testbed"]
    neutral = explorer.scored.neutral
    assert explorer.heads == neutral.top(8, "all")["all"]
    assert not explorer.controls.write.disabled
    explorer._preset("none")
    explorer._preset("capability")
    assert len(asked) == 1


def test_a_part_of_the_neutral_text_chooses_no_heads(explorer, monkeypatch):
    few = wb.neutral_examples("testbed", 4)
    monkeypatch.setattr(long, "neutral_examples", lambda _source: few)
    real = long.score_in_parts

    def stopped(model, chosen, **options):
        yield next(real(model, chosen, size=2, **options))
        raise RuntimeError("gone")

    monkeypatch.setattr(long, "score_in_parts", stopped)
    explorer._preset("capability")
    assert explorer.wait(60)
    assert explorer.scored.neutral is None
    assert len(explorer.heads) == 0


def test_the_text_field_refuses_other_models_heads_and_keeps_the_set(explorer, tmp_path):
    explorer.choose("L0H7")
    for typed, said in (
        ("L9H9", "was the head set made for another model?"),
        ("heads", "a head is written like L9H6"),
        ("L1H1, L1H1", "names a head once"),
        (str(tmp_path / "none.json"), "none.json"),
    ):
        explorer.controls.heads.value = typed
        assert said in status(explorer)
        assert explorer.controls.heads.value == "L0H7"
        assert explorer.heads == wb.HeadSet.parse("L0H7")
    explorer.controls.heads.value = "3-1 L2H2"
    assert explorer.heads == wb.HeadSet.parse("L3H1, L2H2")


def test_the_set_goes_out_and_comes_in_as_a_file(explorer, tmp_path):
    explorer.choose("L0H7, L1H1")
    explorer.controls.path.value = str(tmp_path / "set.json")
    explorer._save()
    assert wb.HeadSet.load(tmp_path / "set.json") == explorer.heads
    explorer._preset("none")
    explorer.controls.heads.value = str(tmp_path / "set.json")
    assert explorer.heads == wb.HeadSet.parse("L0H7, L1H1")
    (tmp_path / "thesis.ipynb").write_text("{}")
    explorer.controls.path.value = str(tmp_path / "thesis.ipynb")
    explorer._save()
    assert "not a head set" in status(explorer)
    assert (tmp_path / "thesis.ipynb").read_text() == "{}"
    explorer.controls.path.value = str(tmp_path / "missing" / "set.json")
    explorer._save()
    assert "can&#x27;t be written" in status(explorer)


def test_writing_shows_both_texts_and_ends(explorer, testbed_model):
    explorer.choose("L0H7, L0H5")
    explorer.controls.user.value = explorer.users and list(explorer.users)[1]
    explorer.controls.gamma.value = 3.0
    explorer.controls.tokens.value = 10
    explorer.work.write()
    assert explorer.wait(60)
    expected = wb.write(testbed_model, explorer.example, explorer.contrast, max_new_tokens=10)
    assert explorer.pair.steered.tokens == expected.steered.tokens
    assert explorer.pair.plain.text.split()[0] in explorer.controls.written.value
    assert explorer.controls.progress.value == 1
    assert "writing: done" in status(explorer)
    assert not explorer.controls.write.disabled


def test_clicks_while_it_writes_are_answered_and_a_second_writing_is_refused(explorer, monkeypatch):
    import threading

    begun, go = threading.Event(), threading.Event()

    def slowly(*args, **options):
        for pair in write_steps(*args, **options):
            yield pair
            begun.set()
            go.wait(10)

    monkeypatch.setattr(long, "write_steps", slowly)
    explorer.work.write()
    assert begun.wait(10)
    explorer.work.write()
    assert "going on already" in status(explorer)
    click(explorer, 1, 1)
    assert explorer.heads == wb.HeadSet.parse("L1H1")
    go.set()
    assert explorer.wait(30)
    assert 'data-heads="L1H1"' in explorer.controls.change.value
    assert "writing: done" in status(explorer)


def test_cancelling_keeps_what_is_written(explorer, monkeypatch):
    import threading

    begun, go = threading.Event(), threading.Event()

    def endless(*args, **options):
        pair = next(write_steps(*args, **options))
        while True:
            begun.set()
            go.wait(10)
            yield pair

    monkeypatch.setattr(long, "write_steps", endless)
    explorer.work.write()
    assert begun.wait(10)
    assert not explorer.controls.cancel.disabled
    explorer.controls.cancel.click()
    go.set()
    assert explorer.wait(30)
    assert "writing: cancelled" in status(explorer)
    assert explorer.pair is not None
    assert not explorer.controls.write.disabled


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), KeyError("gone")])
def test_a_model_that_dies_while_it_writes_is_told_and_the_rest_goes_on(
    explorer, monkeypatch, error
):
    def dies(*_args, **_options):
        raise error
        yield

    with monkeypatch.context() as patched:
        patched.setattr(long, "write_steps", dies)
        explorer.work.write()
        assert explorer.wait(30)
    assert "writing failed" in status(explorer)
    assert type(error).__name__ in status(explorer)
    click(explorer, 0, 0)
    assert explorer.wait(30)
    assert 'data-heads="L0H0"' in explorer.controls.change.value
    explorer.work.write()
    assert explorer.wait(30)
    assert "writing: done" in status(explorer)


def test_a_bug_under_a_click_is_told_and_not_swallowed(explorer, monkeypatch):
    monkeypatch.setattr(explorer, "_frame", lambda: 1 / 0)
    click(explorer, 0, 0)
    assert "ZeroDivisionError" in status(explorer)


def test_panels_are_empty_until_they_are_about_the_example_that_is_looked_at(
    explorer, examples, monkeypatch
):
    explorer.choose("L0H7")
    assert explorer.wait(30)
    assert explorer.controls.attention.properties
    monkeypatch.setattr(explorer.work.worker, "ask", lambda _question: None)
    explorer.controls.example.value = [e for e in examples if e.user == explorer.example.user][1]
    see = explorer.controls
    assert (see.change.value, see.next.value, see.attention.properties) == ("", "", {})


def test_mean_ablation_is_told_from_removal(testbed_model, examples, own):
    settings = {**own.manifest["settings"], "ablation": "mean"}
    mean = wb.HeadScores(own.data, {**own.manifest, "settings": settings})
    made = Explorer(testbed_model, examples, mean)
    assert "the map is of mean ablation" in status(made)
    made.close()


def test_a_model_that_dies_under_a_click_is_told(explorer, monkeypatch):
    def dies(*_args, **_options):
        raise RuntimeError("the GPU <fell> off")

    monkeypatch.setattr("workbench.lab.explorer.read_target", dies)
    click(explorer, 0, 0)
    assert explorer.wait(30)
    assert "the GPU &lt;fell&gt; off" in status(explorer)


def test_an_example_longer_than_the_context_is_shown_and_named(testbed_model, examples, own):
    from dataclasses import replace

    long_one = replace(examples[0], id="long", query="word " * 4000)
    made = Explorer(testbed_model, [*examples, long_one], own)
    made.controls.example.value = long_one
    assert "/long: the prompt takes" in status(made)
    assert "word word" in made.controls.text.value
    made.controls.example.value = examples[0]
    assert made.wait(30)
    assert made.reading.prompt.example == examples[0]
    # Nor does a click on it pretend that an older answer is about it.
    made.controls.example.value = long_one
    click(made, 0, 0)
    assert made.wait(30)
    assert made.reading is None
    assert made.controls.change.value == ""
    made.close()


def test_an_answer_about_an_example_that_was_left_is_not_shown(explorer, examples, monkeypatch):
    import threading

    from workbench.lab import explorer as module

    begun, go, real = threading.Event(), threading.Event(), module.read_target

    def slowly(model, example, *args, **options):
        begun.set()
        go.wait(10)
        return real(model, example, *args, **options)

    monkeypatch.setattr(module, "read_target", slowly)
    click(explorer, 0, 0)
    assert begun.wait(10)
    explorer.example, explorer.reading = examples[1], None
    go.set()
    assert explorer.wait(30)
    assert explorer.reading is None


def test_without_scores_it_scores_in_the_background_and_keeps_them(
    testbed_model, examples, tmp_path
):
    folder = tmp_path / "run"
    made = Explorer(testbed_model, examples[:4], folder)
    assert made.controls.map.data[TRACES.index("unscored")].z[0][0] == 1
    assert made.controls.score.layout.display != "none"
    assert repr(made) == "Explorer(1 users, 4 examples, 32 heads)"
    made._preset("top K")
    assert "score the examples first" in status(made)
    click(made, 1, 2)
    assert made.heads == wb.HeadSet.parse("L1H2")
    made.work.score()
    assert made.wait(60)
    assert made.controls.score.layout.display == "none"
    assert "kept in" in status(made)
    kept = wb.HeadScores.load(folder)
    assert len(kept.data["example"]) == 4
    drawn = np.array(made.controls.map.data[0].z, dtype=float)
    assert np.isfinite(drawn).all()
    made.close()
    again = Explorer(testbed_model, examples[:4], folder)
    np.testing.assert_allclose(np.array(again.controls.map.data[0].z, dtype=float), drawn)
    again.close()


def test_scoring_that_was_cancelled_is_kept_and_gone_on_with(
    testbed_model, examples, own, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    made = Explorer(testbed_model, examples[:6], folder)
    real = long.score_in_parts

    def first_part_only(model, chosen, **options):
        yield next(real(model, chosen, size=4, **options))
        raise KeyError("power cut")

    monkeypatch.setattr(long, "score_in_parts", first_part_only)
    made.work.score()
    assert made.wait(60)
    assert len(wb.HeadScores.load(folder).data["example"]) == 4
    assert made.controls.score.layout.display != "none"
    made.close()
    asked = []

    def watched(model, chosen, **options):
        asked.append(len(chosen))
        return real(model, chosen, **options)

    monkeypatch.setattr(long, "score_in_parts", watched)
    again = Explorer(testbed_model, examples[:6], folder)
    again.work.score()
    assert again.wait(60)
    assert asked == [2]
    kept = wb.HeadScores.load(folder)
    assert kept.data["example"].values.tolist() == [e.name for e in examples[:6]]
    expected = own.data["pcs"].sel(example=kept.data["example"])
    np.testing.assert_allclose(kept.data["pcs"], expected, atol=1e-5)
    assert again.controls.score.layout.display == "none"
    again.close()


def test_the_specific_part_is_shown_where_another_profile_was_scored(
    testbed_model, examples, own, stranger
):
    made = Explorer(testbed_model, examples, {"own": own, **stranger})
    assert made.controls.part.options == ("PCS", "own - stranger")
    made.controls.part.value = "own - stranger"
    user = examples[0].user
    pcs = own.data["pcs"] - stranger["stranger"].data["pcs"].sel(example=own.data["example"])
    expected = pcs.values[own.data["user"].values == user].mean(axis=0)
    drawn = np.array(made.controls.map.data[0].z, dtype=float)
    np.testing.assert_allclose(drawn, expected, atol=1e-6)
    assert "own - stranger" in made.controls.title.value
    made.close()


def test_clusters_are_offered_where_there_are_some(testbed_model, examples, own):
    users = list(dict.fromkeys(e.user for e in examples))
    clustered = own.assign_clusters({user: i % 2 for i, user in enumerate(users)})
    made = Explorer(testbed_model, examples, clustered)
    made.controls.of.value = "cluster"
    assert made.table.attrs["group"] == "0"
    assert int(made.table["users"]) == 2
    made.close()
    plain = Explorer(testbed_model, examples, own)
    assert "cluster" not in plain.controls.of.options
    plain.close()


def test_a_user_without_scores_gets_everyones_map_and_a_line(testbed_model, examples, own):
    users = list(dict.fromkeys(e.user for e in examples))
    made = Explorer(testbed_model, examples, own.select(users=users[1:]))
    assert f"{users[0]} is not among the scored users" in status(made)
    assert int(made.table["users"]) == len(users) - 1
    made.close()
    again = Explorer(testbed_model, examples, own.select(users=users[1:]))
    again._preset("top K")
    again.controls.of.value = "everyone"
    again.controls.of.value = "this user"
    assert f"{users[0]} is not among the scored users" in status(again)
    again.close()


def test_a_folder_of_a_probe_brings_its_controls(testbed_model, examples, own, stranger, tmp_path):
    own.save(tmp_path)
    stranger["stranger"].save(tmp_path / "runs" / "counterfactual-1234" / "stranger")
    neutral = wb.score_heads(testbed_model, wb.neutral_examples("testbed", 4), progress=False)
    neutral.save(tmp_path / "runs" / "neutral-5678")
    # Scores of another prompt lie there too; they are named and not taken.
    (tmp_path / "runs" / "counterfactual-9999" / "none").mkdir(parents=True)
    (tmp_path / "runs" / "counterfactual-9999" / "none" / "manifest.json").write_text("{}")
    found = Scored.of(tmp_path, testbed_model)
    assert list(found.parts) == ["PCS", "own - stranger"]
    assert found.neutral.data["pcs"].equals(neutral.data["pcs"])
    assert len(found.notes) == 1
    assert "counterfactual-9999" in found.notes[0]


def test_other_models_scores_and_prompts_are_refused(testbed_model, examples, own, tiny_model):
    with pytest.raises(wb.InputError, match="this is another model"):
        Explorer(tiny_model("llama"), examples, own)
    anonymous = wb.HeadScores(own.data, {})
    with pytest.raises(wb.InputError, match="heads by layer"):
        Explorer(tiny_model("llama"), examples, anonymous)
    with pytest.raises(wb.InputError, match="other prompt settings"):
        Explorer(testbed_model, examples, own, prompt=wb.PromptSettings(items=1))
    with pytest.raises(wb.InputError, match="own must be there"):
        Explorer(testbed_model, examples, {"stranger": own})
    with pytest.raises(wb.InputError, match="no example"):
        Explorer(testbed_model, [])


def test_a_cut_that_rules_a_target_token_out_is_shown(explorer, examples):
    see = explorer.controls
    see.view.value, see.plausible.value = "steered", 0.9
    explorer.choose("L0H7, L0H5")
    shown = 0
    for example in explorer.users[explorer.example.user]:
        see.example.value = example
        assert explorer.wait(30)
        assert "failed" not in status(explorer)
        assert f"{example.name}: DPS γ=0.5, plausible 0.9" in see.change.value
        shown += "cut</small>" in see.change.value
    assert shown


def test_closing_lets_go_of_the_model(testbed_model, examples, own):
    made = Explorer(testbed_model, examples, own)
    made.choose("L0H1")
    made.close()
    assert made.wait(5)
    assert not hasattr(made, "model")


def test_without_a_kernel_the_functions_are_named(testbed_model, examples):
    with pytest.raises(wb.InputError, match=r"needs a Jupyter kernel.*token_change"):
        wb.explore(testbed_model, examples)
