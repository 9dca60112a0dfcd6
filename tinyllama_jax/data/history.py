"""Builds a corpus with the defects that TinyLlama's published run had, at any small size.

    python -m tinyllama_jax.data.history --config=configs/tiny_history_ablation.py

Prepares the sources of the config as they should be, below `data.prepared`/sound, and from that the
directories that a run of this config reads:

- Each packer filled the rest of its last chunk with BOS, and the loss was not masked (issue 83 of
  jzhang38/TinyLlama).
- Each node shuffled the list of chunks with a seed of its own and took every n-th: some were read
  twice and some never (issue 67).

Documents without EOS (issues 40 and 116) are `data.boundary = "bos"`, and the learning rate that
did not fall (issue 27) is `optimizer.min_learning_rate`: both are settings of any run.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from ml_collections import config_flags

from tinyllama_jax.config import DataConfig, freeze
from tinyllama_jax.data.pages import (
    Manifest,
    ShardEntry,
    ShardWriter,
    read_manifest,
    write_manifest,
)
from tinyllama_jax.data.prepare import prepare_sources
from tinyllama_jax.data.prepared import plan_of
from tinyllama_jax.data.stream import Stream
from tinyllama_jax.data.units import SPLITS
from tinyllama_jax.text.tokenizer import Tokenizer

_SHARD = "00000.arrayrecord"


@dataclasses.dataclass(frozen=True)
class Defects:
    """How the corpus was packed and handed out.

    Attributes:
      packers: processes that packed, each with a rest to fill.
      chunk_tokens: of a chunk; a packer's last one is filled up to it.
      nodes: machines that shuffled the chunks each for itself; 1: none is read twice.
      seed: of the shuffles.
    """

    packers: int = 8
    chunk_tokens: int = 16_384
    nodes: int = 2
    seed: int = 0


def build(data: DataConfig, defects: Defects) -> dict[str, pathlib.Path]:
    """Writes, for each source, the prepared directory that `data` leads to, with the defects.

    What is held out stays as it should be.

    Returns:
      The directory of each source.

    Raises:
      ValueError: as `prepare_sources`; or a source has subsets.
    """
    tokenizer = Tokenizer(data.tokenizer)
    sound = dataclasses.replace(data, prepared=str(pathlib.Path(data.prepared) / "sound"))
    result = {}
    for name, directory in prepare_sources(sound).items():
        (source,) = (s for s in data.sources if s.name == name.partition(".")[0])
        if source.subset_key:
            raise ValueError(f"data.sources.{source.name} has subsets, which the published had not")
        out = plan_of(source, data, tokenizer).directory
        for split in SPLITS:
            _write(directory / split, out / split, defects if split == SPLITS[0] else None)
        result[name] = out
    return result


def packed(
    documents: Sequence[np.ndarray], bos_id: int, defects: Defects
) -> list[list[np.ndarray]]:
    """Chunks, each as the pieces of documents in it; filling is a piece of its own.

    Args:
      documents: ids, BOS before each.
      bos_id: what chunks are filled up with.
      defects: packers and chunk_tokens.
    """
    chunks: list[list[np.ndarray]] = []
    for packer in range(defects.packers):
        chunk: list[np.ndarray] = []
        room = defects.chunk_tokens
        for ids in documents[packer :: defects.packers]:
            while len(ids) > room:
                chunks.append([*chunk, ids[:room]] if room else chunk)
                ids, chunk, room = ids[room:], [], defects.chunk_tokens
            if len(ids):
                chunk.append(ids)
                room -= len(ids)
        if chunk:
            filling = np.full(room, bos_id, np.int32)
            chunks.append([*chunk, filling] if room else chunk)
    return chunks


def handed_out(count: int, defects: Defects) -> list[int]:
    """Which of so many chunks are read in an epoch: every n-th of each node's own order."""
    orders = [
        np.random.default_rng(defects.seed + node).permutation(count)
        for node in range(defects.nodes)
    ]
    own = [order[node :: defects.nodes] for node, order in enumerate(orders)]
    return np.concatenate(own).tolist()


def _write(split: pathlib.Path, out: pathlib.Path, defects: Defects | None) -> None:
    manifest = read_manifest(split)
    out.mkdir(parents=True, exist_ok=True)
    entries: tuple[ShardEntry, ...] = ()
    if manifest.tokens:
        writer = ShardWriter(out / _SHARD, manifest.vocab_size)
        for number, ids in enumerate(_pieces(split, manifest, defects)):
            writer.add(ids, number, "as it was handed out")
        entries = (writer.close(),)
    write_manifest(out, dataclasses.replace(manifest, shards=entries))


def _pieces(
    split: pathlib.Path, manifest: Manifest, defects: Defects | None
) -> Iterator[np.ndarray]:
    stream = Stream(split)
    documents = [
        ids
        for shard in range(len(manifest.shards))
        for block, table in stream.document_blocks(shard)
        for ids in np.split(block, np.cumsum(table["tokens"])[:-1])
    ]
    if defects is None:
        yield from documents
        return
    chunks = packed(documents, manifest.bos_id, defects)
    for number in handed_out(len(chunks), defects):
        yield from chunks[number]


def main(argv: list[str]) -> None:
    directories = build(freeze(_CONFIG.value).data, Defects())
    for name, directory in directories.items():
        print(f"{name}: {directory}")


if __name__ == "__main__":
    from absl import app

    _CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
    flags.mark_flag_as_required("config")
    app.run(main)
