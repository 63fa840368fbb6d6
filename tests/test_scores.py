"""`HeadScores`: labels, means with intervals, and the run folder it is read from."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workbench import runs, stats
from workbench.errors import InputError
from workbench.scores import FORMAT, SCHEMA, HeadScores, read_shard, write_shard

SHAPE = (3, 0, 2)  # layers with unequal heads, one without attention
USERS = ("ann", "bob", "ann", "bob", "cid")
TASKS = ("tag", "tag", "tag", "rating", "rating")


def make_table(rows=range(5), seed=0):
    values = np.random.default_rng(seed).normal(size=(5, sum(SHAPE))).astype(np.float32)
    ends = np.cumsum(SHAPE)[:-1]
    return pa.Table.from_pylist(
        [
            {
                "example": f"{TASKS[i]}/{i}",
                "user": USERS[i],
                "task": TASKS[i],
                "nll": float(i) / 4,
                "target_tokens": i + 1,
                "pcs": [part.tolist() for part in np.split(values[i], ends)],
            }
            for i in rows
        ],
        schema=SCHEMA,
    )


def make_scores(**settings):
    return HeadScores.from_table(make_table(), {"format": FORMAT, "settings": settings})


@pytest.fixture
def scores():
    return make_scores(examples=5)


def test_the_labels_say_what_a_number_is(scores):
    assert scores.data["pcs"].dims == ("example", "layer", "head")
    assert scores.data["pcs"].dtype == np.float32
    assert scores.data["user"].values.tolist() == list(USERS)
    assert scores.data["task"].values.tolist() == list(TASKS)
    assert scores.data.attrs == {"units": "nats/token", "sign": "ablated - full"}
    one = scores.data["pcs"].sel(example="rating/3", layer=2, head=1)
    assert float(one) == make_table()["pcs"].to_pylist()[3][2][1]


def test_a_head_that_a_layer_does_not_have_is_nan(scores):
    missing = np.isnan(scores.data["pcs"].values).all(axis=0)
    np.testing.assert_array_equal(missing, [[0, 0, 0], [1, 1, 1], [0, 0, 1]])
    assert scores.heads_per_layer == SHAPE


# Disk


def folder_bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_save_load_save_gives_the_same_bytes(tmp_path, scores):
    scores.save(tmp_path / "a")
    HeadScores.load(tmp_path / "a").save(tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert len(folder_bytes(tmp_path / "a")) == 2  # a manifest and a shard


def test_ragged_layers_stay_ragged_on_disk(tmp_path, scores):
    scores.save(tmp_path)
    for row in read_shard(runs.shard_path(tmp_path, 0))["pcs"].to_pylist():
        assert tuple(len(layer) for layer in row) == SHAPE


def test_a_loaded_result_is_the_saved_one(tmp_path, scores):
    scores.save(tmp_path)
    loaded = HeadScores.load(tmp_path)
    assert loaded.data.identical(scores.data)
    assert loaded.manifest == scores.manifest


def test_a_head_that_was_not_computed_keeps_its_place(tmp_path, scores):
    pcs = scores.data["pcs"].values.copy()
    pcs[:, 0, 0] = np.nan  # in front of heads that were computed
    changed = HeadScores(scores.data.assign(pcs=(scores.data["pcs"].dims, pcs)), scores.manifest)
    changed.save(tmp_path)
    np.testing.assert_array_equal(HeadScores.load(tmp_path).data["pcs"].values, pcs)


def test_shards_are_read_in_order(tmp_path):
    runs.start(tmp_path, {"format": FORMAT, "settings": {"examples": 5}})
    for index, rows in reversed(list(enumerate([(0, 1), (2, 3), (4,)]))):
        write_shard(make_table(rows), runs.shard_path(tmp_path, index))
    assert HeadScores.load(tmp_path).data.identical(make_scores(examples=5).data)


def test_datasets_opens_the_shards_as_parquet(tmp_path, scores):
    datasets = pytest.importorskip("datasets")
    scores.save(tmp_path)
    files = str(tmp_path / "scores" / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    assert rows.column_names == SCHEMA.names
    assert rows.to_list() == make_table().to_pylist()


def test_an_unfinished_run_is_refused_with_what_is_missing(tmp_path):
    runs.start(tmp_path, {"format": FORMAT, "settings": {"examples": 5}})
    with pytest.raises(InputError, match="no scores yet; run the command again"):
        HeadScores.load(tmp_path)
    write_shard(make_table((0, 1, 2)), runs.shard_path(tmp_path, 0))
    with pytest.raises(InputError, match="3 of 5 examples are scored; run the same command") as e:
        HeadScores.load(tmp_path)
    assert str(tmp_path) in str(e.value)


def damage_by_cutting(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage_by_cutting_all(path):
    path.write_bytes(b"")


def damage_by_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def damage_by_a_hole(path):
    data = path.read_bytes()
    path.write_bytes(data[:600] + bytes(400) + data[1000:])


def damage_by_flipping(path):
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 40 + path.read_bytes()[44:])


def damage_by_other_columns(path):
    pq.write_table(pa.table({"example": ["a"], "score": [1.0]}), path)


def damage_by_a_missing_column(path):
    pq.write_table(make_table().drop_columns("nll"), path)


def damage_by_another_type(path):
    pq.write_table(make_table().set_column(3, "nll", pa.array(["low"] * 5)), path)


def damage_by_no_rows(path):
    pq.write_table(make_table(()), path)


def damage_by_another_file(path):
    path.write_text("<html>you must log in</html>")


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_cutting,
        damage_by_cutting_all,
        damage_by_zeros,
        damage_by_a_hole,
        damage_by_flipping,
        damage_by_other_columns,
        damage_by_a_missing_column,
        damage_by_another_type,
        damage_by_no_rows,
        damage_by_another_file,
    ],
)
def test_a_damaged_shard_is_refused_with_its_remedy(tmp_path, scores, damage):
    scores.save(tmp_path)
    path = runs.shard_path(tmp_path, 0)
    damage(path)
    with pytest.raises(InputError, match=r"not a readable shard .*; delete it and run") as caught:
        HeadScores.load(tmp_path)
    assert str(path) in str(caught.value)


def test_a_flipped_byte_is_refused_and_never_read_as_another_score(tmp_path):
    path = tmp_path / "00000.parquet"
    write_shard(make_table(), path)
    whole, refused = path.read_bytes(), 0
    for position in range(0, len(whole), 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            assert read_shard(path).equals(make_table())  # as in a statistic that nobody reads
        except InputError:
            refused += 1
    assert refused > len(whole) / 5 / 2


def test_a_shard_with_another_number_of_examples_is_refused(tmp_path):
    path = tmp_path / "00003.parquet"
    write_shard(make_table((0, 1)), path)
    assert read_shard(path, 2).num_rows == 2
    told = r"00003\.parquet: not a readable shard \(it holds 2 examples, not 3\); delete it and run"
    with pytest.raises(InputError, match=told):
        read_shard(path, 3)


def test_a_shard_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(InputError, match=r"00003\.parquet: can't be read: ") as caught:
        read_shard(tmp_path / "00003.parquet")
    assert "delete" not in str(caught.value)


def test_a_copied_shard_is_refused_by_name(tmp_path):
    runs.start(tmp_path, {"format": FORMAT, "settings": {"examples": 4}})
    for index in (0, 1):
        write_shard(make_table((0, 1)), runs.shard_path(tmp_path, index))
    with pytest.raises(InputError, match=r"00001\.parquet: .*tag/0 is in 00000\.parquet too\)"):
        HeadScores.load(tmp_path)


def test_more_examples_than_the_manifest_says_are_refused(tmp_path):
    runs.start(tmp_path, {"format": FORMAT, "settings": {"examples": 2}})
    write_shard(make_table((0, 1, 2)), runs.shard_path(tmp_path, 0))
    with pytest.raises(InputError, match="3 examples are scored, and its manifest says 2"):
        HeadScores.load(tmp_path)


def test_scores_of_another_version_are_refused(tmp_path, scores):
    scores.save(tmp_path)
    runs.write_manifest(tmp_path, {**scores.manifest, "format": "workbench.scores/99"})
    with pytest.raises(InputError, match=r"scores/99', written by a newer version"):
        HeadScores.load(tmp_path)


def test_a_run_in_use_can_be_read(tmp_path, scores):
    scores.save(tmp_path)
    with runs.hold(tmp_path):
        code = "import sys; from workbench.scores import HeadScores; HeadScores.load(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 0


def test_saving_into_a_folder_with_another_run_s_shards_is_refused(tmp_path, scores):
    write_shard(make_table(), runs.shard_path(tmp_path, 1))
    with pytest.raises(InputError, match="shards of another run"):
        scores.save(tmp_path)


# Views


def test_mean_by_task_is_the_plain_mean_of_its_examples(scores):
    pcs = scores.data["pcs"].values
    mean = scores.mean(by="task")
    assert mean["group"].values.tolist() == ["tag", "rating"]
    assert mean["examples"].values.tolist() == [3, 2]
    for name in ("tag", "rating"):
        own = [i for i, task in enumerate(TASKS) if task == name]
        for layer, head in ((0, 0), (0, 2), (2, 1)):
            expected = sum(float(pcs[i, layer, head]) for i in own) / len(own)
            found = float(mean["mean"].sel(group=name, layer=layer, head=head))
            assert found == pytest.approx(expected, rel=1e-6)  # float32 scores


def test_the_interval_of_a_mean_resamples_users(scores):
    mean = scores.mean(by="all")
    pcs = scores.data["pcs"].values[:, 2, 0]
    alone = stats.estimate(pcs, USERS)
    cell = mean.sel(group="all", layer=2, head=0)
    assert float(cell["low"]) == pytest.approx(alone.low, rel=1e-9)
    assert float(cell["high"]) == pytest.approx(alone.high, rel=1e-9)
    assert np.isnan(mean["mean"].sel(group="all", layer=1)).all()


def test_within_a_user_the_examples_are_resampled(scores):
    mean = scores.mean(by="user")
    ann = mean.sel(group="ann", layer=0, head=0)
    values = scores.data["pcs"].values[[0, 2], 0, 0]
    # Of two examples a resample is one of them twice or both: the ends are the two values.
    np.testing.assert_allclose([ann["low"], ann["high"]], sorted(values), rtol=1e-6)
    cid = mean.sel(group="cid", layer=0, head=0)
    assert np.isfinite(cid["mean"])
    assert np.isnan([cid["low"], cid["high"]]).all()  # one example, nothing to resample


def plain_top(scores, examples, k):
    pcs = scores.data["pcs"].values.astype(float)
    means = {
        (layer, head): sum(pcs[i, layer, head] for i in examples) / len(examples)
        for layer, n in enumerate(SHAPE)
        for head in range(n)
    }
    return [f"L{lay}H{head}" for lay, head in sorted(means, key=means.get, reverse=True)[:k]]


@pytest.mark.parametrize(("by", "labels"), [("user", USERS), ("task", TASKS), ("all", ["all"] * 5)])
def test_top_takes_the_heads_with_the_highest_mean_in_each_group(scores, by, labels):
    top = scores.top(2, by=by)
    assert list(top) == list(dict.fromkeys(labels))
    for name, heads in top.items():
        own = [i for i, label in enumerate(labels) if label == name]
        assert [str(head) for head in heads] == plain_top(scores, own, 2)


def test_top_never_takes_a_head_that_is_not_there(scores):
    assert len(scores.top(5, by="all")["all"]) == 5
    with pytest.raises(InputError, match="between 1 and 5"):
        scores.top(6, by="all")


def test_select_keeps_the_rows_of_users_and_tasks(scores):
    kept = scores.select(users=["bob", "ann"], tasks=["tag"])
    assert kept.data["example"].values.tolist() == ["tag/0", "tag/1", "tag/2"]
    kept = scores.select(users=["bob"], tasks=["rating"])
    assert kept.data["example"].values.tolist() == ["rating/3"]
    with pytest.raises(InputError, match="no user zed"):
        scores.select(users=["zed", "ann"])
    with pytest.raises(InputError, match="no task news"):
        scores.select(tasks=["news"])


def test_saved_part_of_a_result_is_a_whole_run(tmp_path, scores):
    part = scores.select(users=["ann"])
    part.save(tmp_path)
    loaded = HeadScores.load(tmp_path)
    assert loaded.data.identical(part.data)
    assert loaded.manifest["settings"] == {"examples": 2}
    assert scores.manifest["settings"] == {"examples": 5}
