"""Files by name to labelled images: classes are folders, unless the files beside the images give labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from posixpath import basename, commonpath, dirname, join
from typing import NamedTuple

from shortcutflow.data.images import ImageError
from shortcutflow.data.index import Skipped
from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.data.sources import labels, webdataset
from shortcutflow.data.sources.archives import Listing, is_tar
from shortcutflow.data.sources.labels import NoLabel, how_to_choose, is_bucket_layout
from shortcutflow.data.sources.readers import RawItem, RawSource, Reader
from shortcutflow.data.sources.splits import check_tree
from shortcutflow.data.sources.webdataset import IMAGE_SUFFIXES, Read, Sample, json_field, samples_of, suffix_of

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


class _Labels(NamedTuple):
    """The label of each image (a class number, None, or why it has none), and what goes with them."""

    values: Sequence[int | NoLabel | None]
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

    def read(file: RawItem) -> bytes:
        try:
            return reader.read(file)
        except ImageError:
            return b""

    tables = _tables(listing.files)
    files = [file for file in listing.files if file not in tables.values()]
    beside = webdataset.label_members(files)
    chosen = isinstance(choice, str) and choice != "folder" and not tables
    by_key = bool(shards and beside) or chosen or (choice is True and bool({"cls", "class"} & beside))
    samples, skipped = samples_of(files) if by_key else _by_suffix(files)
    images = [sample.image for sample in samples]
    if not images:
        raise nothing_usable(path, Listing(files, [*listing.skipped, *(skipped if by_key else [])], set()))
    inner = [file.name[len(prefixes[int(file.place[0])]) :] if prefixes else file.name for file in images]
    found = _Labels([None] * len(images)) if choice is False else None
    if choice != "folder":
        check_tree(inner, path)
        if found is None and tables:
            found = _by_table(tables, images, path, choice, read)
        if found is None and by_key:
            found = _by_field(samples, path, choice, read)
        may_be_json = choice is True and not by_key and "json" in beside and not _folders_tell(inner)
        if found is None and may_be_json and json_field(samples_of(files)[0], read, path) is not None:
            return images_of(kind, reader, listing, path, "json", shards=shards, prefixes=prefixes)
    if found is None:
        found = _by_folder(inner, Listing([], [], set()) if prefixes else listing, path, choice)
    notes = found.notes
    if choice is True and not found.names:
        if prefixes:
            notes += ("no labels: numbered archives are parts of one set; --labels folder takes them as classes",)
        if "json" in beside:
            notes += ("no labels; --labels json:FIELD takes a field of KEY.json",)
        if not tables:
            notes += _other_tables(files, path, read)
    labelled = list(zip(images, found.values, strict=True))
    items = [file._replace(label=label) for file, label in labelled if not isinstance(label, NoLabel)]
    without = [Skipped(file.name, label.reason) for file, label in labelled if isinstance(label, NoLabel)]
    left_out = tuple(sorted([*listing.skipped, *skipped, *found.skipped, *without]))
    return RawSource(
        "webdataset shards" if shards and by_key else kind, reader, items, found.names, left_out, notes=notes
    )


def _by_suffix(files: Iterable[RawItem]) -> tuple[list[Sample], list[Skipped]]:
    """Each image as a sample of its own, in the order of folders and names, and what is none."""
    images, others = [], []
    for file in files:
        if (suffix := suffix_of(file.name)) in IMAGE_SUFFIXES:
            images.append(Sample(file, {}))
        else:
            others.append(Skipped(file.name, f"not an image: suffix {suffix or '(none)'}"))
    return sorted(images, key=lambda sample: sample.image.name.split("/")), others


def _tables(files: Iterable[RawItem]) -> dict[str, RawItem]:
    """The files that may hold the labels of all images: those of the folder that is highest."""
    found = [file for file in files if basename(file.name) in _TABLES]
    highest = min((dirname(file.name) for file in found), key=lambda folder: (folder.count("/"), folder), default="")
    return {basename(file.name): file for file in found if dirname(file.name) == highest}


def _other_tables(files: Iterable[RawItem], path: str, read: Read) -> tuple[str, ...]:
    """A note about files that may hold the labels of images without any; raises ValueError for a table that does."""
    others = [file for file in files if _LABELS_BY_NAME.search(file.name) or suffix_of(file.name) in _TABLE_SUFFIXES]
    for file in others[:20]:
        if (field := labels.label_column(read(file), suffix_of(file.name))) is not None:
            raise ValueError(
                f"{path} has no labels, but its {file.name} has a column {field!r}: if these are the labels, make it "
                f"a metadata.csv with the columns file_name and {field}; else {how_to_choose('none', 'folder')}"
            )
    names = ", ".join(file.name for file in others[:3])
    return (f"no labels; files that may hold some are not read: {names}",) if others else ()


def _by_table(
    tables: dict[str, RawItem], images: list[RawItem], path: str, choice: bool | str, read: Read
) -> _Labels | None:
    """Labels from ``dataset.json``, or from ``metadata.csv`` or ``.jsonl``; None if they have none."""
    field = choice if isinstance(choice, str) and choice != "json" else None
    name = "dataset.json" if "dataset.json" in tables and field is None else sorted(tables)[-1]
    file = tables[name]
    where = f"{path}/{file.name}"
    if name == "dataset.json":
        of = labels.dataset_json(read(file), where)
    else:
        of = labels.metadata_labels(read(file), where, field)
    if of is None:
        if choice is True and name != "dataset.json":
            return None
        if choice is not True:
            raise ValueError(f"{where} holds no labels: {how_to_choose('folder', 'none')}")
        return _Labels([None] * len(images), notes=(f"no labels, as {where} says",))
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
    numbers, names = labels.number_labels(values, where)
    return _Labels(numbers, names, missing, (f"labels from {where}",))


def _by_field(samples: list[Sample], path: str, choice: bool | str, read: Read) -> _Labels | None:
    """Labels from the members of the samples; None if there are none."""
    if choice is True:
        field = webdataset.label_field(samples, read, path)
    else:
        field = json_field(samples, read, path, must=True) if choice == "json" else str(choice)
    if field is None:
        return None
    values = [webdataset.label_value(sample.members, field, read) for sample in samples]
    if field == choice and all(value is None for value in values):
        raise ValueError(f"{path} has no labels in {field!r}: {how_to_choose('auto', 'folder', 'json:FIELD', 'none')}")
    numbers, names = labels.number_labels(values, path, names=_names_of(Path(path)))
    return _Labels(numbers, names, notes=() if field == "cls" else (f"labels from KEY.{field}",))


def _names_of(folder: Path) -> tuple[str, ...]:
    """Class names from the manifest of shards that this library wrote."""
    manifest = folder / MANIFEST
    try:
        return Manifest.parse(manifest.read_bytes(), str(manifest)).class_names if manifest.is_file() else ()
    except ValueError:
        return ()  # another program's manifest


def _below_common(names: Sequence[str]) -> tuple[str, list[str | None]]:
    """The folder that holds everything, and the folder below it of each name; None for a name right in it."""
    common = commonpath([dirname(name) for name in names])
    parts = (name[len(join(common, "")) :].partition("/") for name in names)
    return common, [folder if slash else None for folder, slash, _ in parts]


def _folders_tell(names: Sequence[str]) -> bool:
    """Whether the folders of images may be classes."""
    folders = set(_below_common(names)[1])
    return folders != {None} and not is_bucket_layout(sorted(folder or "" for folder in folders))


def _by_folder(names: Sequence[str], listing: Listing, path: str, choice: bool | str) -> _Labels:
    """Classes by folder; none if all images lie in one. Raises ValueError if it is not clear that they are classes."""
    common, folders = _below_common(names)
    if choice == "folder" and set(folders) == {None}:
        if not common:
            raise ValueError(f"{path} has no folders that could be classes: {how_to_choose('none')}")
        common, folders = dirname(common), [basename(common)] * len(names)
    counts = Counter(folders)
    if set(counts) == {None}:
        parts = common.split("/") if common else []
        for i, name in enumerate(parts):  # one folder of images beside others without: classes that would vanish
            if others := _empty_classes("/".join(parts[:i]), listing) - {name}:
                raise ValueError(
                    f"all images of {path} lie in {name!r}, but there are folders without images beside it "
                    f"({', '.join(sorted(others)[:5])}): {how_to_choose('folder', 'none')}"
                )
        return _Labels([None] * len(names))
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
    empty = sorted(_empty_classes(common, listing) - classes)
    class_names = tuple(sorted(classes.union(empty)))
    number = {name: i for i, name in enumerate(class_names)}
    without = [Skipped(join(common, name, ""), f"no image can be read from class {number[name]}") for name in empty]
    notes: tuple[str, ...] = (f"class folders without a readable image: {', '.join(empty)}",) if empty else ()
    if shifted := [name for name in class_names if name.isdecimal() and int(name) != number[name]]:
        notes += (f"classes are numbered in the order of their names as text: {shifted[0]!r} is {number[shifted[0]]}",)
    return _Labels([number[folder] for folder in folders if folder is not None], class_names, without, notes)


def _empty_classes(folder: str, listing: Listing) -> set[str]:
    """Folders in a folder that hold no image: nothing, or files that may be images of other formats."""
    prefix = join(folder, "")
    found = {name[len(prefix) :].split("/")[0] for name in listing.folders if name.startswith(prefix)}
    held: dict[str, set[str]] = {}
    for name in (*(file.name for file in listing.files), *(item.name for item in listing.skipped)):
        inner, slash, rest = name[len(prefix) :].partition("/")
        if slash and name.startswith(prefix):
            held.setdefault(inner, set()).add(suffix_of(rest))
    return {name for name in found | held.keys() if name not in held or not held[name] <= _DOCUMENTS}


def nothing_usable(path: str, listing: Listing) -> ValueError:
    """The error for a source without images, saying what it holds."""
    suffixes = Counter(suffix_of(file.name) or "(no suffix)" for file in listing.files)
    found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) or "no files"
    if archives := sorted(file.name for file in listing.files if file.name.endswith(".zip") or is_tar(file.name)):
        found += f"; archives are prepared one at a time, such as {path}/{archives[0]}"
    if listing.skipped:
        found += f"; {len(listing.skipped)} unusable, such as {listing.skipped[0].name} ({listing.skipped[0].reason})"
    return ValueError(f"{path} holds no images that can be read. Found: {found}. Supported: {SUPPORTED}")
