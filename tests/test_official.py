"""The authors' published score files: read, held against each other, written, and compared."""

from __future__ import annotations

import csv
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr
from test_figures import make_scores

from workbench import tables
from workbench.analysis.official import lines, official_overlap
from workbench.data.official import Official, OfficialGroup, read_official, write_official
from workbench.errors import InputError
from workbench.heads import Head, HeadSet, jaccard, read_head_scores, top_k
from workbench.scores import HeadScores

GRID = np.array([[0.5, 0.25, 0.25, -0.125], [0.25, 0.0, -0.5, 0.0625]])


def write_group(folder, each, k, model="Llama", task="LaMP-1", pcs=True):
    """A group's files as the authors write them, by hand: each is [example][layer][head]."""
    folder.mkdir(parents=True)
    layers, heads = len(each[0]), len(each[0][0])
    mean = {
        (layer, head): sum(one[layer][head] for one in each) / len(each)
        for layer in range(layers)
        for head in range(heads)
    }
    order = sorted(mean, key=lambda place: -mean[place])
    ranked = [
        {"layer": layer, "head": head, "avg_pcs": mean[layer, head], "rank": n}
        for n, (layer, head) in enumerate(order, 1)
    ]
    files = {
        "ranked": {"model": model, "task": task, "num_samples": len(each), "ranked_heads": ranked},
        "top_heads": {
            "num_heads_selected": k,
            "preference_heads": [list(place) for place in order[:k]],
        },
        "pcs": {f"{la}-{h}": [one[la][h] for one in each] for la, h in mean},
    }
    if not pcs:
        del files["pcs"]
    for name, value in files.items():
        (folder / f"{model}_LaMP_1_{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def folder(tmp_path):
    """One task with a group of one example, one of two, and the global one."""
    one, two = GRID.tolist(), (GRID / 2).tolist()
    write_group(tmp_path / "LaMP-1" / "k2", [one, two], 3)
    write_group(tmp_path / "LaMP-1" / "k1", [one], 3)
    write_group(tmp_path / "LaMP-1" / "global", [two, one, two], 3, pcs=False)
    return tmp_path


def change(folder, group, kind, edit):
    """Change a file of a group in place."""
    (path,) = (folder / "LaMP-1" / group).glob(f"*_{kind}.json")
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    return path


def test_groups_are_read_as_they_were_written(folder):
    groups = read_official(folder).tasks["LaMP-1"]
    assert list(groups) == ["global", "k1", "k2"]
    assert [g.examples for g in groups.values()] == [3, 1, 2]
    assert groups["global"].scores is None
    assert np.array_equal(groups["k2"].scores, [GRID, GRID / 2])
    assert np.array_equal(groups["k2"].mean, GRID * 0.75)
    # L0H1, L0H2 and L1H0 have the same score; one of them is shut out.
    assert groups["k1"].top == HeadSet((Head(0, 0), Head(0, 1), Head(0, 2)))
    assert groups["k1"].top.ties == 1


def test_what_a_mac_leaves_on_foreign_disks_is_no_score_file(folder):
    (folder / "LaMP-1" / "k1" / "._Llama_LaMP_1_ranked.json").write_bytes(b"\0")
    (folder / ".cache" / "k1").mkdir(parents=True)
    (folder / "LaMP-1" / "plots").mkdir()
    assert list(read_official(folder).tasks["LaMP-1"]) == ["global", "k1", "k2"]


def test_several_tasks_are_read(folder):
    write_group(folder / "LaMP-4" / "k1", [GRID.tolist()], 2, model="Other")
    assert list(read_official(folder).tasks) == ["LaMP-1", "LaMP-4"]


def edited(key, value):
    return lambda file: file.update({key: value})


def of_entry(index, **values):
    return lambda file: file["ranked_heads"][index].update(values)


@pytest.mark.parametrize(
    ("kind", "edit", "words"),
    [
        ("ranked", lambda f: f["ranked_heads"].pop(), "1 of 8 heads are missing: L1H2"),
        ("ranked", lambda f: f["ranked_heads"].pop(3), r"entry 4 \(L1H3, rank 5"),
        ("ranked", of_entry(1, layer=0, head=0), "entry 2: L0H0 is there twice"),
        ("ranked", of_entry(2, avg_pcs=0.4), r"entry 3 .* is out of order"),
        ("ranked", of_entry(2, avg_pcs="0.4"), "entry 3: wanted layer, head, rank and a finite"),
        ("ranked", of_entry(2, avg_pcs=float("nan")), "entry 3: wanted layer"),
        ("ranked", of_entry(2, layer=-1), "entry 3: wanted layer"),
        ("ranked", lambda f: f["ranked_heads"][5].pop("head"), "entry 6: wanted layer"),
        ("ranked", edited("num_samples", 0), "`num_samples` must be 1 or more, got 0"),
        ("ranked", edited("ranked_heads", []), "wanted a `ranked_heads` list"),
        ("ranked", edited("heads_per_layer", "8"), "`heads_per_layer` must be a list"),
        ("ranked", edited("heads_per_layer", [4, 5]), "1 of 9 heads are missing: L1H4"),
        ("ranked", edited("heads_per_layer", [4, 3]), "heads beyond its own"),
        ("top_heads", edited("preference_heads", [[0, 0], [0, 0], [0, 1]]), "L0H0 twice"),
        ("top_heads", edited("preference_heads", [[0, 0], [0, 1]]), "3 heads are announced and 2"),
        ("top_heads", edited("preference_heads", [[0, 0], [0, 1], [1, 1]]), "L1H1 is selected"),
        ("top_heads", edited("preference_heads", [[0, 0], [0, 1], [9, 1]]), "L9H1 is not in the"),
        ("pcs", lambda f: f.pop("1-2"), "entry '1-2' is missing, and the ranked file says -0.5"),
        ("pcs", edited("1-2", [0.0]), "entry '1-2' has mean 0, and the ranked file says -0.5"),
        ("pcs", edited("1-2", [-0.5, -0.5]), "entry '1-2': wanted 1 finite scores, one an example"),
        ("pcs", edited("1-2", [None]), "entry '1-2': wanted 1 finite"),
        ("pcs", edited("2-0", [0.0]), "entry '2-0': L2H0 is not in the ranked file"),
        ("pcs", edited("L0H0", [0.5]), "entry 'L0H0': L0H0 is there twice"),
        ("pcs", edited("zero", [0.5]), "entry 'zero': a head is written like"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_entry(folder, kind, edit, words):
    path = change(folder, "k1", kind, edit)
    with pytest.raises(InputError, match=words) as caught:
        read_official(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["ranked", "top_heads", "pcs"])
def test_a_truncated_file_is_refused_with_its_line(folder, kind):
    (path,) = (folder / "LaMP-1" / "k2").glob(f"*_{kind}.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=rf"{kind}\.json: malformed JSON at line 1"):
        read_official(folder)


@pytest.mark.parametrize("kind", ["ranked", "top_heads"])
def test_a_group_without_its_files_is_refused(folder, kind):
    (path,) = (folder / "LaMP-1" / "k2").glob(f"*_{kind}.json")
    path.unlink()
    with pytest.raises(InputError, match=rf"k2: has no \*_{kind}\.json; fetch the file"):
        read_official(folder)


def test_folders_that_hold_no_group_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_official(tmp_path / "gone")
    with pytest.raises(InputError, match=r"give the folder above TASK/GROUP"):
        read_official(folder / "LaMP-1")


def test_groups_of_two_models_are_refused(folder):
    write_group(folder / "LaMP-1" / "k3", [GRID[:, :2].tolist()], 2)
    with pytest.raises(InputError, match="k3: scores of Llama with 4 heads, and those of global"):
        read_official(folder)


def test_a_group_with_two_rankings_is_refused(folder):
    (path,) = (folder / "LaMP-1" / "k1").glob("*_ranked.json")
    path.with_name("Other_ranked.json").write_text(path.read_text())
    with pytest.raises(InputError, match="k1: a group has one"):
        read_official(folder)


# Written


@pytest.fixture
def scores():
    """Two tasks; the users' names are no file names."""
    rng = np.random.default_rng(3)
    users = ["../x", "../x", ".hidden", "Ünal & <b>"] * 2
    return make_scores(rng.normal(size=(8, 2, 4)), users, ["LaMP-1", "LaMP-4"] * 4)


def test_written_scores_are_read_back(scores, tmp_path):
    paths = write_official(scores, tmp_path, 3)
    assert len(paths) == 6
    tasks = read_official(tmp_path).tasks
    assert list(tasks) == ["LaMP-1", "LaMP-4"]
    for task, rows in scores.groups("task").items():
        group = tasks[task]["global"]
        pcs = scores.data["pcs"].values[rows].astype(float)
        assert np.array_equal(group.scores, pcs)
        assert np.array_equal(group.mean, pcs.mean(axis=0))
        assert group.top == scores.top(3, "task")[task]
        assert group.examples == 4


def test_written_files_are_read_by_the_readers_of_single_files(scores, tmp_path):
    paths = {path.name: path for path in write_official(scores, tmp_path, 3, by="all")}
    assert HeadSet.load(paths["unnamed_all_top_heads.json"]) == scores.top(3, "all")["all"]
    means = read_head_scores(paths["unnamed_all_pcs.json"], [4, 4])
    assert np.allclose(means, scores.data["pcs"].values.mean(axis=0), atol=1e-6)


def test_users_names_stay_inside_the_folder_and_come_back(scores, tmp_path):
    inside = tmp_path / "out"
    paths = write_official(scores, inside, 3, by="user")
    assert all(inside.resolve() in path.resolve().parents for path in paths)
    tasks = read_official(inside).tasks
    assert {name: g.examples for name, g in tasks["LaMP-1"].items()} == {"../x": 2, ".hidden": 2}
    assert {name: g.examples for name, g in tasks["LaMP-4"].items()} == {"../x": 2, "Ünal & <b>": 2}


def test_layers_may_differ_in_heads(tmp_path):
    pcs = np.random.default_rng(0).normal(size=(3, 3, 4))
    pcs[:, 1, 2:], pcs[:, 2] = np.nan, np.nan
    pcs[:, 2, 0] = 0.0
    scores = make_scores(pcs, ["a", "b", "c"], ["t"] * 3)
    write_official(scores, tmp_path, 7)
    group = read_official(tmp_path).tasks["t"]["global"]
    assert np.array_equal(group.scores, pcs.astype(np.float32), equal_nan=True)
    table = official_overlap(read_official(tmp_path), "t")
    assert table.attrs["heads"] == 7
    assert table.attrs["chance"] == 1.0


def test_what_has_not_all_scores_is_not_written(scores, tmp_path):
    for broken in (np.full((8, 2, 4), np.nan), scores.data["pcs"].values.copy()):
        broken[2, 1, 1] = np.nan
        with pytest.raises(InputError, match="scores are missing"):
            write_official(make_scores(broken, ["a"] * 8), tmp_path, 2)
    screened = HeadScores(scores.data, {"settings": {"screen": {"k": 2, "by": "task"}}})
    with pytest.raises(InputError, match="these were screened"):
        write_official(screened, tmp_path, 2)
    with pytest.raises(InputError, match="K must be between 1 and 8"):
        write_official(scores, tmp_path, 9)
    assert not list(tmp_path.glob("*/*/*"))


# Compared


def group_of(name, mean, k, scores=None, examples=1):
    mean = np.asarray(mean, dtype=float)
    each = None if scores is None else np.asarray(scores, dtype=float)
    return OfficialGroup(name, "m", examples, mean, top_k(mean, k), each)


def overlap_of(*groups):
    return official_overlap(Official({"t": {g.name: g for g in groups}}), "t")


def test_a_table_worked_by_hand():
    half = [[1, 0.5], [0.5, 0.5]]
    table = overlap_of(
        group_of("a", half, 2, scores=[half]),
        group_of("b", [[1, 2], [0, -1]], 2, scores=[half, [[1, 3.5], [-0.5, -2.5]]], examples=2),
    )
    assert table["jaccard"].values.tolist() == [[1, 1], [1, 1]]
    row = table.sel(group="a")
    assert [int(row[n]) for n in ("strictly_above", "at_cut", "ties")] == [1, 3, 2]
    assert [float(row[n]) for n in ("resolution", "share_zero", "share_32")] == [0.5, 0, 1]
    expected = spearmanr([1, 0.5, 0.5, 0.5], [1, 2, 0, -1]).statistic
    assert float(table["spearman"].sel(group="a", other="b")) == pytest.approx(expected)
    assert table["shared"].values.tolist() == [[1, 1], [1, 2]]
    assert table.attrs["chance"] == pytest.approx((4 / 6) * (1 / 3) + 1 / 6)


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ([3, -2, 0, 1], 1.0),
        ([0.5, 0.25, 0, 0], 0.25),
        ([1 / 64, 1 / 32, 0, 1], 1 / 64),
        ([0.1, 0.2, 0.3, 0.4], np.nan),
        ([0, 0, 0, 0], np.nan),
    ],
)
def test_resolution_is_the_largest_step_of_all_scores(scores, step):
    grid = np.reshape(scores, (2, 2))
    table = overlap_of(group_of("a", grid, 2, scores=[grid]))
    assert table["resolution"].values.tolist() == pytest.approx([step], nan_ok=True)
    assert float(table["share_zero"][0]) == scores.count(0) / 4


def test_groups_without_published_scores_have_no_resolution_and_say_so():
    table = overlap_of(group_of("a", [[0.1, 0.2], [0.3, 0.4]], 2, examples=10))
    assert np.isnan([float(table[n][0]) for n in ("resolution", "share_32", "share_zero")]).all()
    assert float(table["sum_resolution"][0]) == 1.0
    text = lines(table)
    assert "t: no tie at the cut." in text
    assert "t: no per-example scores were published." in text
    assert len(text) == 2


def test_a_ranking_that_is_all_ties_correlates_with_nothing():
    table = overlap_of(group_of("a", np.zeros((2, 2)), 2), group_of("b", [[0, 1], [2, 3]], 2))
    assert np.isnan(table["spearman"].values).tolist() == [[True, True], [True, False]]


def test_an_unknown_task_is_refused(folder):
    with pytest.raises(InputError, match="no task LaMP-9 in these files; there is LaMP-1"):
        official_overlap(read_official(folder), "LaMP-9")


def test_the_table_survives_json(folder, tmp_path):
    table = official_overlap(read_official(folder), "LaMP-1")
    tables.save(table, tmp_path / "table.json")
    xr.testing.assert_identical(tables.load(tmp_path / "table.json"), table)


# The authors' own


@pytest.fixture(scope="module")
def published(shared):
    if not (shared / "official").is_dir():
        pytest.skip("no folder `official` with the authors' score files in the shared data")
    return shared / "official"


@pytest.fixture(scope="module")
def table(published):
    return official_overlap(read_official(published), "LaMP-1")


@pytest.mark.parametrize(
    ("file", "name"), [("headset_jaccard.csv", "jaccard"), ("pcs_spearman.csv", "spearman")]
)
def test_the_published_matrices_come_out_in_every_digit(published, table, file, name):
    with (published / file).open(newline="") as opened:
        (_, *names), *rows = csv.reader(opened)
    assert table["group"].values.tolist() == names
    assert len(rows) == 10
    for row, ours in zip(rows, table[name].values, strict=True):
        assert row[1:] == [f"{value:.4f}" for value in ours], row[0]
        assert np.abs(ours - np.array(row[1:], dtype=float)).max() < 0.00005


def test_the_published_scores_have_the_grain_that_exact_fractions_find(published, table):
    zero = fine = total = 0
    for path in sorted((published / "LaMP-1").glob("*/*_pcs.json")):
        values = [Fraction(x) for entry in json.loads(path.read_text()).values() for x in entry]
        largest = max(value.denominator for value in values)  # all powers of two
        assert float(table.sel(group=path.parent.name)["resolution"]) == 1 / largest
        zero += values.count(0)
        fine += sum((value * 32).denominator == 1 for value in values)
        total += len(values)
    assert int(table["scores"].sum()) == total == 44_032
    each = table.sel(group=table["scores"].values > 0)
    assert float((each["share_zero"] * each["scores"]).sum()) == pytest.approx(zero)
    assert float((each["share_32"] * each["scores"]).sum()) == pytest.approx(fine)
    assert float(each["resolution"].min()) == 1 / 64


def test_the_published_ties_are_those_of_a_count(published, table):
    for path in sorted((published / "LaMP-1").glob("*/*_ranked.json")):
        scores = [e["avg_pcs"] for e in json.loads(path.read_text())["ranked_heads"]]
        cut = sorted(scores)[-40]
        row = table.sel(group=path.parent.name)
        assert int(row["at_cut"]) == Counter(scores)[cut]
        assert int(row["strictly_above"]) == sum(s > cut for s in scores)
        assert int(row["ties"]) == int(row["strictly_above"] + row["at_cut"]) - 40


def test_the_findings_on_the_published_files_are_said(table):
    text = " ".join(lines(table))
    assert "the most in k2: 22 heads lie strictly above the score of the last of 40" in text
    assert "the tie rule alone chose 18 of the 40" in text
    assert "all 44,032 published per-example scores are multiples of 1/64 nat" in text
    assert "2 of 2 of k2 in k5" in text


def test_published_sets_are_jaccards_of_single_files(published, table):
    paths = [next((published / "LaMP-1" / g).glob("*_top_heads.json")) for g in ("k1", "k200")]
    expected = jaccard(*map(HeadSet.load, paths))
    assert float(table["jaccard"].sel(group="k1", other="k200")) == pytest.approx(expected)
