"""One of two processes is killed: the other names it and ends, and both go on where they were."""

import re
import signal

import pytest

from tests.faults.trainer import STEPS, logged, saved
from tinyllama_jax.parallel.distributed import LOST_PEER

PAIR = {"processes": 2, "devices": 2}
FLAGS = ("--config.training.micro_batch_size=1", "--config.watchdog.peer_seconds=10")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_the_other_names_the_lost_one(trainer, pair, lost):
    """Process 0 also holds the coordination service; its loss is noticed at once."""
    run_dir = trainer.directory / f"lost {lost}"
    run = trainer.start(run_dir, *FLAGS, **PAIR)
    run.until_step(12)
    run.processes[lost].send_signal(signal.SIGKILL)
    codes = run.wait(timeout=40)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == LOST_PEER, run.printed()
    assert f"lost process {lost} on " in run.printed()
    assert f"process {1 - lost} ends with exit code 76" in run.printed()
    # It ran on until it was killed, maybe past the next save.
    printed = trainer.finish(run_dir, *FLAGS, **PAIR)
    assert re.search(r"resumed from step (10|15|20)\n", printed), printed
    assert logged(run_dir) == logged(pair)
    assert saved(run_dir) == saved(pair)


@pytest.mark.slow
def test_a_mistake_of_one_is_told_by_all(trainer):
    """The second process alone cannot read the settings' text."""
    run_dir = trainer.directory / "mistake"
    run = trainer.start(run_dir, "--config.data.sources.code.path=/nowhere", *FLAGS, **PAIR)
    codes = run.wait(timeout=60)
    assert codes == [1, 1], run.printed()
    assert "error: source code: " in run.printed() and "Traceback" not in run.printed()
    assert STEPS and not (run_dir / "config.json").exists()
