"""Files by name to labelled images: classes are folders, unless the files beside the images give labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from shortcutflow.data.images import ImageError
from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.data.shards import Skipped
from shortcutflow.data.sources.archives import Listed, Listing, is_tar
from shortcutflow.data.sources.labels import (
    NoLabel,
    dataset_json,
    how_to_choose,
    is_bucket_layout,
    label_column,
    metadata_labels,
    number_labels,
)
from shortcutflow.data.sources.readers import RawItem, RawSource, Reader
from shortcutflow.data.sources.splits import check_tree
from shortcutflow.data.sources.webdataset import (
    IMAGE_SUFFIXES,
    Read,
    Sample,
    json_field,
    label_field,
    label_members,
    label_values,
    samples_of,
    suffix_of,
)

SUPPORTED = (
    "a folder of images or of class folders; a zip or uncompressed tar of either; ImageNet's tar of a tar for each "
    "class; parquet files with a column 'image'; webdataset shards (.tar with KEY.jpg and KEY.cls)"
)
_TABLES = ("dataset.json", "metadata.csv", "metadata.jsonl")
_TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl"}
_LABELS_BY_NAME = re.compile(
    r"(label|class|annotation|ground_?truth|target)[^/]*\.(txt|mat|json|xml|npy|pkl)$", re.IGNORECASE
)
_DOCUMENTS = {
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", ".mat", ".py", ".ipynb",
    ".log", ".pkl", ".sh", ".rst", ".bib", ".toml", ".cfg", ".ini",
}  # fmt: skip


class _Found(NamedTuple):
    """Images, the label of each (a class number, None, or why it has none), and what goes with them."""

    images: list[Listed]
    labels: Sequence[int | NoLabel | None]
    names: tuple[str, ...] = ()
    skipped: Sequence[Skipped] = ()
    notes: tuple[str, ...] = ()


def images_of(
    kind: str, reader: Reader, listing: Listing, path: str, choice: bool | str, *, shards: bool = False,
    prefixes: Sequence[str] = (),
) -> RawSource:  # fmt: skip
    """The images of a folder or of archives, with their labels.

    Args:
        kind: in words.
        reader: of the listed files.
        listing: of the source.
        path: of the source, for messages.
        choice: which labels, see :data:`~shortcutflow.data.sources.labels.LabelChoice`.
        shards: files in tar archives, which are webdataset's samples where labels or captions lie beside images.
        prefixes: of the names, by number of their archive, that are no class folders.

    Raises:
        ValueError: if there are no images, or it cannot be decided which labels they have.
    """

    def read(file: Listed) -> bytes:
        try:
            return reader.read(RawItem(file.name, None, file.place))
        except ImageError:
            return b""

    tables = _tables(listing.files)
    files = [file for file in listing.files if file not in tables.values()]
    beside = label_members(files)
    chosen = isinstance(choice, str) and choice != "folder" and not tables
    by_key = bool(shards and beside) or chosen or (choice is True and bool({"cls", "class"} & beside))
    samples: list[Sample] = []
    if by_key:
        samples, skipped = samples_of(files)
        images = [sample.image for sample in samples]
    else:
        images = [file for file in files if suffix_of(file.name) in IMAGE_SUFFIXES]
        images.sort(key=lambda file: file.name.split("/"))
        skipped = [
            Skipped(file.name, f"not an image: suffix {suffix_of(file.name) or '(none)'}")
            for file in files
            if suffix_of(file.name) not in IMAGE_SUFFIXES
        ]
    if not images:
        raise nothing_usable(path, Listing(files, [*listing.skipped, *(skipped if by_key else [])], set()))
    inner = [file.name[len(prefixes[int(file.place[0])]) :] if prefixes else file.name for file in images]
    if choice != "folder":
        check_tree(inner, path)
    found = None
    if choice not in (False, "folder"):
        found = _by_table(tables, images, path, choice, read) if tables else None
        if found is None and by_key:
            found = _by_field(samples, path, choice, read)
        if found is None and choice is True and not by_key and "json" in beside and not _folders_tell(inner):
            samples = samples_of(files)[0]
            if json_field(samples, read, path) is not None:
                return images_of(kind, reader, listing, path, "json", shards=shards, prefixes=prefixes)
    if found is None:
        whole = listing if not prefixes else Listing([], [], set())
        found = (
            _Found(images, [None] * len(images)) if choice is False else _by_folder(images, inner, whole, path, choice)
        )
    if choice is True and not found.names and prefixes:
        parts = "no labels: numbered archives are parts of one set; --labels folder takes them as classes"
        found = found._replace(notes=(*found.notes, parts))
    if choice is True and not found.names and "json" in beside:
        found = found._replace(notes=(*found.notes, "no labels; --labels json:FIELD takes a field of KEY.json"))
    if choice is True and not found.names and not tables:
        found = found._replace(notes=(*found.notes, *_other_tables(files, path, read)))
    items = [
        RawItem(file.name, label, file.place)
        for file, label in zip(found.images, found.labels, strict=True)
        if not isinstance(label, NoLabel)
    ]
    unlabelled = [
        Skipped(file.name, label.reason)
        for file, label in zip(found.images, found.labels, strict=True)
        if isinstance(label, NoLabel)
    ]
    left_out = sorted([*listing.skipped, *skipped, *found.skipped, *unlabelled])
    kind = "webdataset shards" if shards and by_key else kind
    return RawSource(kind, reader, items, found.names, tuple(left_out), notes=found.notes)


def _tables(files: Iterable[Listed]) -> dict[str, Listed]:
    """The files that may hold the labels of all images: those of the folder that is highest."""
    found = [file for file in files if file.name.rpartition("/")[2] in _TABLES]
    if not found:
        return {}
    highest = min((file.name.count("/"), file.name.rpartition("/")[0]) for file in found)
    return {
        name: file
        for file in found
        if (name := file.name.rpartition("/")[2]) and (file.name.count("/"), file.name.rpartition("/")[0]) == highest
    }


def _other_tables(files: Iterable[Listed], path: str, read: Read) -> tuple[str, ...]:
    """A note about files that may hold the labels of images without any.

    Raises:
        ValueError: if one is a table with a column of labels.
    """
    others = [file for file in files if _LABELS_BY_NAME.search(file.name) or suffix_of(file.name) in _TABLE_SUFFIXES]
    for file in others[:20]:
        field = label_column(read(file), suffix_of(file.name)) if suffix_of(file.name) in _TABLE_SUFFIXES else None
        if field is not None:
            raise ValueError(
                f"{path} has no labels, but its {file.name} has a column {field!r}: if these are the labels, make it "
                f"a metadata.csv with the columns file_name and {field}; else {how_to_choose('none', 'folder')}"
            )
    names = ", ".join(file.name for file in others[:3])
    return (f"no labels; files that may hold some are not read: {names}",) if others else ()


def _by_table(
    tables: dict[str, Listed], images: list[Listed], path: str, choice: bool | str, read: Read
) -> _Found | None:
    """Labels from ``dataset.json``, or from ``metadata.csv`` or ``.jsonl``; None if they have none."""
    field = choice if isinstance(choice, str) and choice != "json" else None
    name = "dataset.json" if "dataset.json" in tables and field is None else sorted(tables)[-1]
    file = tables[name]
    where = f"{path}/{file.name}"
    of = dataset_json(read(file), where) if name == "dataset.json" else metadata_labels(read(file), where, field)
    if of is None:
        if choice is True and name != "dataset.json":
            return None
        if choice is not True:
            raise ValueError(f"{where} holds no labels: {how_to_choose('folder', 'none')}")
        return _Found(images, [None] * len(images), notes=(f"no labels, as {where} says",))
    folder = file.name[: -len(name)]
    reason = f"in {name}, but there is no such image"
    there = {image.name for image in images}
    missing = [Skipped(folder + image, reason) for image in of if folder + image not in there]
    values = [
        of.get(image.name.removeprefix(folder), NoLabel(f"{name} has no label for it"))
        if image.name.startswith(folder)
        else NoLabel(f"it lies outside the folder of {name}")
        for image in images
    ]
    numbers, names = number_labels(values, where)
    return _Found(images, numbers, names, missing, (f"labels from {where}",))


def _by_field(samples: list[Sample], path: str, choice: bool | str, read: Read) -> _Found | None:
    """Labels from the members of the samples; None if there are none."""
    if choice is True:
        field = label_field(samples, read, path)
    else:
        field = json_field(samples, read, path, must=True) if choice == "json" else str(choice)
    if field is None:
        return None
    values = label_values(samples, field, read)
    if field == choice and all(value is None for value in values):
        raise ValueError(f"{path} has no labels in {field!r}: {how_to_choose('auto', 'folder', 'json:FIELD', 'none')}")
    numbers, names = number_labels(values, path, names=_names_of(Path(path)))
    notes = () if field == "cls" else (f"labels from KEY.{field}",)
    return _Found([sample.image for sample in samples], numbers, names, notes=notes)


def _names_of(folder: Path) -> tuple[str, ...]:
    """Class names from the manifest of shards that this library wrote."""
    manifest = folder / MANIFEST
    try:
        return Manifest.parse(manifest.read_bytes(), str(manifest)).class_names if manifest.is_file() else ()
    except ValueError:
        return ()  # another program's manifest


def _common_folders(names: Sequence[str]) -> list[str]:
    """The folders that hold everything."""
    low, high = (name.split("/")[:-1] for name in (min(names, key=_folders), max(names, key=_folders)))
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))]


def _folders(name: str) -> list[str]:
    return name.split("/")[:-1]


def _folders_tell(names: Sequence[str]) -> bool:
    """Whether the folders of images may be classes."""
    above = len(_common_folders(names))
    return not is_bucket_layout(sorted({name.split("/")[above] for name in names})) and any(
        name.count("/") > above for name in names
    )


def _by_folder(images: list[Listed], names: Sequence[str], listing: Listing, path: str, choice: bool | str) -> _Found:
    """Classes by folder; none if all images lie in one.

    Raises:
        ValueError: if some images lie in no class folder, or the folders may be something else than classes.
    """
    common = _common_folders(names)
    above = len(common)
    folders = [parts[above] if len(parts := name.split("/")) > above + 1 else None for name in names]
    if choice == "folder" and set(folders) == {None}:
        if not common:
            raise ValueError(f"{path} has no folders that could be classes: {how_to_choose('none')}")
        common, folders = common[:-1], [common[-1]] * len(names)
    counts = Counter(folders)
    if set(counts) == {None}:
        _check_empty_siblings(common, listing, path)
        return _Found(images, [None] * len(images))
    if None in counts:
        raise ValueError(
            f"{path} holds {counts[None]} images beside class folders ({counts.total() - counts[None]} images in "
            f"{len(counts) - 1} folders): put them into class folders too, or use no labels (--labels none)"
        )
    classes = {name for name in counts if name is not None}
    if choice is True and is_bucket_layout(sorted(classes)):
        raise ValueError(
            f"the folders of {path} only number parts ({min(classes)} ... {max(classes)}) and there are no labels "
            f"beside them: are they classes? {how_to_choose('folder', 'json', 'none')}"
        )
    empty = _empty_classes(common, listing) - classes
    class_names = tuple(sorted(classes | empty))
    number = {name: i for i, name in enumerate(class_names)}
    prefix = "".join(part + "/" for part in common)
    without = [Skipped(f"{prefix}{name}/", f"no image can be read from class {number[name]}") for name in sorted(empty)]
    notes: tuple[str, ...] = ()
    if empty:
        notes = (f"class folders without a readable image: {', '.join(sorted(empty))}",)
    if shifted := [name for name in class_names if name.isdecimal() and int(name) != number[name]]:
        notes += (f"classes are numbered in the order of their names as text: {shifted[0]!r} is {number[shifted[0]]}",)
    labels = [number[folder] for folder in folders if folder is not None]
    return _Found(images, labels, class_names, without, notes)


def _empty_classes(common: list[str], listing: Listing) -> set[str]:
    """Folders beside the class folders that hold no image: nothing, or files that may be images of other formats."""
    prefix = "".join(part + "/" for part in common)
    found = {name[len(prefix) :].split("/")[0] for name in listing.folders if name.startswith(prefix)}
    held: dict[str, set[str]] = {}
    for name in (*(file.name for file in listing.files), *(item.name for item in listing.skipped)):
        folder, slash, rest = name[len(prefix) :].partition("/")
        if slash and name.startswith(prefix):
            held.setdefault(folder, set()).add(suffix_of(rest))
    return {name for name in found | held.keys() if name not in held or not held[name] <= _DOCUMENTS}


def _check_empty_siblings(common: list[str], listing: Listing, path: str) -> None:
    """Refuse one folder of images beside others without: they may be classes that would vanish."""
    for i, name in enumerate(common):
        if others := _empty_classes(common[:i], listing) - {name}:
            raise ValueError(
                f"all images of {path} lie in {name!r}, but there are folders without images beside it "
                f"({', '.join(sorted(others)[:5])}): {how_to_choose('folder', 'none')}"
            )


def nothing_usable(path: str, listing: Listing) -> ValueError:
    """The error for a source without images, saying what it holds."""
    suffixes = Counter(suffix_of(file.name) or "(no suffix)" for file in listing.files)
    found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) or "no files"
    if archives := sorted(file.name for file in listing.files if file.name.endswith(".zip") or is_tar(file.name)):
        found += f"; archives are prepared one at a time, such as {path}/{archives[0]}"
    if listing.skipped:
        found += f"; {len(listing.skipped)} unusable, such as {listing.skipped[0].name} ({listing.skipped[0].reason})"
    return ValueError(f"{path} holds no images that can be read. Found: {found}. Supported: {SUPPORTED}")
