"""A run of stages that is killed within and between them goes on as if nothing had been."""

import signal

import pytest

from tests.faults.trainer import logged, losses, saved

STAGED = "tests/faults/staged_config.py"
LAST = 35

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def staged(trainer):
    run_dir = trainer.directory / "staged"
    printed = trainer.finish(run_dir, config=STAGED)
    assert "from step 16: 8 rows a step, code 50%, text 50%, reached over 8 steps" in printed
    assert "from step 31: 16 rows a step, code 30%, text 70%" in printed
    return run_dir


def test_each_stage_reads_its_mixture(staged):
    lines = logged(staged)
    tokens = [int(line["tokens_seen"]) for line in lines if "loss" in line]
    assert tokens == [512 * step for step in range(1, 31)] + [
        512 * (30 + 2 * step) for step in range(1, 6)
    ]
    epochs = {int(line["step"]): line for line in lines if "eval/loss" in line}
    assert list(epochs) == [0, 15, 30, LAST]
    assert float(epochs[15]["epochs/text"]) == 0 < float(epochs[30]["epochs/text"])


@pytest.mark.parametrize("moments", [(7, 20), (15, 33)])
def test_kills_within_and_between_stages_change_nothing(trainer, staged, moments):
    run_dir = trainer.directory / "killed-{}-{}".format(*moments)
    for step in moments:
        run = trainer.start(run_dir, config=STAGED)
        run.until_step(step)
        run.processes[0].send_signal(signal.SIGKILL)
        run.wait()
    trainer.finish(run_dir, config=STAGED)
    assert logged(run_dir) == logged(staged)
    assert saved(run_dir)[LAST] == saved(staged)[LAST]


def test_two_processes_make_the_same_run(trainer, staged):
    run_dir = trainer.directory / "staged pair"
    two = {"processes": 2, "devices": 2}
    flags = ("--config.training.micro_batch_size=1",)
    run = trainer.start(run_dir, *flags, config=STAGED, **two)
    run.until_step(23)
    run.processes[1].send_signal(signal.SIGKILL)
    run.wait()
    trainer.finish(run_dir, *flags, config=STAGED, **two)
    assert losses(run_dir) == pytest.approx(losses(staged), abs=1e-5)
