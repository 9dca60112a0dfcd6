"""A disk that does not answer, or answers with errors, costs a run nothing but the wait."""

import pathlib
import re
import shutil
import subprocess

import pytest

from tests.faults.trainer import logged, saved

SOURCE = pathlib.Path(__file__).with_name("disk.c")


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory):
    """Environment of a process whose reads of shards fail."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a disk that fails is a C library: no cc on PATH")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)

    def environment(fault, path, after, count):
        return {
            "LD_PRELOAD": str(library), "FAULT": fault, "FAULT_PATH": path,
            "FAULT_AFTER": str(after), "FAULT_COUNT": str(count),
        }  # fmt: skip

    return environment


HANGS = "was not read within 2 s (a disk that does not answer?): its reader is left"
FAILS = "cannot be read: pread() failed: Input/output error"


@pytest.mark.parametrize(
    "fault, path, after, count, told",
    [
        ("hang", "/train/", 9, 1, [rf"the batch after step \d+ {re.escape(HANGS)}"]),
        ("hang", "/validation/", 1, 1, [f"code: validation batch 0 {re.escape(HANGS)}"]),
        # Once within a shard, and once as it is opened again.
        (
            "error", "/train/", 9, 2,
            [
                rf"the batch after step \d+ could not be read \(page .*/train/.* {re.escape(FAILS)}"
                r".*look whether its disk is there\); trying again in 1 s",
                r"could not be read \(\[Errno 5\] Input/output error\); trying again in 4 s",
            ],
        ),
    ],
)  # fmt: skip
def test_the_stream_is_the_same(
    trainer, uninterrupted, failing_disk, fault, path, after, count, told
):
    run_dir = trainer.directory / f"disk {fault} {path.strip('/')}"
    environment = failing_disk(fault, path, after, count)
    printed = trainer.finish(run_dir, "--config.watchdog.seconds=8", environment=environment)
    for line in told:
        assert len(re.findall(line, printed)) == 1, printed
    assert logged(run_dir) == logged(uninterrupted)
    assert saved(run_dir) == saved(uninterrupted)
