"""Fixtures shared by the whole suite."""

import os
import pathlib

import pytest

from tests.faults.trainer import SAVE_EVERY, STEPS, Trainer, logged, losses, saved

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """The directory of real material that is not part of the repository."""
    path = pathlib.Path(os.environ.get("TINYLLAMA_TEST_DATA", ROOT / "../shared/data")).resolve()
    if not path.is_dir():
        pytest.skip(f"no test material at {path}; set TINYLLAMA_TEST_DATA to its directory")
    return path


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def uninterrupted(trainer):
    """A run of one process on one device that nothing happened to."""
    run_dir = trainer.directory / "uninterrupted"
    trainer.finish(run_dir)
    assert [r["step"] for r in logged(run_dir) if "loss" in r] == [
        str(step) for step in range(1, STEPS + 1)
    ]
    assert saved(run_dir).keys() == {STEPS - SAVE_EVERY, STEPS}
    return run_dir


@pytest.fixture(scope="session")
def pair(trainer, uninterrupted):
    """A run of two processes with two devices each: the run of one device, up to rounding."""
    run_dir = trainer.directory / "pair"
    trainer.finish(run_dir, "--config.training.micro_batch_size=1", processes=2, devices=2)
    assert losses(run_dir) == pytest.approx(losses(uninterrupted), abs=1e-5)
    return run_dir
