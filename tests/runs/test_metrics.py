"""metrics.jsonl: what is written, what a rewind moves, what a full disk does."""

import json
import math
import os
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.runs.metrics import DISCARDED, EVENTS, METRICS, MetricsWriter, read_metrics


def write_steps(run_dir, steps, tensorboard=False):
    with MetricsWriter(run_dir, tensorboard) as writer:
        for step in steps:
            writer.write({"step": step, "loss": step / 3})


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=100) * 10.0 ** np.linspace(-30, 30, 100)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, value in enumerate(values):
            writer.write({"step": step, "loss": value, "single": np.float32(value)})
    records = read_metrics(tmp_path)
    assert [record["loss"] for record in records] == values.tolist()
    assert [record["single"] for record in records] == values.astype(np.float32).tolist()


def test_jax_scalars_and_values_that_json_lacks(tmp_path):
    record = {"step": np.int64(3), "a": jnp.float32(jnp.nan), "b": math.inf, "c": -math.inf}
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(record)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read.pop("a"))
    assert read == {"step": 3, "b": math.inf, "c": -math.inf}


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write({"step": 1, "loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_rewind_moves_later_lines(tmp_path):
    write_steps(tmp_path, range(10))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.rewind(6)
        writer.write({"step": 7, "loss": 0.0})
    assert steps_in(tmp_path / METRICS) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert steps_in(tmp_path / DISCARDED) == [7, 8, 9]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.rewind(2)
    assert steps_in(tmp_path / METRICS) == [0, 1, 2]
    assert steps_in(tmp_path / DISCARDED) == [7, 8, 9, 3, 4, 5, 6, 7]


def test_rewind_to_zero_starts_over(tmp_path):
    write_steps(tmp_path, range(3))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.rewind(0)
        writer.write({"step": 0, "loss": 1.0})
    assert steps_in(tmp_path / METRICS) == [0]
    assert steps_in(tmp_path / DISCARDED) == [0, 1, 2]


def test_rewind_without_later_lines_changes_nothing(tmp_path):
    write_steps(tmp_path, range(4))
    before = (tmp_path / METRICS).read_bytes()
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.rewind(3)
    assert (tmp_path / METRICS).read_bytes() == before
    assert not (tmp_path / DISCARDED).exists()


def test_a_torn_last_line_is_read_past_and_moved(tmp_path):
    write_steps(tmp_path, range(3))
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-5])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:  # even if nobody rewinds
        writer.write({"step": 2, "loss": 0.5})
    assert steps_in(path) == [0, 1, 2]
    assert (tmp_path / DISCARDED).read_text().startswith('{"step": 2')


def test_a_damaged_line_within_is_named_when_read_and_moved_when_rewound(tmp_path):
    write_steps(tmp_path, range(3))
    path = tmp_path / METRICS
    path.write_text(path.read_text().replace('{"step": 1', '{"st\0p": 1'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a metrics record"):
        read_metrics(tmp_path)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.rewind(2)
    assert steps_in(path) == [0, 2]


def test_no_metrics_yet(tmp_path):
    with pytest.raises(ValueError, match="no training step of this run was logged yet"):
        read_metrics(tmp_path)


def test_a_record_needs_a_step(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(AssertionError):
        writer.write({"loss": 1.0})


def test_a_full_disk_loses_no_record_and_ends_nothing(tmp_path, capsys):
    """The limit on file size stands in for a full disk: a write is cut short, then refused."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write({"step": 0, "loss": 0.5})
        size = os.path.getsize(tmp_path / METRICS)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            writer.write({"step": 1, "loss": 0.25})
            writer.write({"step": 2, "loss": 0.125})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert steps_in(tmp_path / METRICS) == [0]
        writer.write({"step": 3, "loss": 0.0})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [0.5, 0.25, 0.125, 0.0]
    assert capsys.readouterr().err.count("training goes on") == 1


def test_a_kill_loses_at_most_the_last_line(tmp_path):
    program = (
        "import itertools, sys\nfrom tinyllama_jax.runs.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], tensorboard=False)\n"
        "for step in itertools.count():\n"
        "    writer.write({'step': step, 'loss': 1 / (step + 1)})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    printed = "".join(process.stdout.readline() for _ in range(200))
    process.kill()
    printed += process.stdout.read()
    process.wait()
    acknowledged = int(printed.split("\n")[-2])  # the last that ends with a newline
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > acknowledged


def read_events(run_dir):
    """The events of a run by TensorBoard's file format: length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((run_dir / EVENTS).iterdir()):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            length = int.from_bytes(data[offset : offset + 8], "little")
            events.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
            offset += 12 + length + 4
    return events


def test_tensorboard_gets_the_same_scalars_as_they_come(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write({"step": 5, "tokens_seen": 10, "loss": 0.5, "eval/text/loss": 2.0})
        events = read_events(tmp_path)  # flushed, for whoever looks while it trains
    scalars = {v.tag: v.simple_value for v in events[-1].summary.value}
    assert events[-1].step == 5
    assert scalars == {"tokens_seen": 10.0, "loss": 0.5, "eval/text/loss": 2.0}


def test_tensorboard_is_told_of_a_rewind(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    write_steps(tmp_path, range(5), tensorboard=True)
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.rewind(2)
        writer.write({"step": 3, "loss": 0.5})
    starts = [e for e in read_events(tmp_path) if e.session_log.status == SessionLog.START]
    assert [event.step for event in starts] == [3]
