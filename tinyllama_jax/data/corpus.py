"""The prepared corpus of a run, opened: its streams, their weights, and what is held out."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from tinyllama_jax.config import Config, SourceConfig, Stage
from tinyllama_jax.config_text import named_weights
from tinyllama_jax.data.dataset import OwnRows, TrainingDataset, ValidationDataset
from tinyllama_jax.data.mixture import divided, millionths
from tinyllama_jax.data.order import Change, RowOrder
from tinyllama_jax.data.prepared import is_prepared, plan_of, streams_of
from tinyllama_jax.data.stream import ShardReaders, Stream, Windows
from tinyllama_jax.text.tokenizer import Tokenizer

_MAX_WINDOWS = 2**32 - 1  # Grain's shuffle permutes 32-bit indices


class Datasets(NamedTuple):
    """What a run reads."""

    training: TrainingDataset
    validation: dict[str, ValidationDataset]  # by stream; none for one that holds nothing out


def open_datasets(
    config: Config,
    prepared: Mapping[str, pathlib.Path],
    tokenizer_sha256: str,
    own_rows: OwnRows = range,
) -> Datasets:
    """Opens the prepared sources of a run and checks that they are what its config means.

    Args:
      config: the run's settings.
      prepared: the prepared directory of each stream, which holds `train` and `validation`; a
        source NAME is one stream NAME, or NAME.SUBSET for each of its subsets.
      tokenizer_sha256: of the tokenizer that the run will use.
      own_rows: as `TrainingDataset`.

    Raises:
      FileNotFoundError, DamagedDataError: prepared data is absent or not what was written.
      ValueError: the data does not fit the config, all reasons at once.
    """
    readers = ShardReaders()
    # Several readers have their turn before the watchdog ends the process.
    patience = config.watchdog.seconds / 4 or None
    streams_by_source: dict[str, dict[str, Stream]] = {}
    validation: dict[str, ValidationDataset] = {}
    problems: list[str] = []
    shares = _source_shares(config, "")
    for source in config.data.sources:
        streams = _training_streams(source, prepared, readers, config, problems)
        streams_by_source[source.name] = streams
        share = shares[source.name]
        weights = _weights(source, share, streams, problems)
        for name, stream in streams.items():
            problems += _problems(stream, config, tokenizer_sha256)
            if source.validation_fraction == 0:
                continue
            held_out = Stream(pathlib.Path(prepared[name]) / "validation", readers)
            problems += _problems(held_out, config, tokenizer_sha256)
            if held_out.num_tokens > 1:
                # What is enough for a source is enough for its subsets together.
                part = weights.get(name, 0) / share
                validation[name] = ValidationDataset(
                    held_out, seq_len=config.data.seq_len,
                    max_tokens=math.ceil(config.evaluation.tokens * part),
                    weight=weights.get(name, 0), own_rows=own_rows, patience=patience,
                )  # fmt: skip
    changes = [_change(config, stage, streams_by_source, problems) for stage in config.timeline]
    if problems:
        unique = dict.fromkeys(problems)  # each stage may find the same
        raise ValueError("\n".join(["the prepared data does not fit the config:", *unique]))
    training = TrainingDataset(
        {name: stream for of in streams_by_source.values() for name, stream in of.items()},
        RowOrder(changes, config.data.skip),
        seq_len=config.data.seq_len,
        seed=config.data.seed,
        own_rows=own_rows,
        patience=patience,
    )
    return Datasets(training, validation)


def open_prepared(config: Config, tokenizer: Tokenizer) -> Datasets:
    """As `open_datasets`, of what is prepared already; raises ValueError where it is not."""
    prepared: dict[str, pathlib.Path] = {}
    for source in config.data.sources:
        directory = plan_of(source, config.data, tokenizer).directory
        if not is_prepared(source, directory):
            raise ValueError(
                f"{source.name} is not prepared in {directory}; run python -m "
                f"tinyllama_jax.prepare with the same config"
            )
        prepared |= streams_of(source, directory)
    return open_datasets(config, prepared, tokenizer.sha256)


def _training_streams(
    source: SourceConfig,
    prepared: Mapping[str, pathlib.Path],
    readers: ShardReaders,
    config: Config,
    problems: list[str],
) -> dict[str, Stream]:
    """The streams of a source by name; a subset of less than a window is told and left out."""
    names = [source.name]
    if source.subset_key:
        names = [name for name in prepared if name.startswith(f"{source.name}.")]
    streams: dict[str, Stream] = {}
    too_short = []
    for name in names:
        stream = Stream(pathlib.Path(prepared[name]) / "train", readers)
        num_windows = len(Windows(stream, config.data.seq_len))
        if not num_windows and source.subset_key:
            too_short.append(f"{name} ({stream.num_tokens} tokens)")
            continue
        streams[name] = stream
        if not 0 < num_windows <= _MAX_WINDOWS:
            problems.append(
                f"  - {stream.directory} holds {stream.num_tokens} tokens: {num_windows} windows "
                f"of data.seq_len + 1 = {config.data.seq_len + 1}, but a source needs 1 to "
                f"{_MAX_WINDOWS}; add text to data.sources.{source.name}, or set data.seq_len"
            )
    if too_short:
        print(f"left out, being less than a window: {', '.join(too_short)}", flush=True)
    if not streams:
        problems.append(f"  - data.sources.{source.name}: no subset has a window to train on")
    return streams


def _source_shares(config: Config, weights: str) -> dict[str, int]:
    """The millionths of each source that is read, by a stage's weights or the sources' own."""
    given = named_weights(weights) or {s.name: s.weight for s in config.data.sources}
    return dict(zip(given, millionths(list(given.values())), strict=True))


def _change(
    config: Config, stage: Stage, streams: Mapping[str, Mapping[str, Stream]], problems: list[str]
) -> Change:
    """What a stage reads."""
    weights: dict[str, int] = {}
    shares = _source_shares(config, stage.settings.weights)
    for source in config.data.sources:
        if source.name in shares:
            weights |= _weights(source, shares[source.name], streams[source.name], problems)
    ramp_batches = -(-stage.settings.ramp_tokens // stage.batch_tokens)
    name = stage.settings.name
    return Change(stage.first_batch, stage.batch_rows, weights, ramp_batches, name)


def _weights(
    source: SourceConfig, share: int, streams: Mapping[str, Stream], problems: list[str]
) -> dict[str, int]:
    """What each stream gets of the millionths of a source: by `subset_weights`, or its tokens."""
    if not streams:
        return {}
    given = {f"{source.name}.{k}": w for k, w in named_weights(source.subset_weights).items()}
    weights = given or {name: stream.num_tokens for name, stream in streams.items()}
    if weights.keys() != streams.keys():
        problems.append(
            f"  - data.sources.{source.name}.subset_weights gives weights to "
            f"{', '.join(sorted(weights))}, but there are {', '.join(sorted(streams))}; weigh "
            f"each of them, or leave the rest out by data.sources.{source.name}.subsets"
        )
        return {}
    try:
        parts = divided(share, [weights[name] for name in streams])
    except ValueError as error:
        problems.append(f"  - data.sources.{source.name}: {error}")
        return {}
    return dict(zip(streams, parts, strict=True))


def _problems(stream: Stream, config: Config, tokenizer_sha256: str) -> list[str]:
    """What speaks against reading a stream in this run."""
    manifest, problems = stream.manifest, []
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        problems.append(
            f"  - {stream.directory} was prepared with the tokenizer of sha256 "
            f"{manifest.tokenizer_sha256}, but data.tokenizer has sha256 {tokenizer_sha256}: its "
            f"ids would mean other text; set data.tokenizer to the former, or run "
            f"python -m tinyllama_jax.prepare with the latter"
        )
    if manifest.vocab_size > config.model.vocab_size:
        problems.append(
            f"  - {stream.directory} has ids up to {manifest.vocab_size - 1}, but "
            f"model.vocab_size = {config.model.vocab_size} has no embedding for them; set "
            f"model.vocab_size = {manifest.vocab_size}"
        )
    if manifest.boundary != config.data.boundary:
        problems.append(
            f'  - {stream.directory} marks documents by "{manifest.boundary}", but data.boundary '
            f'= "{config.data.boundary}"; set data.boundary = "{manifest.boundary}", or run '
            f"python -m tinyllama_jax.prepare again"
        )
    return problems
