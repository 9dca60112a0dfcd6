"""Preparing and loading: ours beside SentencePiece, Hugging Face tokenizers, NumPy and Grain.

All on one core. Before anything is timed, every contender must give the same ids.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyllama_jax.benchmarks.rounds import Timing, attempt, ratio
from tinyllama_jax.config import Config, DataConfig, ModelConfig, SourceConfig, TrainingConfig
from tinyllama_jax.data.pages import PAGE_TOKENS, page_dtype
from tinyllama_jax.data.prepare import prepare_sources
from tinyllama_jax.data.sources import Tally, list_inputs, read_documents
from tinyllama_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # grain is imported where it is used: the other benchmarks need none
    from tinyllama_jax.data.dataset import TrainingDataset

OURS = "ours"
AGAIN = "ours, once more"
RESUMED_STEP = 1_000_000
_BATCH_ROWS = 64

Encode = Callable[[Sequence[str]], list[np.ndarray]]


def encoding(
    source: SourceConfig, tokenizer: Tokenizer, *, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Times the tokenization of a source's text: each round the next part of it, for all.

    So ours meets new words in each round, as it does while a corpus is prepared; what it has met
    in earlier ones it knows. A large corpus lies between this and the second time (`AGAIN`), where
    each word has been met.

    Returns:
      A row per contender: Mtokens/s of one core (median, least, most), and how many times faster
      ours is; and by name, why a contender is absent.

    Raises:
      ValueError: a contender gave other ids than SentencePiece.
    """
    texts = [d.text for e in list_inputs(source) for d in read_documents(source, e, Tally())]
    parts = [texts[number :: rounds + 1] for number in range(rounds + 1)]
    if not all(parts):
        raise ValueError(f"{len(texts)} documents are too few for {rounds} rounds; set --rounds")
    contenders: dict[str, Encode] = {
        OURS: tokenizer.encode_batch,
        "SentencePiece": _by_sentencepiece(tokenizer),
    }
    absent: dict[str, str] = {}
    name = "Hugging Face tokenizers"
    by_tokenizers = attempt(name, functools.partial(_by_tokenizers, tokenizer), absent)
    if by_tokenizers is not None:
        contenders[name] = by_tokenizers
    contenders[AGAIN] = tokenizer.encode_batch  # after the others, and so after ours
    expected = contenders["SentencePiece"](parts[0])
    for name, encode in contenders.items():
        found = encode(parts[0])
        if not all(map(np.array_equal, found, expected)):
            raise ValueError(f"{name} gives other ids than SentencePiece: there is nothing to time")
    tokens = [0] * rounds
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, encode in contenders.items():
            began = time.perf_counter()
            ids = encode(parts[number + 1])
            seconds[name].append(time.perf_counter() - began)
            tokens[number] = sum(map(len, ids))
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    rows = []
    for name, timing in timings.items():
        rates = [n / s / 1e6 for n, s in zip(tokens, timing.seconds, strict=True)]
        rows.append(
            {
                "pass": "encoding", "contender": name,
                "mtokens_per_second": float(np.median(rates)), "least": min(rates),
                "most": max(rates),
                "ours_is_faster_by": ratio(timings[OURS], timing),
            }
        )  # fmt: skip
    return rows, absent


def loading(
    source: SourceConfig, tokenizer: str, directory: pathlib.Path, *, seq_len: int, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Times the reading of shuffled windows, in one thread.

    Args:
      source: the text, which is prepared first.
      tokenizer: as `data.tokenizer`.
      directory: where that goes.
      seq_len: of the windows.
      rounds: how often all contenders read.

    Returns:
      A row per contender: windows/s (median, least, most), tokens per second of processor time,
      and how many times faster ours is; and what else was measured of ours: `first_batch_seconds`,
      `resume_seconds` (both with opening), `adjacent_correlation` of windows that follow each
      other.

    Raises:
      ValueError: a contender gave other ids than ours.
    """
    from tinyllama_jax.data.corpus import open_datasets

    data = DataConfig(
        sources=(dataclasses.replace(source, validation_fraction=0.0),),
        tokenizer=tokenizer, prepared=str(directory), seq_len=seq_len,
    )  # fmt: skip
    vocab_size, sha256 = Tokenizer(tokenizer).vocab_size, Tokenizer(tokenizer).sha256
    config = Config(
        data=data,
        model=ModelConfig(vocab_size=vocab_size, max_seq_len=seq_len),
        training=TrainingConfig(global_batch_tokens=_BATCH_ROWS * seq_len),
    )
    prepared = prepare_sources(data)

    def opened() -> TrainingDataset:
        return open_datasets(config, prepared, sha256).training

    began = time.perf_counter()
    training = opened()
    training.batch_at(0)
    first = time.perf_counter() - began
    began = time.perf_counter()
    opened().batch_at(RESUMED_STEP)
    resume = time.perf_counter() - began

    (windows,) = training.windows.values()
    flat = directory / "flat.bin"
    dtype = page_dtype(vocab_size)
    windows.stream.read(0, windows.stream.num_tokens).astype(dtype).tofile(flat)
    contenders: dict[str, Callable[[int], np.ndarray]] = {
        OURS: lambda step: training.batch_at(step).tokens,
        "NumPy memory map": functools.partial(_of_memory_map, np.memmap(flat, dtype), training),
        "Grain's ArrayRecord source": _OfGrain(training),
    }
    for step in range(2):
        for name, read in contenders.items():
            if not np.array_equal(read(step), training.batch_at(step).tokens):
                raise ValueError(f"{name} gives other ids than ours: there is nothing to time")
    steps = max(1, 4096 // _BATCH_ROWS)
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    processor = dict.fromkeys(contenders, 0.0)
    for number in range(rounds):
        for name, read in contenders.items():
            began, began_processor = time.perf_counter(), time.process_time()
            for step in range(number * steps, (number + 1) * steps):
                read(step)
            wall[name].append((time.perf_counter() - began) / steps / _BATCH_ROWS)
            processor[name] += time.process_time() - began_processor
    rows = []
    ours = Timing(tuple(wall[OURS]))
    for name, seconds in wall.items():
        rates = [1 / s for s in seconds]
        rows.append(
            {
                "pass": "loading", "contender": name, "windows_per_second": float(np.median(rates)),
                "least": min(rates), "most": max(rates),
                "tokens_per_cpu_second": rounds * steps * _BATCH_ROWS * seq_len / processor[name],
                "ours_is_faster_by": ratio(ours, Timing(tuple(seconds))),
            }
        )  # fmt: skip
    order = np.array([row.window for step in range(steps) for row in training.rows_at(step)])
    correlation = float(np.corrcoef(order[:-1], order[1:])[0, 1])
    return rows, {
        "first_batch_seconds": first, "resume_seconds": resume, "adjacent_correlation": correlation,
    }  # fmt: skip


def _by_sentencepiece(tokenizer: Tokenizer) -> Encode:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer.model_proto, num_threads=1
    )
    return lambda texts: [np.array(ids, np.int32) for ids in processor.encode(list(texts))]


def _by_tokenizers(tokenizer: Tokenizer) -> Encode:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as the others
    import tokenizers

    from tinyllama_jax.conversion.hf_tokenizer import tokenizer_json

    fast = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer.model_proto)))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    return encode


def _of_memory_map(flat: np.ndarray, training: TrainingDataset, step: int) -> np.ndarray:
    seq_len = training.seq_len
    rows = training.rows_at(step)
    return np.stack([flat[r.window * seq_len : r.window * seq_len + seq_len] for r in rows]).astype(
        np.int32
    )


class _OfGrain:
    """The same windows from the pages that Grain's own source reads."""

    def __init__(self, training: TrainingDataset):
        import grain

        (self._windows,) = training.windows.values()
        stream = self._windows.stream
        paths = [str(stream.directory / shard.file) for shard in stream.manifest.shards]
        self._source = grain.sources.ArrayRecordDataSource(paths)
        self._training = training
        self._dtype = page_dtype(stream.manifest.vocab_size)
        shards = stream.manifest.shards
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._pages = np.cumsum([0, *(shard.pages for shard in shards)])

    def __call__(self, step: int) -> np.ndarray:
        seq_len = self._training.seq_len
        batch = np.empty((_BATCH_ROWS, seq_len), np.int32)
        for place, row in enumerate(self._training.rows_at(step)):
            filled, start = 0, row.window * seq_len
            while filled < seq_len:
                shard = int(np.searchsorted(self._starts, start, side="right")) - 1
                page, first = divmod(start - int(self._starts[shard]), PAGE_TOKENS)
                (record,) = self._source.__getitems__([int(self._pages[shard]) + page])
                part = np.frombuffer(record, self._dtype)[first : first + seq_len - filled]
                batch[place, filled : filled + part.size] = part
                filled += part.size
                start += part.size
        return batch
