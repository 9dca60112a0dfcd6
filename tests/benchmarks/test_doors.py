"""The bench door's other commands: what they print and store, and that they check before timing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax import bench
from tinyllama_jax.benchmarks import attention, decode, loss, torch_llama
from tinyllama_jax.model.presets import PRESETS


def run(tmp_path, *arguments):
    bench.main([*arguments, "--rounds", "2", "--json", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())


def with_torch(extra):
    def available():
        pytest.importorskip("torch", reason="needs the [parity] extra")
        pytest.importorskip("transformers", reason="needs the [parity] extra")
        return extra

    return available


@pytest.fixture(params=[list, with_torch(["--against", "torch"])], ids=["alone", "torch"])
def against_torch(request):
    return request.param()


def test_attention(tmp_path, capsys, against_torch):
    figures = run(
        tmp_path, "attention", "--rows", "2", "--seq-len", "64", "--heads", "4x2x32", *against_torch
    )
    assert figures["benchmark"] == "attention" and figures["machine"]["backend"] == "cpu"
    by_pass = {which: [r["contender"] for r in figures["rows"] if r["pass"] == which]
               for which in ("forward", "forward and backward")}  # fmt: skip
    expected = ["folded (ours)", "reference (ours)", "XLA"] + ["torch SDPA"] * bool(against_torch)
    assert list(by_pass.values()) == [expected, expected]
    for row in figures["rows"]:
        assert 0 < row["least"] <= row["milliseconds"] <= row["most"]
        assert row["largest_difference"] < 1e-4 and row["tflops"] > 0
        inputs = 4 * 2 * 64 * 32 * (4 + 2 + 2)
        assert (row["peak_bytes"] is None) == row["contender"].startswith("torch")
        assert row["peak_bytes"] is None or inputs < row["peak_bytes"] < 20 * inputs
    assert "forward and backward" in capsys.readouterr().out


def test_attention_that_is_something_else_is_not_timed(monkeypatch):
    def wrong(shape, dtype):
        return {"ours": lambda q, k, v: jnp.zeros_like(q)}

    monkeypatch.setattr(attention, "_in_jax", wrong)
    shape = attention.Shape(1, 16, 2, 1, 32)
    with pytest.raises(ValueError, match="ours differs from the formula by"):
        attention.compare(shape, "float32", rounds=1, calls=1, against_torch=False)


def test_heads_are_three_numbers():
    with pytest.raises(ValueError, match=r'--heads "8x3x32" is not query x key/value heads x wid'):
        bench.main(["attention", "--heads", "8x3x32"])


def test_loss(tmp_path, capsys, against_torch):
    figures = run(
        tmp_path, "loss", "--rows", "4", "--seq-len", "128", "--d-model", "32", "--vocab-size",
        "512", "--chunk-tokens", "64", *against_torch,
    )  # fmt: skip
    rows = {row["contender"]: row for row in figures["rows"]}
    assert list(rows) == (
        ["chunked (ours)", "plain", "its three products"] + ["torch"] * bool(against_torch)
    )
    assert rows["chunked (ours)"]["peak_bytes"] < rows["plain"]["peak_bytes"] / 2
    assert rows["plain"]["peak_bytes"] > 4 * 512 * 512  # all logits in float32
    if against_torch:
        assert rows["torch"]["peak_bytes"] is None  # on a CPU nothing counts
    assert "its three products" in capsys.readouterr().out


def test_a_loss_that_is_something_else_is_not_timed(monkeypatch):
    right = loss.cross_entropy.weighted_sum
    monkeypatch.setattr(
        loss.cross_entropy, "weighted_sum",
        lambda h, u, t, w, chunk_tokens: right(h, u, t + 1, w, chunk_tokens=chunk_tokens),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"chunked \(ours\) differs from the plain loss"):
        loss.compare(2, 16, 16, 32, "float32", chunk_tokens=8, rounds=1, calls=1,
                     against_torch=False)  # fmt: skip


def test_real_losses_fall(tmp_path, capsys):
    tokens = np.tile(np.arange(3, 40), 100)
    np.save(tmp_path / "tokens.npy", tokens)
    figures = run(
        tmp_path, "train", "--preset", "tiny_debug", "--rows", "2", "--seq-len", "32", "--tokens",
        str(tmp_path / "tokens.npy"), "--steps", "20", "--learning-rate", "1e-2",
    )  # fmt: skip
    losses = figures["losses"]
    assert len(losses) == 20 and losses[-1] < losses[0] - 3
    assert f"step     20: loss {losses[-1]:.4f}" in capsys.readouterr().out
    np.save(tmp_path / "tokens.npy", tokens + 4096)
    with pytest.raises(ValueError, match="choose the preset of the tokenizer that made them"):
        bench.main(["train", "--preset", "tiny_debug", "--tokens", str(tmp_path / "tokens.npy"),
                    "--rows", "2", "--seq-len", "32"])  # fmt: skip


@pytest.mark.parametrize("extra", [list, with_torch(["--against", "hf"])], ids=["alone", "torch"])
def test_decode(tmp_path, capsys, extra):
    figures = run(
        tmp_path, "decode", "--preset", "tiny_debug", "--rows", "2", "--prompt-tokens", "5",
        "--new-tokens", "9", *extra(),
    )  # fmt: skip
    assert figures["rows"][0]["contender"] == "ours"
    assert all(row["tokens_per_second"] > 0 for row in figures["rows"])
    params = 4 * 2 * 4096 * 64  # the two tables alone
    assert params < figures["rows"][0]["peak_bytes"] < 4 * params
    assert "share_of_bound" not in figures["rows"][0]  # of this CPU nobody knows it
    assert "ours is faster by" in capsys.readouterr().out


def test_tokens_that_are_not_the_likeliest_are_not_timed(monkeypatch):
    def right_but_for_one(*arguments):
        tokens = ours(*arguments)
        tokens[1, -1] = (tokens[1, -1] + 1) % 4096
        return tokens

    ours = decode._ours
    monkeypatch.setattr(decode, "_ours", right_but_for_one)
    with pytest.raises(ValueError, match=r"ours chose a token whose logit is .* below the best"):
        decode.compare(
            PRESETS["tiny_debug"], rows=2, prompt_tokens=5, new_tokens=9, rounds=1,
            against_torch=False,
        )  # fmt: skip


def test_the_decode_bound():
    """FACTS of the arithmetic: an H200 of 4.8 TB/s, context 512, bfloat16, one row and 256."""
    model = PRESETS["tinyllama_1b"]
    assert decode._bound(model, 1, 512, 2, 4.8e12) == pytest.approx(2307, rel=0.01)
    assert decode._bound(model, 256, 512, 2, 4.8e12) == pytest.approx(245_000, rel=0.01)


def test_the_check_of_decoding_holds_no_params_of_its_own():
    """Params as constants of a program take minutes and many times their size to compile."""
    llama = decode.Llama(PRESETS["tiny_debug"])
    params = jax.eval_shape(llama.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, 14), jnp.int32)
    text = decode._largest_shortfall.lower(llama, params, ids, 5).as_text()
    assert len(text) < 1_000_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--rounds", "0"], "--rounds=0 must be at least 1"),
        (["decode", "--new-tokens", "0"], "--new-tokens=0 must be at least 1"),
        (["decode", "--prompt-tokens", "0"], "--prompt-tokens=0 must be at least 1"),
        (["loss", "--seq-len", "-3"], "--seq-len=-3 must be at least 0"),
        (["attention", "--json", "/nonexistent/x.json"], "no such folder"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.main(arguments)


def test_others_that_are_not_installed_are_told_before(monkeypatch):
    monkeypatch.setattr(torch_llama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--against=hf needs torch, which is not installed"):
        bench.main(["train", "--against", "hf"])


def test_resume(tmp_path, capsys):
    figures = run(tmp_path, "resume", "--preset", "tiny_debug", "--directory", str(tmp_path))
    assert len(figures["rows"]) == 2
    for row in figures["rows"]:
        assert row["bytes"] > 12 * 4096 * 64 * 2
        assert 0 < row["stall_seconds"] < row["save_seconds"]
        assert row["restore_seconds"] > 0 and row["first_step_seconds"] > 0
    printed = capsys.readouterr().out
    assert "training is held up by a save" in printed and "GB/s" in printed
    assert list(tmp_path.iterdir()) == [tmp_path / "figures.json"]  # nothing is left
