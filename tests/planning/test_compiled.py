"""What XLA and NVIDIA's assembler make for GPUs that are not there: registers, memory."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.planning.plugin import with_plugin

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = with_plugin


def compiled(what, gpu, dump, flags=""):
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.compiled_for_gpus", what, gpu, str(dump)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
             "XLA_FLAGS": f"--xla_dump_to={dump}" if what == "kernels" else flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("gpu", ["a100-40g", "h200"])
def test_no_flash_kernel_spills(gpu, tmp_path):
    """Every variant of every preset compiles; registers of each are printed (-s)."""
    variants = compiled("kernels", gpu, tmp_path)
    assert len(variants) == 40
    for one in variants:
        print(*one.values())
        assert one["kernels"] == 3, one
        assert one["assembled"].keys() == {"forward", "dq", "dkv"}, one
        for name, known in one["assembled"].items():
            assert known["spilled"] == 0 < known["registers"], (name, one)
        # lse and delta, float32, and delta's transpose: no score matrix.
        assert one["temporaries"] <= 3 * 2 * 2048 * one["heads"][0] * 4 + 2**20, one


@pytest.mark.parametrize("gpu", ["a100-40g", "h200"])
def test_the_loss_needs_a_tenth_of_the_plain_ones_memory(gpu, tmp_path):
    """16,384 tokens, 32,000 pieces; dx and the float32 dW are results, not temporaries."""
    found = compiled("loss", gpu, tmp_path)
    assert found["plain"] > 16_384 * 32_000 * 4
    assert found["chunked"] < found["plain"] / 10


def test_recomputing_frees_memory_unrolled_too(tmp_path):
    """XLA would merge what is recomputed with what was computed, but for the barrier."""
    found = compiled("remat", "a100-80g", tmp_path)
    assert found["attention 0"] < 0.6 * found["none 0"]
    assert found["attention 1"] < 0.4 * found["none 1"]


def test_attention_that_is_saved_is_not_computed_again(tmp_path):
    for which, times in compiled("attention", "h200", tmp_path).items():
        assert times == (1 if which.endswith("1") else 2), which  # in a loop it stands once


def test_the_embeddings_gradient_needs_no_atomics(tmp_path):
    """Told to be deterministic, XLA would sort all 33 million elements of it."""
    flag = "--xla_gpu_exclude_nondeterministic_ops=true"
    found = compiled("embedding", "h200", tmp_path, flag)
    assert found["scatter"] and all("unique_indices=true" in line for line in found["scatter"])
    assert found["sort"] and all("[16384]" in line for line in found["sort"])


def test_a_step_that_may_be_skipped_needs_no_more_memory(tmp_path):
    found = compiled("guard", "a100-40g", tmp_path)
    assert found["guarded"] < 1.001 * found["always"]
