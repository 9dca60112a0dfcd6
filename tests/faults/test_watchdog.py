"""A run that no longer moves is ended with its stacks on disk."""

import signal

import pytest

from tests.faults.trainer import logged, saved
from tinyllama_jax.parallel.distributed import LOST_PEER

PAIR = {"processes": 2, "devices": 2}
# The door, on a disk that never gives the batch of step 17, whoever reads it.
HANGING = """
import runpy, time
from tinyllama_jax.data import dataset

read = dataset.TrainingDataset.batch_at

def hang(self, step):
    if step == 17:
        time.sleep(1000)
    return read(self, step)

dataset.TrainingDataset.batch_at = hang
runpy.run_module("tinyllama_jax.train", run_name="__main__", alter_sys=True)
"""


def test_a_read_that_hangs_ends_the_process(trainer, uninterrupted):
    run_dir = trainer.directory / "hanging"
    run = trainer.start(run_dir, "--config.watchdog.seconds=4", program=("-c", HANGING))
    assert run.wait() == [LOST_PEER], run.printed()
    assert "step 17 was not read within 1 s" in run.printed()  # by other threads neither
    assert "has finished for 4 s (watchdog.seconds)" in run.printed()
    assert f"what each thread was doing is in {run_dir / 'stacks.txt'}" in run.printed()
    stacks = (run_dir / "stacks.txt").read_text()
    assert "in hang" in stacks and "process 0 of 1" in stacks and "in train" in stacks
    assert "resumed from step 15\n" in trainer.finish(run_dir)
    assert logged(run_dir) == logged(uninterrupted) and saved(run_dir) == saved(uninterrupted)


@pytest.mark.slow
def test_a_peer_that_hangs_ends_all(trainer):
    """The second process is frozen: it neither works nor tells that it lives."""
    run_dir = trainer.directory / "frozen"
    run = trainer.start(
        run_dir, "--config.training.micro_batch_size=1", "--config.watchdog.seconds=10", **PAIR
    )
    run.until_step(12)
    run.processes[1].send_signal(signal.SIGSTOP)
    assert run.processes[0].wait(40) == LOST_PEER
    run.processes[1].send_signal(signal.SIGCONT)
    assert run.wait(40) == [LOST_PEER, LOST_PEER], run.printed()
    assert "process 0 of 2 ends with exit code 76" in run.printed()
    assert "lost process 0 on " in run.printed()


def test_an_evaluation_whose_disk_stays_away_ends_the_process(trainer, failing_disk):
    """The first one, ahead of every step; from then on as the steps are watched."""
    run_dir = trainer.directory / "no held-out text"
    environment = failing_disk("hang", "*/validation/*", after=1)
    run = trainer.start(run_dir, "--config.watchdog.seconds=4", environment=environment)
    assert run.wait() == [LOST_PEER], run.printed()
    assert "validation batch 0 was not read within 1 s" in run.printed()
    assert "no batch of an evaluation, has finished for 4 s" in run.printed()
    assert "in validate" in (run_dir / "stacks.txt").read_text()
