# SPDX-License-Identifier: Apache-2.0
"""Parquet and Arrow files, as small Arrow streams that any process decodes. Imported only where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from specdist.core.errors import DataError
from specdist.prompts.conversation import COLUMNS


def encoded_batches(path: str, rows: int, every_column: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """Batches of at most `rows` rows: an Arrow IPC stream of the known columns, or of every one, its rows, and its
    share of the file's bytes.

    Raises:
        DataError: the file cannot be read, or has no column of conversations.
    """
    batches = (_parquet if path.lower().endswith(".parquet") else _arrow)(path, rows, every_column)
    try:
        for batch, size in batches:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield sink.getvalue().to_pybytes(), len(batch), size
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def decoded_rows(stream: bytes) -> Iterator[dict[str, object] | UnicodeDecodeError]:
    """The rows of an encoded batch; in the place of one that is no text, the error."""
    table = pa.ipc.open_stream(stream).read_all()
    for index in range(len(table)):
        try:
            yield table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error


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
    if not set(known) & {"messages", "conversations", "text"}:
        raise DataError(f"{path} has none of the columns messages, conversations, text: {', '.join(schema.names)}")
    return known
