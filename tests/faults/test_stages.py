"""A run of stages that is killed within and between them goes on as if nothing had been."""

import signal

import pytest

from tests.faults.trainer import logged, losses, saved

STAGED = "tests/faults/staged_config.py"
LAST = 35


@pytest.fixture(scope="module")
def staged(trainer):
    run_dir = trainer.directory / "staged"
    printed = trainer.finish(run_dir, config=STAGED)
    assert "stage2, from batch 15 on: 8 rows each, code 50%, text 50%, reached over 8\n" in printed
    assert "stage3, from batch 30 on: 16 rows each, code 30%, text 70%\n" in printed
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


def test_kills_within_and_between_stages_change_nothing(trainer, staged):
    run_dir = trainer.directory / "killed in stages"
    for step in (7, 15, 20, 33):
        run = trainer.start(run_dir, config=STAGED)
        run.until_step(step)
        run.processes[0].send_signal(signal.SIGKILL)
        run.wait()
    trainer.finish(run_dir, config=STAGED)
    assert logged(run_dir) == logged(staged)
    assert saved(run_dir)[LAST] == saved(staged)[LAST]


def test_batches_left_out_over_a_border_stay_left_out(trainer):
    """Rewound from step 22 to 10, and past the last two batches of a stage and two of the next."""
    run_dir, expected = trainer.directory / "rewound stages", trainer.directory / "never seen"
    run = trainer.start(run_dir, config=STAGED)
    run.until_step(22)
    run.processes[0].send_signal(signal.SIGKILL)
    run.wait()
    trainer.finish(run_dir, "--resume=10", "--skip_steps=13:17", config=STAGED)
    trainer.finish(expected, "--config.data.skip=13:17", config=STAGED)
    assert logged(run_dir) == logged(expected)
    # 13 steps of the first stage, 13 of the second: the third, of larger batches, has the others.
    assert saved(run_dir)[33] == saved(expected)[33]
    steps = [line for line in logged(run_dir) if "loss" in line]
    assert int(steps[-1]["tokens_seen"]) == 40 * 512
    assert [int(line["tokens_seen"]) for line in steps[25:28]] == [26 * 512, 28 * 512, 30 * 512]


@pytest.mark.slow
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
