"""Preparation as an Apache Beam pipeline: the units of `prepare`, given to an engine.

Every worker must have this package and see the same paths: raw text to read, and the prepared
directory to write to. Beam starts a unit again elsewhere where one fails; the bytes are the same.
Needs the `[beam]` extra.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinyllama_jax.data.units import Advance, Unit, read_record, write_unit
from tinyllama_jax.text.tokenizer import Tokenizer


def run_units(
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    workers: int,
    advance: Advance,
    *,
    beam_flags: Sequence[str] = (),
) -> None:
    """Writes all units by a pipeline, and returns when it has ended.

    Args:
      units: what is to be written.
      tokenizer: for all of them.
      workers: of the direct runner; other runners have flags of their own.
      advance: told of all that was written, at the end: Beam's monitoring shows the rest.
      beam_flags: as `--runner=FlinkRunner --flink_master=host:8081`; none: on this machine.

    Raises:
      ValueError: the `[beam]` extra is not installed.
      RuntimeError: the pipeline failed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(
            f"--runner=beam needs Apache Beam ({error}): pip install 'tinyllama_jax[beam]'"
        ) from error

    local = ["--runner=DirectRunner", f"--direct_num_workers={workers}"]
    local.append("--direct_running_mode=multi_processing")
    with apache_beam.Pipeline(options=PipelineOptions(list(beam_flags) or local)) as pipeline:
        _ = (
            pipeline
            | apache_beam.Create(list(units))
            | apache_beam.Reshuffle()  # else one worker may be given all
            | apache_beam.Map(_write, tokenizer=tokenizer)
        )
    for unit in units:
        record = read_record(unit)
        tokens = sum(entry.tokens for entry in record.shards.values()) if record else 0
        advance(unit.bytes, tokens)


def _write(unit: Unit, tokenizer: Tokenizer) -> int:
    if read_record(unit) is None:  # else a worker that was given up has ended it
        write_unit(unit, tokenizer, lambda count_bytes, count_tokens: None)
    return unit.index
