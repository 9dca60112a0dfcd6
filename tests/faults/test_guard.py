"""A run whose loss is no longer a number ends with the batch, and jumps over data when told."""

import json
import re
import signal
import time

from tests.faults.trainer import STEPS, logged, saved


def test_too_many_skipped_steps_end_the_run(trainer):
    run_dir = trainer.directory / "diverged"
    run = trainer.start(
        run_dir, "--config.optimizer.learning_rate=1e30", "--config.guard.max_consecutive=4"
    )
    assert run.wait() == [1], run.printed()
    printed = run.printed()
    assert "is the 4th in a row that was skipped (loss " in printed and "norm nan;" in printed
    assert "--resume=STEP --skip_steps=" in printed and "Traceback" not in printed
    documents = printed.partition("Documents of the last batch's first rows:")[2]
    assert re.search(r"- (code|text): \w+\.py, record 0\n", documents), documents
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "loss" in line][-1] == 3  # the 4th ends it


def test_batches_that_were_left_out_stay_left_out(trainer):
    """Rewound from step 22 to 15 and past three batches; a later start needs not be told again."""
    run_dir, expected = trainer.directory / "rewound", trainer.directory / "never seen"
    run = trainer.start(run_dir)
    run.until_step(22)
    run.processes[0].send_signal(signal.SIGKILL)
    run.wait()
    refused = trainer.start(run_dir, "--resume=15", "--skip_steps=12:15")
    assert refused.wait() == [1] and "leaves out other batches before step 15" in refused.printed()
    # Killed before the first save after the rewind: the newest step of the old path is out of it.
    run = trainer.start(run_dir, "--resume=15", "--skip_steps=15:18")
    while "resumed from step 15" not in run.printed():
        time.sleep(0.002)
    run.processes[0].send_signal(signal.SIGKILL)
    run.wait()
    run = trainer.start(run_dir)
    run.until_step(28)
    run.processes[0].send_signal(signal.SIGKILL)
    run.wait()
    assert json.loads((run_dir / "config.json").read_text())["data"]["skip"] == "15:18"
    printed = trainer.finish(run_dir)
    assert re.search(r"resumed from step (15|20|25|30|35)\n", printed), printed
    trainer.finish(expected, "--config.data.skip=15:18")
    assert logged(run_dir) == logged(expected)
    assert saved(run_dir)[STEPS] == saved(expected)[STEPS]
