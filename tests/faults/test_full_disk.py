"""A disk that takes no save: training goes on, and the next save tries again."""

import pytest

from tests.faults.trainer import STEPS, log_of, logged, saved

PAIR = {"processes": 2, "devices": 2}


@pytest.mark.parametrize(
    "options, process, flags",
    [
        ({}, None, ()),
        # Where only one finds it full, the other must not wait for it.
        pytest.param(PAIR, 0, ("--config.training.micro_batch_size=1",), marks=pytest.mark.slow),
        pytest.param(PAIR, 1, ("--config.training.micro_batch_size=1",), marks=pytest.mark.slow),
    ],
)
def test_one_save_fails(trainer, uninterrupted, request, failing_disk, options, process, flags):
    run_dir = trainer.directory / f"full disk {process}"
    environment = failing_disk("full", "/checkpoints/20.unsealed", process=process)
    printed = trainer.finish(run_dir, *flags, environment=environment, **options)
    assert printed.count("could not be saved") == 1
    assert "step 20 could not be saved: " in printed and "No space left on device" in printed
    assert "training goes on, and step 15 is the newest to resume from" in printed
    if process == 1:
        assert "process 1 could not write its part: " in printed
        assert "step 20 could not be saved: " in log_of(run_dir, 1).read_text()
    expected = request.getfixturevalue("pair") if options else uninterrupted
    assert logged(run_dir) == logged(expected)
    assert saved(run_dir)[STEPS] == saved(expected)[STEPS]
