"""A disk that does not answer, or answers with errors, costs a run nothing but the wait."""

import re

import pytest

from tests.faults.trainer import logged, saved

HANGS = "was not read within 2 s (a disk that does not answer?): its reader is left"
FAILS = "cannot be read: pread() failed: Input/output error"


@pytest.mark.parametrize(
    "fault, path, after, count, told",
    [
        ("hang", "*/train/*", 0, 1, [rf"the batch after step 0 {re.escape(HANGS)}"]),
        ("hang", "*/train/*", 9, 1, [rf"the batch after step \d+ {re.escape(HANGS)}"]),
        ("hang", "*/validation/*", 1, 1, [f"code: validation batch 0 {re.escape(HANGS)}"]),
        # Once within a shard, and once as it is opened again.
        (
            "error", "*/train/*", 9, 2,
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
    run_dir = trainer.directory / f"disk {fault} {path.strip('*/')} {after}"
    environment = failing_disk(fault, path, after=after, count=count)
    printed = trainer.finish(run_dir, "--config.watchdog.seconds=8", environment=environment)
    for line in told:
        assert len(re.findall(line, printed)) == 1, printed
    assert logged(run_dir) == logged(uninterrupted)
    assert saved(run_dir) == saved(uninterrupted)
