"""Several processes see the rows of one, each reading its own only, and train as one does."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.faults.trainer import ROOT, free_port, losses
from tests.mesh.rows_of_processes import ROWS, STEPS


def rows(tmp_path, processes, devices, shape):
    out = tmp_path / f"{processes} {shape}"
    out.mkdir()
    address, started = f"localhost:{free_port()}", []
    for number in range(processes):
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }  # fmt: skip
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.mesh.rows_of_processes", str(out),
                 *map(str, shape)], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    for process in started:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed[-3000:]
    return [json.loads((out / f"{number}.json").read_text()) for number in range(processes)]


def test_the_rows_do_not_depend_on_the_processes(tmp_path):
    (alone,) = rows(tmp_path, 1, 1, (1, 1, 1))
    assert len(alone) == STEPS and all(len(read) == ROWS for read, _ in alone)
    for processes, devices, shape in [
        (1, 8, (2, 4, 1)), (2, 2, (2, 2, 1)), (2, 2, (1, 4, 1)), (2, 2, (2, 1, 2)),
        (4, 2, (4, 2, 1)), (2, 1, (1, 1, 2)),
    ]:  # fmt: skip
        found = rows(tmp_path, processes, devices, shape)
        for step in range(STEPS):
            assert {digest for _, digest in (one[step] for one in found)} == {alone[step][1]}
            read = [one[step][0] for one in found]
            if shape == (1, 1, 2):  # both hold parts of the same rows
                assert read == [alone[step][0]] * 2
                continue
            assert sorted(itertools.chain(*read)) == alone[step][0]  # each row once
            assert {len(one) for one in read} == {ROWS // processes}


@pytest.mark.slow
def test_a_run_of_four_processes_is_the_run_of_one(trainer, uninterrupted):
    """Of two, the fixture `pair` sees to it."""
    run_dir = trainer.directory / "four processes"
    trainer.finish(
        run_dir, "--config.training.micro_batch_size=1", "--config.mesh.data=2",
        processes=4, devices=2,
    )  # fmt: skip
    assert losses(run_dir) == pytest.approx(losses(uninterrupted), abs=1e-5)
