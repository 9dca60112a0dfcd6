"""Readers of columns: parquet, and Arrow as Hugging Face's `datasets` save it."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from tinyllama_jax.data.formats import (
    ROWS_PER_BATCH,
    Advance,
    Keys,
    Record,
    Repaired,
    as_text,
    no_such_key,
    no_text,
    subset_of,
)
from tinyllama_jax.data.parquet_pages import bounded_batches, open_parquet


def read_parquet(path: str, keys: Keys, repaired: Repaired, advance: Advance) -> Iterator[Record]:
    """Each row; memory is that of 16 rows, and of the pages, which are unpacked whole."""
    with _telling_of_damage(path, "parquet"), open_parquet(path) as file:
        _require_columns(path, file.schema_arrow, keys)
        rows = file.metadata.num_rows
        columns = _columns(keys)
        schema = file.metadata.schema
        paths = [schema.column(leaf).path for leaf in range(len(schema))]
        if "." in keys.subset and keys.subset in paths:
            columns[-1] = keys.subset  # without the rest of its struct
        batches = bounded_batches(path, file, columns, ROWS_PER_BATCH)
        yield from _of_batches(path, batches, rows, keys, repaired, advance)


def read_arrow(path: str, keys: Keys, repaired: Repaired, advance: Advance) -> Iterator[Record]:
    """Each row of an Arrow stream, as Hugging Face `datasets` save it, or of an Arrow file."""
    import pyarrow
    import pyarrow.ipc

    with _telling_of_damage(path, "Arrow"), pyarrow.memory_map(path) as file:
        opened = pyarrow.ipc.open_stream
        try:
            schema = opened(file).schema
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file
            schema = opened(file).schema
        _require_columns(path, schema, keys)
        wanted = sorted(map(schema.get_field_index, _columns(keys)))
        file.seek(0)
        # Others may be large, and packed.
        reader = opened(file, options=pyarrow.ipc.IpcReadOptions(included_fields=wanted))
        if opened is pyarrow.ipc.open_stream:
            batches = iter(reader)
        else:
            batches = map(reader.get_batch, range(reader.num_record_batches))
        # What rows share is there once, and in each of those that are made of it.
        shared = pyarrow.types.is_dictionary(schema.field(keys.text).type)
        rows = 1 if shared else ROWS_PER_BATCH
        parts = (
            batch.slice(start, rows) for batch in batches for start in range(0, len(batch), rows)
        )
        # How many rows there are is not known before the end.
        yield from _of_batches(path, parts, 0, keys, repaired, lambda count: None)
    advance(pathlib.Path(path).stat().st_size)


def _of_batches(
    path: str, batches: Iterator[Any], rows: int, keys: Keys, repaired: Repaired, advance: Advance
) -> Iterator[Record]:
    """The rows of a file of so many, whose batches hold the columns of `keys` alone."""
    import pyarrow

    size = pathlib.Path(path).stat().st_size
    number = 0
    for batch in batches:
        # As bytes: pyarrow does not check that strings are UTF-8.
        texts = batch.column(keys.text).cast(pyarrow.large_binary())
        name = keys.subset.split(".")[0]
        subsets = batch.column(name).to_pylist() if name else [None] * len(batch)
        for text, value in zip(texts, subsets, strict=True):
            where = f"{path}, row {number}"
            subset = subset_of({name: value}, keys.subset, where)
            yield Record(number, as_text(text.as_py(), where, keys.text, repaired), subset)
            number += 1
        advance(size * len(batch) // max(rows, 1))


def _columns(keys: Keys) -> list[str]:
    return [name for name in (keys.text, keys.subset.split(".")[0]) if name]


def _require_columns(path: str, schema: Any, keys: Keys) -> None:
    for name in _columns(keys):
        if name not in schema.names:
            raise no_such_key(path, name, schema.names)
    kind = schema.field(keys.text).type
    if not _holds_text(kind):
        raise no_text(path, keys.text, str(kind))


@contextlib.contextmanager
def _telling_of_damage(path: str, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the file system's, not the content's
        raise ValueError(f"{path} cannot be read as {what}: {error}") from error


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    plain = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        test(plain)
        for test in (
            types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
            types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary, types.is_null,
        )
    )  # fmt: skip
