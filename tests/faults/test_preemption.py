"""A process that is asked to end saves its step, exits with 75, and the next start goes on."""

import signal
import time

import pytest

from tests.faults.trainer import STEPS, last_step, logged, saved

PAIR = {"processes": 2, "devices": 2}
ONE_ROW = "--config.training.micro_batch_size=1"


def preempt(trainer, run_dir, number, step, which=0, flags=(), **options):
    """Signals one process once a step is logged; returns the step that all saved."""
    run = trainer.start(run_dir, *flags, **options)
    run.until_step(step)
    began = time.monotonic()
    run.processes[which].send_signal(number)
    codes = run.wait()
    assert time.monotonic() - began < 30
    assert set(codes) == {75}, (codes, run.printed())
    newest = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    assert f"asked to end at step {newest}; start the same command again" in run.printed()
    # Nothing that was logged is lost, and the step that was under way is kept too.
    assert last_step(run_dir) == newest >= step
    assert (run_dir / f"checkpoints/{newest}/integrity.json").exists()
    assert not (run_dir / "LOCK").exists()
    return newest


def test_one_process_saves_and_exits_with_75(trainer, uninterrupted):
    run_dir = trainer.directory / "preempted"
    preempt(trainer, run_dir, signal.SIGTERM, 7)
    newest = preempt(trainer, run_dir, signal.SIGUSR1, 21)
    assert f"resumed from step {newest}\n" in trainer.finish(run_dir)
    assert logged(run_dir) == logged(uninterrupted)
    assert saved(run_dir)[STEPS] == saved(uninterrupted)[STEPS]


def test_asked_twice_at_once_is_asked_once(trainer):
    """As whoever signals a group of processes does to one that its launcher signals too."""
    run_dir = trainer.directory / "asked twice"
    run = trainer.start(run_dir)
    run.until_step(7)
    for _ in range(2):
        run.processes[0].send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert run.wait() == [75], run.printed()


@pytest.mark.parametrize(
    "options", [{}, pytest.param(PAIR, marks=pytest.mark.slow)], ids=["one", "pair"]
)
def test_asked_before_the_first_step_of_a_resumed_run(trainer, options):
    run_dir = trainer.directory / f"asked early {len(options)}"
    newest = preempt(trainer, run_dir, signal.SIGTERM, 7, flags=[ONE_ROW], **options)
    run = trainer.start(run_dir, ONE_ROW, **options)
    deadline = time.monotonic() + 60
    while run.printed().count("read step") < 1:  # restored, not compiled yet
        assert time.monotonic() < deadline
        time.sleep(0.002)
    run.processes[-1].send_signal(signal.SIGTERM)
    assert set(run.wait()) == {75}, run.printed()
    # Where it takes a second until jax hears of it, some steps more are done.
    assert newest < last_step(run_dir) < STEPS


# The door, with held-out text that takes minutes from the evaluation of step 15, or 40, on.
LONG_EVALUATION = """
import itertools, runpy
from tinyllama_jax.data import dataset

batches, calls = dataset.ValidationDataset.batches, itertools.count()

def long_batches(self, rows):
    times = 1 if next(calls) < BEFORE else 10**6
    return itertools.chain.from_iterable(itertools.repeat(list(batches(self, rows)), times))

dataset.ValidationDataset.batches = long_batches
runpy.run_module("tinyllama_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "step, before, options",
    [
        (15, 2, {}),  # two sources, evaluated before the first step too
        (40, 6, {}),
        pytest.param(40, 6, PAIR, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_is_left_and_made_up_for(
    trainer, uninterrupted, request, step, before, options
):
    run_dir = trainer.directory / f"evaluating {step} {len(options)}"
    program = ("-c", LONG_EVALUATION.replace("BEFORE", str(before)))
    flags = [ONE_ROW] if options else []
    newest = preempt(
        trainer, run_dir, signal.SIGTERM, step, which=-1, flags=flags, program=program, **options
    )
    assert newest == step
    trainer.finish(run_dir, *flags, **options)
    expected = request.getfixturevalue("pair") if options else uninterrupted
    assert logged(run_dir) == logged(expected)
    assert saved(run_dir)[STEPS] == saved(expected)[STEPS]


@pytest.mark.slow
def test_all_processes_save_the_same_step_whichever_was_asked(trainer, pair):
    run_dir = trainer.directory / "preempted pair"
    preempt(trainer, run_dir, signal.SIGTERM, 7, which=1, flags=[ONE_ROW], **PAIR)
    newest = preempt(trainer, run_dir, signal.SIGUSR1, 21, which=0, flags=[ONE_ROW], **PAIR)
    assert f"resumed from step {newest}\n" in trainer.finish(run_dir, ONE_ROW, **PAIR)
    assert logged(run_dir) == logged(pair)
    assert saved(run_dir)[STEPS] == saved(pair)[STEPS]
