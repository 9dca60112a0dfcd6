"""A disk that fails."""

import pathlib
import shutil
import subprocess

import pytest

SOURCE = pathlib.Path(__file__).with_name("disk.c")


@pytest.fixture(scope="session")
def failing_disk(tmp_path_factory):
    """Gives the environment of a process whose disk fails; disk.c tells of the variables."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a disk that fails is a C library: no cc on PATH")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)

    def environment(fault, path, *, after=0, count=10**6, process=None):
        variables = {
            "LD_PRELOAD": str(library), "FAULT": fault, "FAULT_PATH": path,
            "FAULT_AFTER": str(after), "FAULT_COUNT": str(count),
        }  # fmt: skip
        return variables | ({} if process is None else {"FAULT_PROCESS": str(process)})

    return environment
