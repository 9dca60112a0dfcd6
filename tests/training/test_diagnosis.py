"""What doctor tells of a run, from files with known numbers."""

import json

import pytest

from tinyllama_jax import doctor
from tinyllama_jax.config import Config, LoggingConfig, TrainingConfig
from tinyllama_jax.runs.directory import write_config
from tinyllama_jax.runs.lock import RunLock
from tinyllama_jax.training.diagnosis import examine_run

BEGAN = 1_700_000_000  # 2023-11-14T22:13:20Z


def line(step, time, seconds=10.0, **more):
    return {
        "step": step, "tokens_seen": step * 100, "loss": 3.0, "tokens_per_second": 100 / seconds,
        "step_seconds": seconds, "data_wait_seconds": 0.1, "time": BEGAN + time, "skipped_steps": 0,
    } | more  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    """Two starts: ten steps of 10 s, of which two are done again; then ten more, one slow."""
    write_config(
        tmp_path,
        Config(
            training=TrainingConfig(train_tokens=2000, global_batch_tokens=100),
            logging=LoggingConfig(every_steps=1),
        ),
    )
    started = ["2023-11-14T22:13:20+0000", "2023-11-14T22:20:00+0000"]
    (tmp_path / "environment.json").write_text(json.dumps([{"started": s} for s in started]))
    kept = [line(step, 50 + 10 * step) for step in range(1, 9)]
    kept += [line(9, 460, checkpoint_stall_seconds=4.0), line(10, 480, 20.0, skipped_steps=1)]
    kept += [line(step, 480 + 10 * (step - 10), skipped_steps=1) for step in range(11, 19)]
    discarded = [line(step, 50 + 10 * step) for step in (9, 10)]
    for name, records in (("metrics.jsonl", kept), ("metrics.discarded.jsonl", discarded)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def told(run_dir):
    return {finding.subject: finding.text for finding in examine_run(run_dir)}


def test_time_is_accounted_for(run_dir):
    found = told(run_dir)
    assert found["run"] == "stopped; step 18 of 20 (90.0%), loss 3.0000"
    assert found["starts"] == "2, the last on 2023-11-14 22:20:00; 2 steps were done again"
    # 560 s in all: 17 steps of 10 s and one of 20, two again, a stall of 4 s, and the rest.
    assert found["time"].startswith("0:09:20 since the first start: 0:03:10 in steps that count")
    assert (
        "(33.9%), 0:00:20 in steps done again, 0:00:04 held up by saves, 0:05:46 in"
        in (found["time"])
    )
    assert found["speed"] == (
        "10 tokens/s in the median; slower than 80% of it at 1 of 18 logged steps, the longest "
        "stretches at 10"
    )
    assert found["skipped"].startswith("1 steps changed nothing")
    assert found["saves"].startswith("1, which held training up for 4.00 s")
    assert found["checkpoints"].startswith("none yet")
    assert "watchdog" not in found


def test_what_goes_on_and_what_went_wrong(run_dir, capsys):
    (run_dir / "stacks.txt").write_text("...")
    step = run_dir / "checkpoints/15"
    step.mkdir(parents=True)
    with RunLock(run_dir):
        found = told(run_dir)
    assert found["run"].startswith("running; ") and "writes to it" in found["run"]
    assert "stacks.txt" in found["watchdog"]
    assert found["checkpoints"].startswith("none is whole: step 15: it was never sealed")
    with pytest.raises(SystemExit, match="1"):
        doctor.main(["doctor", str(run_dir)])
    assert "[FAIL] checkpoints: none is whole" in capsys.readouterr().out


def test_saves_that_failed_are_told_with_the_reason(run_dir, capsys):
    failed = {"step": 9, "tokens_seen": 900, "save_failed": "no space", "time": BEGAN + 470}
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(failed) + "\n")
    assert told(run_dir)["saves"].endswith(
        "4.00 s at most; 1 failed, the last at step 9 (no space), and none has succeeded since: "
        "make room, or make it writable"
    )
    with pytest.raises(SystemExit, match="1"):
        doctor.main(["doctor", str(run_dir)])
    assert "[FAIL] saves: 1, which" in capsys.readouterr().out
    (run_dir / "checkpoints/5").mkdir(parents=True)  # of a later start from an earlier step
    (run_dir / "checkpoints/5/integrity.json").touch()
    discarded = {"step": 9, "save_failed": "an older one", "time": BEGAN + 100}
    with open(run_dir / "metrics.discarded.jsonl", "a") as file:
        file.write(json.dumps(discarded) + "\n")
    [finding] = [f for f in examine_run(run_dir) if f.subject == "saves"]
    assert finding.text.endswith("2 failed, the last at step 9 (no space)")
    assert finding.level == "warning"


def test_a_run_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="there is no run directory at"):
        doctor.main(["doctor", str(tmp_path / "no")])
