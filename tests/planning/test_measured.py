"""Estimates beside measurements; the measurement here is made up, in the form of a real one."""

import copy
import json

import pytest

from tinyllama_jax.benchmarks import report
from tinyllama_jax.planning.measured import compare_with

# What `bench train --json` wrote on a CPU, the only kind held so far.
WRITTEN = json.loads((report.RESULTS / "cpu_train.json").read_text())


def written_on(directory, name, devices, tokens_per_second):
    content = copy.deepcopy(WRITTEN)
    content["machine"]["devices"] = devices
    content["rows"][0]["tokens_per_second"] = tokens_per_second
    (directory / f"{name}.json").write_text(json.dumps(content))


def test_each_gpu_is_compared_and_the_error_is_of_the_measured(tmp_path):
    written_on(tmp_path, "a", {"NVIDIA H200": 1}, 1e6)
    written_on(tmp_path, "b", {"NVIDIA H200": 1}, 2e6)
    written_on(tmp_path, "two", {"NVIDIA H200": 2}, 2e6)
    written_on(tmp_path, "unknown", {"NVIDIA V100": 1}, 2e6)
    (tmp_path / "c.json").write_text((report.RESULTS / "cpu_loss.json").read_text())
    one, two = compare_with(tmp_path)
    assert one.title.startswith("NVIDIA H200, 16 x 256 tokens, 4 layers of 256")
    assert one.estimated == two.estimated > 0
    assert one.error == pytest.approx(one.estimated / 1e6 - 1)
    assert 1 + two.error == pytest.approx((1 + one.error) / 2)


def test_cpus_are_no_gpus(tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps(WRITTEN))
    assert compare_with(tmp_path) == []
