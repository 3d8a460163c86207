"""Pictures in parquet files, as Hugging Face's data sets have them: a column of encoded pictures, one of labels."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcutflow.data.images import ImageError
from shortcutflow.data.raw_items import LARGEST_ITEM, Block, RawItem, RawSource
from shortcutflow.data.shards import Skipped

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls", "fine_label")
LARGEST_GROUP = 2 * 2**30
"""Bytes that a row group may have in memory."""

CACHE = 256 * 2**20
"""Bytes of row groups kept by a reader, and shuffled among each other."""

MOST_CLASSES = 1_000_000
_SPLIT = re.compile(r"(train|val|valid|validation|test|dev)(?=[-_.])", re.IGNORECASE)


class ParquetReader:
    """Rows of parquet files; a place is (number of the file, row group, row within it)."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files, self.column = tuple(files), column
        self._file: tuple[int, pq.ParquetFile] | None = None
        self._groups: OrderedDict[tuple[int, int], tuple[pa.ChunkedArray, int]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None, "_groups": OrderedDict()}

    def read(self, item: RawItem) -> bytes:
        """See :class:`~shortcutflow.data.raw_items.Reader`."""
        file, group, row = (int(value) for value in item.place)
        value = self._group(file, group)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise ImageError("the table holds no bytes of it" + (", only a path" if isinstance(value, dict) else ""))
        if len(content) > LARGEST_ITEM:
            raise ImageError(f"it has {len(content)} bytes, at most {LARGEST_ITEM} are read")
        return content

    def _group(self, file: int, group: int) -> pa.ChunkedArray:
        if (file, group) in self._groups:
            self._groups.move_to_end((file, group))
            return self._groups[file, group][0]
        if self._file is None or self._file[0] != file:
            self._file = (file, _open(self.files[file]))
        column = self._file[1].read_row_group(group, columns=[self.column], use_threads=False).column(0)
        self._groups[file, group] = (column, column.nbytes)
        while len(self._groups) > 1 and sum(size for _, size in self._groups.values()) > CACHE:
            self._groups.popitem(last=False)
        return column


def open_parquet(files: Sequence[Path]) -> RawSource:
    """Parquet files as a source, in the order of their names and rows.

    Raises:
        ImportError: without pyarrow.
        ValueError: if one is damaged, has no column of pictures, or the files are of several splits.
    """
    files = sorted(files)
    _check_one_split(files)
    items: list[RawItem] = []
    skipped: list[Skipped] = []
    blocks: list[Block] = []
    first = _open(files[0])
    column, label_column = _image_column(first, files[0]), _label_column(first)
    for number, path in enumerate(files):
        table = _open(path)
        wanted = [column] if label_column is None else [column, label_column]
        missing = [name for name in wanted if name not in table.schema_arrow.names]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}, {files[0].name} has one: they are no one data set")
        labels = _labels(table, label_column)
        for group, size, rows in _groups(table, path):
            start = len(items)
            for within, row in enumerate(rows):
                name, label = f"{path.name}:{row}", None if labels is None else labels[row]
                if labels is not None and (label is None or label < 0):
                    skipped.append(Skipped(name, f"its label is {label}"))
                else:
                    items.append(RawItem(name, label, (number, group, within)))
            blocks.append(Block(start, len(items), size))
    names = _class_names(first, label_column, items)
    return RawSource("parquet files", ParquetReader(files, column), items, names, tuple(skipped), tuple(blocks))


def _check_one_split(files: Sequence[Path]) -> None:
    splits = sorted({found[1].lower() for path in files if (found := _SPLIT.match(path.name))})
    if len(splits) > 1:
        raise ValueError(
            f"{files[0].parent} holds parquet files of several splits ({', '.join(splits)}): give one file, or move or "
            "link the files of one split into a folder of their own"
        )


def _open(path: Path) -> pq.ParquetFile:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("parquet files are read by pyarrow: pip install 'shortcutflow[parquet]'") from error
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _image_column(table: pq.ParquetFile, path: Path) -> str:
    import pyarrow as pa

    def is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and is_image(kind.field(place).type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    schema = table.schema_arrow
    found = [field.name for field in schema if is_image(field.type)]
    chosen = next((name for name in IMAGE_COLUMNS if name in found), found[0] if len(found) == 1 else None)
    if chosen is None:
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(
            f"{path} has no column of pictures. Its columns: {columns}. One called 'image' is due, of bytes or of "
            "struct<bytes, path>"
        )
    return chosen


def _label_column(table: pq.ParquetFile) -> str | None:
    import pyarrow as pa

    integers = {field.name for field in table.schema_arrow if pa.types.is_integer(field.type)}
    return next((name for name in LABEL_COLUMNS if name in integers), None)


def _labels(table: pq.ParquetFile, column: str | None) -> list[int | None] | None:
    return None if column is None else table.read(columns=[column], use_threads=False).column(0).to_pylist()


def _groups(table: pq.ParquetFile, path: Path) -> list[tuple[int, int, range]]:
    """Each row group: its number, bytes in memory, and rows of the file."""
    found, row = [], 0
    for group in range(table.num_row_groups):
        facts = table.metadata.row_group(group)
        if facts.total_byte_size > LARGEST_GROUP:
            raise ValueError(
                f"row group {group} of {path} has {facts.total_byte_size} bytes, at most {LARGEST_GROUP} are read at "
                "once: write the file again with row_group_size=100"
            )
        found.append((group, facts.total_byte_size, range(row, row + facts.num_rows)))
        row += facts.num_rows
    return found


def _class_names(table: pq.ParquetFile, column: str | None, items: list[RawItem]) -> tuple[str, ...]:
    """From the metadata that Hugging Face writes into the schema; numbers where there are none."""
    labels = [item.label for item in items if item.label is not None]
    if column is None or not labels:
        return ()
    if max(labels) >= MOST_CLASSES:
        raise ValueError(f"column {column!r} holds {max(labels)}: labels must be below {MOST_CLASSES}")
    metadata = (table.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    names: Any = None
    with suppress(ValueError, KeyError, TypeError):
        names = json.loads(metadata)["info"]["features"][column]["names"]
    if not isinstance(names, list) or len(names) <= max(labels):
        return tuple(str(label) for label in range(max(labels) + 1))
    return tuple(str(name) for name in names)
