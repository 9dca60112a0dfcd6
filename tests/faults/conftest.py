"""A disk that fails."""

import pathlib
import shutil
import subprocess

import pytest

SOURCE = pathlib.Path(__file__).with_name("disk.c")


@pytest.fixture(scope="session")
def failing_disk(tmp_path_factory):
    """Gives the environment of a process whose disk fails; disk.c tells of the variables.

    `paths`: a pattern for each process at fault, in the order of their numbers; None: not this one.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a disk that fails is a C library: no cc on PATH")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"],
        check=True,
    )

    def environment(fault, *paths, after=0, count=10**6):
        at_fault = {f"FAULT_PATH_{n}": path for n, path in enumerate(paths) if path is not None}
        return at_fault | {
            "LD_PRELOAD": str(library), "FAULT": fault,
            "FAULT_AFTER": str(after), "FAULT_COUNT": str(count),
        }  # fmt: skip

    return environment
