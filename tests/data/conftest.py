"""Prepared storage made of synthetic documents, for the tests of everything that reads it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from tinyllama_jax.data import pages


def _write_split(
    directory: pathlib.Path,
    shards: Iterable[Sequence[np.ndarray]],
    *,
    source: str = "text",
    vocab_size: int = 4096,
    boundary: str = "bos+eos",
    tokenizer_sha256: str = "a" * 64,
) -> pathlib.Path:
    directory.mkdir(parents=True)
    entries = []
    for number, documents in enumerate(shards):
        writer = pages.ShardWriter(directory / f"{number:05d}.arrayrecord", vocab_size)
        for record, ids in enumerate(documents):
            # Two input files a shard, so that their numbering within it is seen.
            writer.add(ids, record // 2, f"{source}-{number}-{record % 2}.txt")
        entries.append(writer.close())
    pages.write_manifest(
        directory,
        pages.Manifest(
            source, directory.name, tokenizer_sha256, vocab_size, boundary, 1, 2, tuple(entries)
        ),
    )
    return directory


def _documents(seed: int, tokens: int, vocab_size: int = 4096) -> list[np.ndarray]:
    """Random documents from BOS (1) to EOS (2), `tokens` ids in all."""
    random = np.random.default_rng(seed)
    documents: list[np.ndarray] = []
    while tokens > 0:
        ids = random.integers(3, vocab_size, min(tokens, int(random.integers(2, 900))))
        ids[0], ids[-1] = 1, 2
        documents.append(ids)
        tokens -= ids.size
    return documents


@pytest.fixture(scope="session")
def write_split():
    """`write_split(directory, shards, **settings)`: shards are sequences of documents."""
    return _write_split


@pytest.fixture(scope="session")
def make_documents():
    """`make_documents(seed, tokens)`: random documents of so many ids in all."""
    return _documents


@pytest.fixture(scope="module")
def one_file_each():
    """Units of one file, however small it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tinyllama_jax.data.prepared.group_inputs", lambda inputs: ((one,) for one in inputs)
        )
        yield
