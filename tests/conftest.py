"""Fixtures shared by the whole suite."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """The directory of real material that is not part of the repository."""
    path = pathlib.Path(os.environ.get("TINYLLAMA_TEST_DATA", ROOT / "../shared/data")).resolve()
    if not path.is_dir():
        pytest.skip(f"no test material at {path}; set TINYLLAMA_TEST_DATA to its directory")
    return path
