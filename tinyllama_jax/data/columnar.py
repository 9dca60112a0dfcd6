"""Readers of columns: parquet, and Arrow as Hugging Face's `datasets` save it."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from tinyllama_jax.data.arrow_messages import messages_of_file, most_unpacked, require_end_of_stream
from tinyllama_jax.data.formats import (
    LONGEST_TEXT,
    MOST_UNPACKED,
    ROWS_PER_BATCH,
    Advance,
    Keys,
    Record,
    Repaired,
    as_text,
    no_such_key,
    no_text,
    require_few_rows,
    require_short,
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
    from pyarrow import ipc

    with _telling_of_damage(path, "Arrow"), pyarrow.memory_map(path) as file:
        is_file = file.read(6) == b"ARROW1"
        opened = ipc.open_file if is_file else ipc.open_stream
        file.seek(0)
        schema = opened(file).schema
        _require_columns(path, schema, keys)
        file.seek(0)
        wanted = sorted(map(schema.get_field_index, _columns(keys)))
        messages = messages_of_file(file) if is_file else ipc.MessageReader.open_stream(file)
        _require_bounded(path, opened.__name__, most_unpacked(messages, schema, wanted))
        if not is_file:
            require_end_of_stream(file)
        # Others may be large, and packed. Where nothing is, a batch stays in the file; of some of
        # its fields alone pyarrow makes a copy.
        if is_file and not most_unpacked(messages_of_file(file), schema, []):
            wanted = []  # all of them
        file.seek(0)
        reader = opened(file, options=ipc.IpcReadOptions(included_fields=wanted))
        batches = (
            map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        )
        # How many rows there are is not known before the end.
        yield from _of_batches(path, batches, 0, keys, repaired, lambda count: None)
    advance(pathlib.Path(path).stat().st_size)


def _require_bounded(path: str, opened: str, unpacked: int) -> None:
    if unpacked > MOST_UNPACKED:
        raise ValueError(
            f"{path} has {unpacked:,} bytes in a batch of rows and the dictionaries, which "
            f"each worker would hold in memory; more than {MOST_UNPACKED:,} are not read. If the "
            "file is sound, write it anew without packing: import pyarrow.ipc as p; "
            f"t = p.{opened}({path!r}).read_all(); w = p.new_stream(NEW, t.schema); "
            "w.write(t); w.close()"
        )


def _of_batches(
    path: str, batches: Iterator[Any], rows: int, keys: Keys, repaired: Repaired, advance: Advance
) -> Iterator[Record]:
    """The rows of a file of so many, whose batches hold the columns of `keys` alone."""
    size = pathlib.Path(path).stat().st_size
    number = 0
    for batch in batches:
        texts = _as_bytes(batch.column(keys.text))
        require_few_rows(number + len(batch), path, size)
        _require_short_texts(texts, path, number)
        for text, record in zip(texts, _with_subset(batch, keys.subset), strict=True):
            where = f"{path}, row {number}"
            subset = subset_of(record, keys.subset, where)
            yield Record(number, as_text(_content(text, where), where, keys.text, repaired), subset)
            number += 1
        advance(size * len(batch) // max(rows, 1))


def _with_subset(batch: Any, key: str) -> Iterator[dict[str, Any]]:
    """What each row has under `key`, and nothing that stands beside it."""
    from pyarrow import compute, types

    if not key:
        yield from itertools.repeat({}, len(batch))
        return
    first, *names = key.split(".")
    column = batch.column(first)
    for name in names:
        column.validate()
        if not types.is_struct(column.type) or column.type.get_field_index(name) < 0:
            break
        column = compute.struct_field(column, name)
    found: Any = itertools.repeat(column.type, len(batch))  # to tell of it, if it is no text
    if _holds_text(column.type):
        found = (value.as_py() for value in _as_bytes(column))
    for record in found:
        for name in reversed((first, *names)):
            record = {name: record}
        yield record


def _require_short_texts(texts: Any, path: str, first: int) -> None:
    """By their places alone, where these tell lengths: pyarrow copies a text to give it."""
    from pyarrow import compute, types

    is_told = types.is_binary(texts.type) or types.is_large_binary(texts.type)
    if is_told and texts.nbytes > LONGEST_TEXT:
        lengths = compute.binary_length(texts)
        longest = compute.max(lengths).as_py() or 0
        require_short(longest, f"{path}, row {first + lengths.index(longest).as_py()}")


def _content(text: Any, where: str) -> bytes | None:
    import pyarrow

    if isinstance(text, pyarrow.DictionaryScalar) and text.is_valid:
        text = text.value
    if not text.is_valid:
        return None
    content = text.as_buffer()
    require_short(content.size, where)  # before there is a copy
    return content.to_pybytes()


def _as_bytes(column: Any) -> Any:
    """A column of texts as bytes, which need not be UTF-8.

    Checked: pyarrow ends the process where it makes values of damaged columns.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column.indices.validate(full=True)
        return pyarrow.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary))
    of_bytes = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    column = column.view(of_bytes.get(column.type, column.type))
    column.validate(full=True)
    return column


def _columns(keys: Keys) -> list[str]:
    return [name for name in (keys.text, keys.subset.split(".")[0]) if name]


def _require_columns(path: str, schema: Any, keys: Keys) -> None:
    for setting, name in zip(("text_key", "subset_key"), _columns(keys), strict=False):
        if name not in schema.names:
            raise no_such_key(path, name, schema.names, setting)
        if schema.names.count(name) > 1:
            raise ValueError(f"{path} has several columns {name!r}: give each a name of its own")
    kind = schema.field(keys.text).type
    if not _holds_text(kind):
        raise no_text(path, keys.text, str(kind))


@contextlib.contextmanager
def _telling_of_damage(path: str, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
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
