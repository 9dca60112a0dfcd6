"""The benchmark of the train step: what it prints, and that it checks before it times."""

import json

import numpy as np
import pytest

from tinyllama_jax import bench
from tinyllama_jax.benchmarks import train
from tinyllama_jax.benchmarks.rounds import Timing, attempt, interleave, ratio
from tinyllama_jax.model.presets import PRESETS

ARGUMENTS = ["train", "--preset", "tiny_debug", "--rows", "2", "--seq-len", "16", "--rounds", "2"]


def test_ours_alone(tmp_path, capsys):
    bench.main([*ARGUMENTS, "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("ours ")]
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert line.endswith("1.00x") and row["ours_is_faster_by"] == 1
    assert 0 < row["least"] <= row["tokens_per_second"] <= row["most"]
    assert row["last_warm_up_loss"] < row["first_loss"]
    params = 4096 * 64 * 2  # the two tables alone, as params and two moments
    assert 3 * 4 * params < row["peak_bytes"] < 2**30


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r'--preset "huge" is not one of .*tinyllama_1b'):
        bench.main(["train", "--preset", "huge"])


def test_beside_torch():
    pytest.importorskip("torch", reason="needs the [parity] extra")
    pytest.importorskip("transformers", reason="needs the [parity] extra")
    result = train.compare(
        PRESETS["tiny_debug"], rows=2, seq_len=16, rounds=1, against_torch=True, compiled=False
    )
    assert set(result.losses) == {"ours", "torch eager"}
    np.testing.assert_allclose(result.losses["ours"], result.losses["torch eager"], atol=1e-4)


def test_contenders_that_compute_something_else_are_not_timed(monkeypatch):
    monkeypatch.setattr(train, "_torch_steps", lambda *_, **__: {"torch": lambda: 3.21})
    with pytest.raises(ValueError, match="do not compute the same thing"):
        train.compare(PRESETS["tiny_debug"], rows=2, seq_len=16, rounds=1, against_torch=True)


def test_contenders_take_turns():
    order = []
    timings = interleave(
        {name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, calls=2
    )
    assert order == ["a", "a", "b", "b"] * 2
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]
    assert ratio(Timing((1.0, 2.0, 4.0)), Timing((2.0, 6.0, 4.0))) == 2.0


def test_a_contender_that_cannot_run_costs_no_other_its_figures(monkeypatch):
    def no_memory():
        raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(train, "_torch_steps", lambda *_, **__: {"torch eager": no_memory})
    result = train.compare(PRESETS["tiny_debug"], rows=2, seq_len=16, rounds=1, against_torch=True)
    assert [row["contender"] for row in result.rows()] == ["ours"]
    assert result.absent == {"torch eager": "RuntimeError: CUDA out of memory."}


def test_work_is_waited_for_once_a_turn():
    events = []
    interleave({"a": lambda: events.append("call")}, rounds=2, calls=3,
               wait=lambda result: events.append("wait"))  # fmt: skip
    assert events == (["call"] * 3 + ["wait"]) * 2


def test_whatever_a_contender_raises():
    for error in (ValueError("q_seq_len must be a multiple of 128"), KeyError("x"), OSError(12)):
        absent = {}

        def fail(error=error):
            raise error

        assert attempt("other", fail, absent) is None
        assert absent["other"].startswith(type(error).__name__)
