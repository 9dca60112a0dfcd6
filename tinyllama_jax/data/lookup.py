"""Which documents a step sees, and at which steps a document is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from tinyllama_jax.data.dataset import TrainingDataset
from tinyllama_jax.data.stream import Document, Stream
from tinyllama_jax.text.tokenizer import Tokenizer

_FIRST_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Seen:
    """A document in a row of a step.

    Attributes:
      row: of the step's rows, counted from 0.
      document: which, and where in its stream.
      first: the place, within the document, of the first id that the row shows.
      tokens: how many the row shows.
      begins: the document's first words.
    """

    row: int
    document: Document
    first: int
    tokens: int
    begins: str


def seen_at(data: TrainingDataset, step: int, tokenizer: Tokenizer) -> Iterator[Seen]:
    """What the step after `step` steps sees, row by row, the documents of a row in their order."""
    for number, row in enumerate(data.rows_at(step)):
        windows = data.windows[row.source]
        start = row.window * data.seq_len
        for document in windows.documents(row.window):
            first = max(0, start - document.start)
            end = min(document.tokens, start + data.seq_len + 1 - document.start)
            begins = _first_words(windows.stream, document, tokenizer)
            yield Seen(number, document, first, end - first, begins)


def documents_with(
    stream: Stream, text: str, tokenizer: Tokenizer, advance: Callable[[int], None]
) -> Iterator[Document]:
    """The documents of a stream whose text holds `text`; `advance` is told of tokens read."""
    offset = 0
    for shard, entry in enumerate(stream.manifest.shards):
        for ids, documents in stream.document_blocks(shard):
            ends = np.cumsum(documents["tokens"], dtype=np.int64)
            for row, end in zip(documents, ends, strict=True):
                if text in tokenizer.decode(ids[end - row["tokens"] : end]):
                    yield Document(
                        source=stream.manifest.source,
                        input_file=entry.inputs[int(row["input"])],
                        record=int(row["record"]),
                        start=offset + int(end) - int(row["tokens"]),
                        tokens=int(row["tokens"]),
                    )
            offset += len(ids)
            advance(len(ids))


def steps_that_see(
    data: TrainingDataset,
    documents: list[Document],
    steps: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[Document, list[int]]:
    """At which of the first `steps` steps each document is seen, as a target or before one.

    The order is gone through from its beginning: about 10 s a million rows of a source.
    `advance` is told of rows.
    """
    found: dict[Document, list[int]] = {document: [] for document in documents}
    for source in sorted({document.source for document in documents}):
        wanted: dict[int, list[Document]] = {}
        for document in documents:
            if document.source == source:
                last = len(data.windows[source]) - 1
                # A window shows its own ids and the first of the next one.
                first = max(0, document.start - 1) // data.seq_len
                end = (document.start + document.tokens - 1) // data.seq_len
                for window in range(first, min(end, last) + 1):
                    wanted.setdefault(window, []).append(document)
        for step, window in data.windows_of(source, steps):
            for document in wanted.get(window, ()):
                found[document].append(step)
            advance(1)
    return {document: sorted(set(at)) for document, at in found.items()}


def _first_words(stream: Stream, document: Document, tokenizer: Tokenizer) -> str:
    ids = stream.read(document.start, min(document.tokens, _FIRST_TOKENS))
    return " ".join(tokenizer.decode(ids).split())
