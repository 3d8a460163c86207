"""Images in parquet files, as Hugging Face's data sets have them: a column of encoded images, one of labels."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING

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
    given = _class_names(tables[0], label_column)
    for table, file in zip(tables, files, strict=True):
        if missing := {column, label_column or column} - _columns(table).keys():
            raise ValueError(
                f"{file} has no column {min(missing)!r}, {files[0].name} has one: they are no one data set"
            )
        if _class_names(table, label_column) != given:
            raise ValueError(
                f"{file} and {files[0]} name the classes of {label_column!r} differently: prepare one alone"
            )
    if not any(table.metadata.num_rows for table in tables):
        raise ValueError(f"{path} holds no images: its {len(files)} parquet files have no rows")
    labels: Iterator[int | NoLabel | None] = repeat(None)
    names: tuple[str, ...] = ()
    if label_column is not None:
        columns = [table.read(columns=[label_column], use_threads=False).flatten().column(0) for table in tables]
        values = [value for column in columns for value in column.to_pylist()]
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


def _columns(table: pq.ParquetFile) -> dict[str, pa.DataType]:
    """The types of columns and, as ``label.id``, of the fields of structs."""
    schema = table.schema_arrow
    return {field.name: field.type for field in (*schema, *schema.empty_table().flatten().schema)}


def _image_column(table: pq.ParquetFile, path: str) -> str:
    from pyarrow import types

    columns = _columns(table)
    found = [
        name
        for name in table.schema_arrow.names
        if types.is_binary(kind := columns.get(f"{name}.bytes", columns[name])) or types.is_large_binary(kind)
    ]
    chosen = next((name for name in IMAGE_COLUMNS if name in found), found[0] if len(found) == 1 else None)
    if chosen is None:
        listed = ", ".join(f"{field.name}: {field.type}" for field in table.schema_arrow)
        raise ValueError(
            f"{path} has no column of images. Its columns: {listed}. One called 'image' is due, of bytes or of "
            "struct<bytes, path>"
        )
    return chosen


def _label_column(table: pq.ParquetFile, path: str, image: str, choice: bool | str) -> str | None:
    """The column of the labels, by the choice, its type of classes or its name; None for no labels.

    Raises ValueError if the choice is no column, or it is not clear which one it is.
    """
    from pyarrow import types

    if choice is False:
        return None
    kinds = {name: kind for name, kind in _columns(table).items() if name.partition(".")[0] != image}
    if choice is not True and choice not in kinds:
        raise ValueError(f"{path} has no column {choice!r} of labels: {how_to_choose(*list(kinds)[:8], 'none')}")
    columns = [name for name in kinds if name in table.schema_arrow.names]
    of_classes = [name for name in columns if _class_names(table, name)]
    if choice is not True:
        column: str | None = str(choice)
    elif len(of_classes) == 1:
        column = of_classes[0]
    else:
        column = choose_field(of_classes or columns, path)
    if column is None and of_classes:
        raise ValueError(f"{path} has several columns of classes: {how_to_choose(*of_classes, 'none')}")
    if column is None:
        usual = (types.is_integer, types.is_string, types.is_large_string, types.is_boolean, types.is_dictionary,
                 types.is_decimal, types.is_struct)  # fmt: skip
        others = [
            name
            for name in columns
            if name.lower() not in _NO_LABELS and any(is_kind(kinds[name]) for is_kind in usual)
        ]
        if others:
            raise ValueError(
                f"{path} has no column called label; its columns: {', '.join(columns)}. If one holds it, "
                + how_to_choose(*others[:8], "none")
            )
    elif types.is_struct(kinds[column]):
        fields = [name for name in kinds if name.startswith(column + ".")]
        raise ValueError(f"column {column!r} of {path} has several fields: {how_to_choose(*fields[:8], 'none')}")
    return column


def _class_names(table: pq.ParquetFile, column: str | None) -> tuple[str, ...]:
    """From the metadata that Hugging Face writes into the schema; empty where there are none."""
    metadata = (table.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        feature = json.loads(metadata)["info"]["features"][column]
        names = feature.get("names") or (feature.get("feature") or {}).get("names")
        return tuple(str(name) for name in names) if isinstance(names, list) else ()
    return ()
