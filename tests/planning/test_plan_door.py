"""The plan door: mistakes, and with the CUDA plugin the paper's run compiled for its GPUs."""

import os
import re
import subprocess
import sys

import pytest

from tests.planning.plugin import PLUGIN, with_plugin


def plan(*flags, config="configs/tinyllama_1b.py"):
    return subprocess.run(
        [sys.executable, "-m", "tinyllama_jax.plan", f"--config={config}", *flags],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": ""},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no --gpus: name a card and how many"),
        (["--gpus=v100"], '"v100" is not one of'),
        pytest.param(
            ["--gpus=h200"], "run pip install -e '.[cuda13]'",
            marks=pytest.mark.skipif(PLUGIN, reason="the plugin is there"),
        ),
        pytest.param(
            ["--gpus=h200:8", "--config.mesh.data=-1"], "and -1 (all that are left) for one axis",
            marks=with_plugin,
        ),
        pytest.param(
            ["--gpus=h200:8", "--config.mesh.fsdp=4"], "a mesh of 4 devices, but there are 8",
            marks=with_plugin,
        ),
        pytest.param(
            ["--gpus=h200:3"], "global_batch_tokens = 2097152 is not a multiple", marks=with_plugin
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_a_message(flags, message):
    done = plan(*flags)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def peak_of(printed):
    found = re.search(r"peak per GPU: ([\d.]+) GiB of ([\d.]+) GiB \((.*)\)", printed)
    assert found, printed
    return float(found[1]), found[3]


@with_plugin
@pytest.mark.parametrize(
    "gpus, remat, most",
    [("a100-40g:2x8", "none", 30), ("a100-40g:2x8", "dots", 20), ("a100-40g", "dots", 36)],
)
def test_the_papers_setup_fits(gpus, remat, most, tmp_path):
    """8 x 2048 tokens a pass, accumulation included, no matrix product computed twice."""
    done = plan(f"--gpus={gpus}", f"--html={tmp_path / 'plan.html'}", "--price=2",
                f"--config.model.remat={remat}")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    peak, verdict = peak_of(done.stdout)
    assert peak < most and verdict == "fits"
    assert "matrix products twice" not in done.stdout
    assert "passes of 8 x 2048 on each GPU" in done.stdout and "cost, at best" in done.stdout
    assert "the estimate of time" in done.stdout
    rows = re.findall(r"^  (.+?) +([\d.]+) GiB \|", done.stdout, re.M)
    assert "gradients, summed over passes" in dict(rows)
    assert sum(float(size) for _, size in rows) == pytest.approx(peak, abs=0.1)
    page = (tmp_path / "plan.html").read_text()
    assert f"{peak:.1f} GiB" in page and "http" not in page


@with_plugin
def test_what_does_not_fit_is_told_what_would():
    done = plan("--gpus=rtx4090")
    assert done.returncode == 0, done.stderr[-3000:]
    assert peak_of(done.stdout)[1] == "does NOT fit"
    rows = done.stdout.partition("peak GiB  tokens/s  settings\n")[2].splitlines()
    assert "does NOT fit" not in rows[0] and "does NOT fit" in rows[-4]
    change = rows[0].split(None, 2)[2]
    assert change.startswith("--config.model.remat=") and rows[-1].endswith(change), rows


@with_plugin
@pytest.mark.parametrize("data", [1, 2])
def test_fsdp_gathers_and_scatters_what_it_must(data):
    """In each of 8 passes every weight is gathered once in bfloat16, every gradient scattered."""
    done = plan("--gpus=a100-40g:2x8", f"--config.mesh.data={data}")
    sent = dict(re.findall(r"  ([a-z-]+) +([\d.]+) GiB in", done.stdout))
    matrices, tables = 1_100_048_384, 2 * 2048 * 32000
    assert float(sent["all-gather"]) == pytest.approx(8 * 2 * matrices / 2**30, rel=0.01)
    # Those of the two tables are summed in float32.
    scattered = 8 * (2 * matrices + 2 * tables)
    assert float(sent["reduce-scatter"]) == pytest.approx(scattered / 2**30, rel=0.01)
    # Over `data` travels what is scattered already, never a whole matrix.
    parts = 16 / data
    assert float(sent["all-reduce"]) < 0.02 + (data > 1) * 1.05 * scattered / parts / 2**30
