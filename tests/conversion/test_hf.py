"""Whole models to Hugging Face directories and back, without torch."""

import json
import weakref

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

import tinyllama_jax
from tinyllama_jax import convert
from tinyllama_jax.config import Config, DataConfig, ModelConfig
from tinyllama_jax.conversion import hf
from tinyllama_jax.conversion.hf_config import SpecialIds
from tinyllama_jax.conversion.load import load, save_run
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.runs import checkpoint, directory, restore
from tinyllama_jax.text.tokenizer import Tokenizer

UNTIED = ModelConfig(
    vocab_size=4096, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
    max_seq_len=64,
)  # fmt: skip
TIED = ModelConfig(**{**vars(UNTIED), "tie_embeddings": True})


def random_params(config, seed=0):
    """Params of the init's shapes with nothing at 0 or 1, so that no two leaves can be swapped."""
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def make_run(path, config=UNTIED, tokenizer=True):
    params = random_params(config)
    directory.write_config(path, Config(model=config, data=DataConfig(seq_len=64)))
    checkpoint.save_params(path, params, {})
    if tokenizer:
        (path / "tokenizer.model").write_bytes(Tokenizer().model_proto)
    return params


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_doors_round_trip_is_bit_exact(tmp_path, config, capsys):
    params = make_run(tmp_path / "run", config)
    hf_dir, back = str(tmp_path / "hf"), str(tmp_path / "back")
    convert.main(["to-hf", str(tmp_path / "run"), "--out", hf_dir])
    assert f"next: python -m tinyllama_jax.generate {hf_dir}" in capsys.readouterr().out
    convert.main(["from-hf", hf_dir, "--out", back])
    loaded = tinyllama_jax.load(back)
    assert_same_bits(loaded.params, params)
    assert loaded.config.model == config
    assert loaded.tokenizer is not None and loaded.tokenizer.sha256 == Tokenizer().sha256
    assert (loaded.start_id, loaded.end_ids) == (1, (2,))


def test_sharded_export_is_the_same_model(tmp_path):
    params = make_run(tmp_path / "run")
    arguments = ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]
    convert.main([*arguments, "--max-shard-size", "100KB"])
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) == 3
    assert_same_bits(load(tmp_path / "hf").params, params)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_rounds_once(tmp_path, dtype, error):
    params = make_run(tmp_path / "run")
    arguments = ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf"), "--dtype", dtype]
    convert.main(arguments)
    found = load(tmp_path / "hf").params
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=error, atol=1e-6)
        assert not np.array_equal(a, b)


def test_run_without_a_tokenizer_says_so_in_both_directions(tmp_path, capsys):
    make_run(tmp_path / "run", tokenizer=False)
    convert.main(["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf")])
    assert "the run has no tokenizer" in capsys.readouterr().out
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    convert.main(["from-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "back")])
    assert "has no tokenizer.model" in capsys.readouterr().out
    assert json.loads((tmp_path / "back" / "origin.json").read_text())["tokenizer"] == "none"
    assert load(tmp_path / "back").tokenizer is None


def test_an_imported_run_keeps_the_ids_that_its_source_declares(tmp_path):
    make_run(tmp_path / "run", tokenizer=False)
    loaded = load(tmp_path / "run")
    assert loaded.ids == SpecialIds(None, ())
    declared = SpecialIds(3, (4, 5))
    (tmp_path / "hf").mkdir()
    hf.write(tmp_path / "hf", UNTIED, flatten_dict(loaded.params, sep="/"), None, declared)
    save_run(load(tmp_path / "hf"), tmp_path / "imported", "hf")
    assert load(tmp_path / "imported").ids == declared


@pytest.mark.parametrize(
    ("boundary", "start", "end"), [("bos+eos", 1, (2,)), ("bos", 1, (1,)), ("eos", 2, (2,))]
)
def test_start_and_end_follow_what_the_run_trained_on(tmp_path, boundary, start, end):
    make_run(tmp_path)
    config = Config(model=UNTIED, data=DataConfig(boundary=boundary))
    directory.write_config(tmp_path, config)
    loaded = load(tmp_path)
    assert (loaded.start_id, loaded.end_ids) == (start, end)


@pytest.fixture
def hf_dir(tmp_path):
    path = tmp_path / "hf"
    path.mkdir()
    hf.write(path, TIED, flatten_dict(random_params(TIED), sep="/"), None, SpecialIds(1, (2,)))
    return path


def rewrite(path, change):
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_tied_model_may_repeat_its_embedding_but_not_change_it(hf_dir):
    def equal(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def different(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    rewrite(hf_dir, equal)
    assert_same_bits(load(hf_dir).params, random_params(TIED))
    rewrite(hf_dir, different)
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but lm_head\.weight differs"):
        load(hf_dir)


def test_wrong_tensors_are_named(hf_dir):
    rewrite(hf_dir, lambda t: t.update({"model.norm.bias": t["model.norm.weight"]}))
    with pytest.raises(ValueError, match=r"not known: model\.norm\.bias"):
        load(hf_dir)
    rewrite(hf_dir, lambda t: t.pop("model.norm.bias"))
    rewrite(hf_dir, lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(31,\)"):
        load(hf_dir)


def test_nothing_is_overwritten(tmp_path, hf_dir):
    make_run(tmp_path / "run")
    before = sorted(path.name for path in hf_dir.iterdir())
    for arguments in (
        ["to-hf", str(tmp_path / "run"), "--out", str(hf_dir)],
        ["from-hf", str(hf_dir), "--out", str(tmp_path / "run")],
    ):
        with pytest.raises(ValueError, match="already exists and is not an empty directory"):
            convert.main(arguments)
    assert sorted(path.name for path in hf_dir.iterdir()) == before


def test_a_failed_conversion_leaves_nothing(tmp_path):
    params = random_params(UNTIED)
    params["final_norm"][0] = 1e5
    directory.write_config(tmp_path / "run", Config(model=UNTIED))
    checkpoint.save_params(tmp_path / "run", params, {})
    arguments = ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]
    with pytest.raises(ValueError, match="past the largest float16"):
        convert.main([*arguments, "--dtype", "float16"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "is not there"), ("file", "is a file"), ("empty", "not a run directory")],
)
def test_load_says_what_it_was_given(tmp_path, path, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load(tmp_path / path)


def test_load_of_a_step_inside_a_run_points_to_the_run(tmp_path):
    make_run(tmp_path)
    with pytest.raises(ValueError, match="choose a step with --step"):
        load(tmp_path / "checkpoints" / "0")
    with pytest.raises(ValueError, match="step 7"):
        load(tmp_path, step=7)


def test_hugging_face_directories_have_no_steps(hf_dir):
    with pytest.raises(ValueError, match="no steps to choose"):
        load(hf_dir, step=3)


def test_an_export_reads_leaf_by_leaf(tmp_path, monkeypatch):
    """Each leaf of a checkpoint is read once, verified, and given up before the next is read."""
    make_run(tmp_path / "run")
    read, held = [], []
    stored = restore.open_params(tmp_path / "run")
    original = type(stored).__getitem__

    def watched(self, path):
        array = original(self, path)
        assert not any(leaf() is not None for leaf in held), "two leaves at once"
        read.append(path)
        held.append(weakref.ref(array))
        return array

    monkeypatch.setattr(type(stored), "__getitem__", watched)
    # In bfloat16, since a shard of float32 may hold parts of a leaf rather than copies.
    arguments = ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]
    convert.main([*arguments, "--dtype", "bfloat16"])
    assert sorted(read) == sorted(stored)
    assert len(read) == len(stored) == 12


def test_a_hugging_face_directory_is_not_exported_again(hf_dir, tmp_path):
    with pytest.raises(ValueError, match="is a Hugging Face directory already"):
        convert.main(["to-hf", str(hf_dir), "--out", str(tmp_path / "out")])
