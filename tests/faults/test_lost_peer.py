"""One of two processes is killed: the other names it and ends, and both go on where they were."""

import re
import signal

import pytest

from tests.faults.trainer import DOOR, log_of, logged, saved
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
    assert re.search(r"resumed from step (5|10|15|20)\n", printed), printed
    assert logged(run_dir) == logged(pair)
    assert saved(run_dir) == saved(pair)


# The door, in which one thing fails: WHAT is replaced by code that raises.
FAILING = """
import runpy
from tinyllama_jax.data import dataset
from tinyllama_jax.training import preflight

def fail(*arguments, **named):
    raise ERROR

WHAT = fail
runpy.run_module("tinyllama_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "at_fault, what, error",
    [
        # Before anything compiles, and at the first save.
        (1, "preflight.examine", 'ValueError("a planted mistake")'),
        (1, "dataset.TrainingDataset.fingerprint", 'OSError("a planted mistake")'),
        (0, "dataset.TrainingDataset.fingerprint", 'KeyError("a planted mistake")'),
    ],
)
def test_what_fails_in_one_process_ends_all_with_its_words(trainer, at_fault, what, error):
    """Exit code 1, by which no launcher starts again what would fail again."""
    run_dir = trainer.directory / f"failing {at_fault} {what} {error[:5]}"
    failing = ("-c", FAILING.replace("WHAT", what).replace("ERROR", error))
    programs = {"program": failing, "other_program": DOOR}
    if at_fault == 1:
        programs = {"program": DOOR, "other_program": failing}
    run = trainer.start(run_dir, *FLAGS, **PAIR, **programs)
    assert run.wait(timeout=60) == [1, 1], run.printed()
    told = log_of(run_dir, 1 - at_fault).read_text()
    assert f"process {at_fault} o" in told and "could not go on: " in told
    assert "a planted mistake" in told and "lost process" not in told
