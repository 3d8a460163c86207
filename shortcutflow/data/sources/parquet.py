"""Images in parquet files, as Hugging Face's data sets have them: a column of encoded images, one of labels."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcutflow.data.images import ImageError
from shortcutflow.data.index import Skipped
from shortcutflow.data.sources.labels import NoLabel, choose_field, how_to_choose, number_labels
from shortcutflow.data.sources.readers import Block, RawItem, RawSource, check_bytes
from shortcutflow.data.sources.splits import check_files

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture", "photo")
_NO_LABELS = {
    "text", "caption", "captions", "prompt", "description", "title", "url", "path", "file", "file_name", "filename",
    "name", "id", "idx", "index", "key", "image_id", "image_path", "width", "height", "size", "md5", "sha256", "hash",
    "license", "author", "source", "date", "timestamp", "split", "__index_level_0__", "__key__", "__url__",
}  # fmt: skip
LARGEST_GROUP = 2 * 2**30
"""Bytes that a row group may have in memory."""

CACHE = 256 * 2**20
"""Bytes of row groups kept by a reader, and shuffled among each other."""


class ParquetReader:
    """Rows of parquet files; a place is (number of the file, row group, row within it)."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files, self.column = tuple(files), column
        self._file: tuple[int, pq.ParquetFile] | None = None
        self._groups: OrderedDict[tuple[int, int], tuple[pa.ChunkedArray, int]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None, "_groups": OrderedDict()}

    def read(self, item: RawItem) -> bytes:
        """See :class:`~shortcutflow.data.sources.readers.Reader`."""
        file, group, row = (int(value) for value in item.place)
        value = self._group(file, group)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise ImageError("the table holds no bytes of it" + (", only a path" if isinstance(value, dict) else ""))
        check_bytes(len(content))
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


def open_parquet(named: Mapping[str, Path], root: str, choice: bool | str = True) -> RawSource:
    """Parquet files as a source, in the order of their names and rows.

    Args:
        named: the files, each by its name below ``root``.
        root: folder or URL that holds all of them.
        choice: of the labels: True, False or the name of a column.

    Raises:
        ImportError: without pyarrow.
        ValueError: if one is damaged, has no column of images, the labels are ambiguous, or the files are of several
            splits.
    """
    named = dict(sorted(named.items()))
    files = list(named.values())
    path = f"{root}/{next(iter(named))}" if len(named) == 1 else root
    check_files(named, root)
    tables = [_open(file) for file in files]
    column = _image_column(tables[0], path)
    label_column = _label_column(tables[0], path, column, choice)
    _check_columns(tables, files, [name for name in (column, label_column) if name is not None], label_column)
    if not any(table.metadata.num_rows for table in tables):
        raise ValueError(f"{path} holds no images: its {len(files)} parquet files have no rows")
    labels: Iterator[int | NoLabel | None] = repeat(None)
    names: tuple[str, ...] = ()
    if label_column is not None:
        values = [value for table in tables for value in _values(table, label_column)]
        given = _class_names(tables[0], label_column)
        numbers, names = number_labels(values, f"column {label_column!r} of {path}", names=given, words=True)
        labels = iter(numbers)
    items, skipped, blocks = list[RawItem](), list[Skipped](), list[Block]()
    for number, (name, table) in enumerate(zip(named, tables, strict=True)):
        row = count()
        for group in range(table.num_row_groups):
            facts, start = table.metadata.row_group(group), len(items)
            if facts.total_byte_size > LARGEST_GROUP:
                raise ValueError(
                    f"row group {group} of {files[number]} has {facts.total_byte_size} bytes, at most {LARGEST_GROUP} "
                    "are read at once: write the file again with row_group_size=100"
                )
            for within in range(facts.num_rows):
                item, label = RawItem(f"{name}:{next(row)}", None, (number, group, within)), next(labels)
                if isinstance(label, NoLabel):
                    skipped.append(Skipped(item.name, label.reason))
                else:
                    items.append(item._replace(label=label))
            if len(items) > start:
                blocks.append(Block(start, len(items), facts.total_byte_size))
    notes = () if label_column in (None, "label") else (f"labels from column {label_column!r}",)
    if choice is True and label_column is None:
        others = ", ".join(name for name in tables[0].schema_arrow.names if name != column) or "none"
        notes = (f"no labels, no column is called label (other columns: {others})",)
    return RawSource("parquet files", ParquetReader(files, column), items, names, tuple(skipped), tuple(blocks), notes)


def _values(table: pq.ParquetFile, column: str) -> list[Any]:
    """Of a column, or of a field of a struct, as ``label.id``."""
    values = table.read(columns=[column], use_threads=False).column(0).to_pylist()
    if column in table.schema_arrow.names:
        return values
    return [value and value[column.partition(".")[2]] for value in values]


def _check_columns(
    tables: Sequence[pq.ParquetFile], files: Sequence[Path], columns: Sequence[str], label_column: str | None
) -> None:
    """All files have the columns, and number the classes alike."""
    for table, file in zip(tables, files, strict=True):
        missing = [name for name in columns if name not in _kinds(table)]
        if missing:
            raise ValueError(f"{file} has no column {missing[0]!r}, {files[0].name} has one: they are no one data set")
        if label_column is not None and _class_names(table, label_column) != _class_names(tables[0], label_column):
            raise ValueError(
                f"{file} and {files[0]} name the classes of {label_column!r} differently: prepare one alone"
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


def _image_column(table: pq.ParquetFile, path: str) -> str:
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
            f"{path} has no column of images. Its columns: {columns}. One called 'image' is due, of bytes or of "
            "struct<bytes, path>"
        )
    return chosen


def _label_column(table: pq.ParquetFile, path: str, image: str, choice: bool | str) -> str | None:
    """The column of the labels, None for no labels.

    Raises:
        ValueError: if the choice is no column, or it is not clear which one it is.
    """
    import pyarrow as pa

    kinds = {name: kind for name, kind in _kinds(table).items() if name.partition(".")[0] != image}
    if choice is False:
        return None
    if choice is not True and choice not in kinds:
        raise ValueError(f"{path} has no column {choice!r} of labels: {how_to_choose(*list(kinds)[:8], 'none')}")
    column = str(choice) if choice is not True else _likely_label(table, path, kinds)
    if column is not None and pa.types.is_struct(kinds[column]):
        fields = [name for name in kinds if name.startswith(column + ".")]
        raise ValueError(f"column {column!r} of {path} has several fields: {how_to_choose(*fields[:8], 'none')}")
    return column


def _likely_label(table: pq.ParquetFile, path: str, kinds: Mapping[str, pa.DataType]) -> str | None:
    """The column that its type of classes or its name says to be the label; None if no column may be one."""
    from pyarrow import types

    columns = [name for name in kinds if name in table.schema_arrow.names]
    of_classes = [name for name in columns if _class_names(table, name)]
    if len(of_classes) == 1:
        return of_classes[0]
    if (found := choose_field(of_classes or columns, path)) is not None:
        return found
    if of_classes:
        raise ValueError(f"{path} has several columns of classes: {how_to_choose(*of_classes, 'none')}")
    usual = (types.is_integer, types.is_string, types.is_large_string, types.is_boolean, types.is_dictionary,
             types.is_decimal, types.is_struct)  # fmt: skip
    others = [
        name for name in columns if name.lower() not in _NO_LABELS and any(is_kind(kinds[name]) for is_kind in usual)
    ]
    if others:
        raise ValueError(f"{path} has no column called label; its columns: {', '.join(columns)}. If one holds it, "
                         + how_to_choose(*others[:8], "none"))  # fmt: skip
    return None


def _kinds(table: pq.ParquetFile) -> dict[str, pa.DataType]:
    """The types of columns and, as ``label.id``, of the fields of structs."""
    import pyarrow as pa

    found: dict[str, pa.DataType] = {}
    for column in table.schema_arrow:
        found[column.name] = column.type
        if pa.types.is_struct(column.type):
            found |= {f"{column.name}.{field.name}": field.type for field in column.type.fields}
    return found


def _class_names(table: pq.ParquetFile, column: str) -> tuple[str, ...]:
    """From the metadata that Hugging Face writes into the schema; empty where there are none."""
    metadata = (table.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        feature = json.loads(metadata)["info"]["features"][column]
        names = feature.get("names") or (feature.get("feature") or {}).get("names")
        return tuple(str(name) for name in names) if isinstance(names, list) else ()
    return ()
