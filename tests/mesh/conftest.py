"""Tests on fake devices run in processes of their own: how many there are is settled at start."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def on_devices():
    """`on_devices(module, *arguments, count=8)`: runs `tests.mesh.<module>` on so many devices.

    It fails with what the process printed where that does not exit with 0.
    """

    def run(module: str, *arguments: str, count: int = 8) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"tests.mesh.{module}", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    return run
