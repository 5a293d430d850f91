# SPDX-License-Identifier: Apache-2.0
"""Parquet and Arrow files, as small Arrow streams that any process decodes. Imported only where there is one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from specdist.core.errors import DataError
from specdist.prompts.conversation import COLUMNS, FORMATS, FORMATS_IN_WORDS, MEDIA


def encoded_batches(path: str, rows: int, every_column: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """Batches of at most `rows` rows: an Arrow IPC stream of the known columns, or of every one, its rows, and its
    share of the file's bytes. Raises DataError: the file cannot be read, or has no column of conversations."""
    batches = (_parquet if path.lower().endswith(".parquet") else _arrow)(path, rows, every_column)
    try:
        for whole, size in batches:
            batch = _without_media(whole)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield sink.getvalue().to_pybytes(), len(batch), size
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def decoded_rows(stream: bytes) -> Iterator[dict[str, object] | ValueError]:
    """The rows of an encoded batch; in the place of one that is no text, or no JSON where it should be, the error."""
    table = pa.ipc.open_stream(stream).read_all()
    for index in range(len(table)):
        try:
            row = table.slice(index, 1).to_pylist()[0]
            yield {field.name: _plain(row[field.name], field) for field in table.schema}
        except ValueError as error:
            yield error


def _plain(value: Any, field: pa.Field) -> Any:
    """A value without the nulls that pad structs to the keys of all rows, and with columns of JSON decoded."""
    kind, metadata = field.type, field.metadata or {}
    name = getattr(kind, "extension_name", None) or metadata.get(b"ARROW:extension:name", b"").decode()
    if value is None:
        return None
    if name == "arrow.json":
        return json.loads(value)
    if pa.types.is_struct(kind):
        values = {inner.name: _plain(value[inner.name], inner) for inner in kind}
        return {key: inner for key, inner in values.items() if inner is not None}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_plain(inner, kind.value_field) for inner in value]
    return {key: _plain(inner, kind.item_field) for key, inner in value} if pa.types.is_map(kind) else value


def _without_media(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with whether a row has images, in the place of the images: such a row is refused anyway."""
    for index, name in enumerate(batch.schema.names):
        if name in MEDIA:
            column = batch.column(index)
            lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
            there = pc.greater(pc.list_value_length(column), 0) if lists else pc.is_valid(column)
            batch = batch.set_column(index, name, there)
    return batch


def _parquet(path: str, rows: int, every_column: bool) -> Iterator[tuple[pa.RecordBatch, int]]:
    with pq.ParquetFile(path) as file:
        columns = file.schema_arrow.names if every_column else _known_columns(path, file.schema_arrow)
        bytes_per_row = Path(path).stat().st_size / max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=rows, columns=columns):
            yield batch, round(bytes_per_row * len(batch))


def _arrow(path: str, rows: int, every_column: bool) -> Iterator[tuple[pa.RecordBatch, int]]:
    with pa.memory_map(path) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = pa.ipc.open_file(mapped)
            batches: Iterator[pa.RecordBatch] = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            mapped.seek(0)
            file = pa.ipc.open_stream(mapped)
            batches = iter(file)
        columns = file.schema.names if every_column else _known_columns(path, file.schema)
        for batch in batches:
            for start in range(0, len(batch), rows):
                part = batch.slice(start, rows)
                yield part.select(columns), part.nbytes


def _known_columns(path: str, schema: pa.Schema) -> list[str]:
    known = [name for name in COLUMNS if name in schema.names]
    if not any(set(keys).issubset(known) for keys in FORMATS):
        raise DataError(f"{path} has none of the columns {FORMATS_IN_WORDS}: {', '.join(schema.names)}")
    return known
