"""The train door on several devices: the run of one device, and a run that changes its mesh."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.mesh.conftest import ROOT

LAST = 50


def start(tmp_path, name, devices, *flags):
    """The door on so many fake devices, with one row a pass on each."""
    return subprocess.Popen(
        [sys.executable, "-m", "tinyllama_jax.train", "--config=configs/tiny_debug.py",
         f"--workdir={tmp_path / name}", f"--config.data.prepared={tmp_path / 'prepared'}",
         "--config.training.micro_batch_size=1", "--config.logging.tensorboard=False", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu",
             "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
    )  # fmt: skip


def finish(process):
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-4000:]
    return printed


def losses(run_dir, key="loss"):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line[key] for line in map(json.loads, lines) if key in line}


def difference(a, b):
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("runs")
    finish(start(tmp_path, "alone", 1))
    return tmp_path


def test_a_run_on_8_devices_is_the_run_on_one(alone):
    printed = finish(
        start(alone, "mesh", 8, "--config.mesh.data=2", "--config.mesh.tensor=2")  # fsdp: 2 left
    )
    assert "a sample (temperature" in printed  # it is read and shown on one device
    assert difference(losses(alone / "mesh"), losses(alone / "alone")) < 1e-5
    assert difference(
        losses(alone / "mesh", "eval/loss"), losses(alone / "alone", "eval/loss")
    ) < 1e-5  # fmt: skip


def test_a_run_goes_on_on_another_mesh(alone):
    """Killed on 4 devices along fsdp, it goes on on 2 along data, and ends on one."""
    run = alone / "moved"
    for devices, flags, until in [
        (4, [], 20), (2, ["--config.mesh.data=2"], 40), (1, [], LAST),
    ]:  # fmt: skip
        process = start(alone, "moved", devices, *flags)
        if until < LAST:
            deadline = time.monotonic() + 200
            while not (run / f"checkpoints/{until}/integrity.json").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        else:
            assert "resumed from step" in finish(process)
    assert difference(losses(run), losses(alone / "alone")) < 1e-5


def test_what_does_not_divide_is_refused_before_anything_compiles(tmp_path):
    for devices, flags, message in [
        (8, ["--config.mesh.tensor=4"], "2 does not divide over tensor = 4"),
        (8, ["--config.mesh.fsdp=3"], "a mesh of 3 devices, but there are 8"),
        (8, ["--config.training.micro_batch_size=2"], "the nearest that fits is 1024"),
        (8, ["--config.mesh.data=-1"], "and -1 (all that are left) for one axis"),
    ]:
        process = start(tmp_path, "refused", devices, *flags)
        printed, _ = process.communicate(timeout=100)
        assert process.returncode == 1 and message in printed, printed
        assert "Traceback" not in printed and "compiled" not in printed
