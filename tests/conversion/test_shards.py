"""Safetensors shards: sizes, dtypes, and files that are not what they claim."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tinyllama_jax.conversion import shards

SHAPES = {"a": (4, 8), "b": (3,), "c": (16, 8), "d": (2, 2)}


def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(directory, dtype="float32", limit=10**9):
    values = tensors()
    shards.write(directory, SHAPES, shards.DTYPES[dtype], values.__getitem__, limit)
    return values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("limit", [10**9, 150])
def test_what_is_written_is_read_back(tmp_path, dtype, limit):
    values = write(tmp_path, dtype, limit)
    with shards.Reader(tmp_path) as reader:
        assert sorted(reader.names()) == sorted(SHAPES)
        for name, value in values.items():
            assert reader.dtype(name) == dtype
            assert reader.shape(name) == SHAPES[name]
            np.testing.assert_array_equal(reader.read(name), value.astype(shards.DTYPES[dtype]))


def test_shards_stay_below_the_limit_unless_one_tensor_is_larger(tmp_path):
    write(tmp_path, limit=150)
    index = json.loads((tmp_path / shards.INDEX).read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00001-of-00003.safetensors",
        "c": "model-00002-of-00003.safetensors",  # 512 bytes alone
        "d": "model-00003-of-00003.safetensors",
    }
    assert index["metadata"]["total_size"] == 4 * (32 + 3 + 128 + 4)


def test_only_one_shard_of_tensors_is_asked_for_at_a_time(tmp_path):
    values, asked = tensors(), []

    def tensor(name):
        asked.append((name, sorted(path.name for path in tmp_path.glob("*.safetensors"))))
        return values[name]

    shards.write(tmp_path, SHAPES, np.dtype(np.float32), tensor, 150)
    assert [(name, len(written)) for name, written in asked] == [
        ("a", 0), ("b", 0), ("c", 1), ("d", 2),
    ]  # fmt: skip


def test_files_can_be_read_by_whoever_can_read_others(tmp_path):
    write(tmp_path)
    (tmp_path / "other").touch()
    assert (tmp_path / shards.SINGLE).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="big holds 70000, past the largest float16"):
        shards.write(
            tmp_path, {"big": (1,)}, shards.DTYPES["float16"],
            lambda _: np.array([7e4], np.float32), 10**9,
        )  # fmt: skip


def test_a_name_in_two_shards_occurs_twice(tmp_path):
    for file, names in (("x.safetensors", ["a", "b"]), ("y.safetensors", ["b"])):
        safetensors.numpy.save_file({n: np.ones(2, np.float32) for n in names}, tmp_path / file)
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / shards.INDEX).write_text(json.dumps(index))
    with shards.Reader(tmp_path) as reader:
        assert sorted(reader.names()) == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "not a whole safetensors file"),
        (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "Git-LFS pointer.*git lfs pull",
        ),
        (lambda path: path.unlink(), "no weights to read"),
        (lambda path: path.rename(path.parent / "pytorch_model.bin"), "pickle"),
    ],
)
def test_damaged_or_absent_files_are_refused(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path / shards.SINGLE)
    with pytest.raises(ValueError, match=message):
        shards.Reader(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer.*git lfs pull"),
        ("{}", "no weight_map in it"),
        ("[]", "no weight_map in it"),
        ('{"weight_map": ', "no weight_map in it"),
    ],
)
def test_a_damaged_index_is_refused_by_name(tmp_path, content, message):
    write(tmp_path, limit=150)
    (tmp_path / shards.INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"{shards.INDEX} is not an index of weights.*{message}"):
        shards.Reader(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    write(tmp_path, limit=150)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not beside it: model-00002-of-00003\.safetensors"):
        shards.Reader(tmp_path)


def test_an_index_cannot_reach_outside_its_directory(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    (inside / shards.INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="not beside it"):
        shards.Reader(inside)


def test_quantised_tensors_are_refused(tmp_path):
    values = {"a": np.ones(4, np.int8), "b": np.ones(4, ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(values, tmp_path / shards.SINGLE)
    with shards.Reader(tmp_path) as reader:
        assert reader.read("b").dtype == ml_dtypes.bfloat16
        with pytest.raises(ValueError, match=r"stored as I8.*quantised"):
            reader.read("a")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KB", 1500), ("77", 77)]
)
def test_sizes(text, size):
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5TB", "big", "-1GB", "0"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        shards.parse_size(text)
