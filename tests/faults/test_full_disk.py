"""A disk that takes no save: training goes on, and the next save tries again."""

import json

import pytest

from tests.faults.trainer import DOOR, STEPS, log_of, logged, saved
from tinyllama_jax.runs.metrics import read_metrics
from tinyllama_jax.training.diagnosis import examine_run

PAIR = {"processes": 2, "devices": 2}
FLAGS = ("--config.training.micro_batch_size=1",)
FULL = "No space left on device"


@pytest.mark.parametrize(
    "fault, step, paths, reason, options",
    [
        ("full", 20, ["*/20.unsealed*"], FULL, {}),
        # Each finds it full for another part of the step, and must not wait for the other's.
        pytest.param(
            "full", 20, ["*/20.unsealed*/params*", "*/20.unsealed*/training*"], FULL, PAIR,
            marks=pytest.mark.slow,
        ),
        # Nothing can even be begun.
        pytest.param(
            "sealed", 10, ["*/10.unsealed*"], "Operation not permitted", PAIR,
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_one_save_fails(
    trainer, uninterrupted, request, failing_disk, fault, step, paths, reason, options
):
    run_dir = trainer.directory / f"{fault} disk {len(paths)} {len(options)}"
    flags = FLAGS if options else ()
    printed = trainer.finish(run_dir, *flags, environment=failing_disk(fault, *paths), **options)
    told = f"step {step} could not be saved: "
    assert printed.count("could not be saved") == 1
    assert told in printed and reason in printed
    assert f"training goes on, and step {step - 5} is the newest to resume from" in printed
    if options:
        [line] = [line for line in log_of(run_dir, 1).read_text().splitlines() if told in line]
        assert reason in line  # its own or the other's: never what main's cleaning up makes of it
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    [failed] = [record for record in records if "save_failed" in record]
    assert failed["step"] == step and reason in failed["save_failed"]
    [finding] = [finding for finding in examine_run(run_dir) if finding.subject == "saves"]
    assert f"1 failed, the last at step {step} (" in finding.text and finding.level == "warning"
    expected = request.getfixturevalue("pair") if options else uninterrupted
    assert [line for line in logged(run_dir) if "save_failed" not in line] == logged(expected)
    assert saved(run_dir)[STEPS] == saved(expected)[STEPS]


# The door, which makes a mistake at step 23.
MISTAKEN = """
import runpy
from tinyllama_jax.training.timing import StepTimer

count, done = StepTimer.count_step, []

def fail(self, tokens):
    done.append(self)
    if len(done) == 23:
        raise ValueError("a planted mistake")
    count(self, tokens)

StepTimer.count_step = fail
runpy.run_module("tinyllama_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_nobody_stays_for_a_save_that_was_given_up(trainer, failing_disk):
    """Threads of Orbax in the first process wait for the second one, whose disk is full."""
    run_dir = trainer.directory / "given up"
    run = trainer.start(
        run_dir, *FLAGS, **PAIR, environment=failing_disk("full", None, "*/20.unsealed*"),
        program=("-c", MISTAKEN), other_program=DOOR,
    )  # fmt: skip
    assert run.wait(timeout=90) == [1, 1], run.printed()
    printed = log_of(run_dir).read_text()
    assert f"process 1 could not write its part: OSError: [Errno 28] {FULL}" in printed
    assert "error: a planted mistake" in printed
    assert [r["step"] for r in read_metrics(run_dir) if "save_failed" in r] == [20]
