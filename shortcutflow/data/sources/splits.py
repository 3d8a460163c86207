"""Names of splits, such as ``train2017`` or ``x-validation-00000-of-00002``: two of them are never read as one set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_WORDS = {
    "train": ("train", "training", "trainset", "trn", "tr"),
    "validation": ("val", "valid", "validation", "valset", "dev", "devel", "minival"),
    "test": ("test", "testing", "testset", "eval", "evaluation", "holdout", "heldout", "tst", "ts", "te"),
    "trainval": ("trainval",),
    "unlabeled": ("unlabeled", "unlabelled", "unsup", "unsupervised"),
    "extra": ("extra",),
    "images": ("images", "image", "imgs", "img"),
    "masks": ("masks", "mask", "labels", "annotations", "annotation", "segmentation", "segmentations", "gt",
              "groundtruth", "depth", "edges"),
    "high resolution": ("hr", "hq", "highres", "hires"),
    "low resolution": ("lr", "lq", "lowres", "lores"),
    "input": ("input", "inputs", "source", "noisy", "blur", "blurred"),
    "target": ("target", "targets", "clean", "sharp"),
    "thumbnails": ("thumbnails", "thumbnail", "thumbs", "preview", "previews"),
}  # fmt: skip
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_ROLES = {"images", "masks", "thumbnails", "high resolution", "low resolution", "input", "target"}
_PAIRED = {"high resolution", "low resolution", "input", "target"}
"""Of images in pairs; beside other folders their words are names of classes."""
_BESIDE_A_SPLIT = {"set", "data", "split", "folder", "partial", "jpeg", "class", "object", "of", "x", "a", "b"}
_SHORT = {"tr", "ts", "te"}
"""Splits only beside another word, as in ``imagesTr``; alone they are languages."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
NUMBERED = re.compile(r"(^|[-_.])\d+$")
"""How the names of the parts of one set end."""


def split_of(name: str, *, anywhere: bool = False) -> str | None:
    """The split that a folder or file name stands for, None for other names.

    Args:
        name: without a suffix.
        anywhere: a word of it is enough, as in ``cc3m-train-0001``; otherwise ``train_station`` is no split.
    """
    words = [word.lower() for word in _WORD.findall(name.replace("held-out", "holdout").replace("held_out", "holdout"))]
    if len(words) == 1 and words[0] in _SHORT:
        return None
    splits = [_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD]
    real = [split for split in splits if split not in _ROLES]
    if anywhere:
        return real[-1] if real else None
    if not splits or any(word not in _SPLIT_OF_WORD and word not in _BESIDE_A_SPLIT for word in words):
        return None
    return (real or splits)[-1]


def check_folders(names: Iterable[str], where: str) -> None:
    """Raise ValueError for folders beside each other that are splits of one data set, or its images and their masks."""
    names = sorted(names)
    found = {name: split for name in names if (split := split_of(name)) is not None}
    if len(found) < len(names):
        found = {name: split for name, split in found.items() if split not in _PAIRED}
    all_splits = len(names) > 1 and all(split_of(name, anywhere=True) for name in names)
    alike: dict[str, dict[str, str]] = {}  # the rest of the name: seg_train, seg_test, seg_pred are splits too
    for name in names:
        if (split := split_of(name, anywhere=True)) is not None:
            rest = _WORD.sub(lambda word: "" if word[0].lower() in _SPLIT_OF_WORD else word[0].lower(), name)
            alike.setdefault(rest, {})[name] = split
    for group in alike.values():
        if len(set(group.values())) > 1:
            found |= group
    if len(set(found.values())) > 1 or all_splits:
        chosen = sorted(found) or names
        raise ValueError(
            f"{where} holds the splits {', '.join(chosen)}: give one of them, such as {where}/{chosen[0]}; if they are "
            "classes, choose --labels folder (in a recipe: data.labels=folder)"
        )


def check_tree(files: Iterable[str], where: str) -> None:
    """:func:`check_folders` for the folders beside each other at every depth, given the files' names."""
    below: dict[str, set[str]] = {}
    for folder in {name.rpartition("/")[0] for name in files}:
        parts = folder.split("/")
        for i, part in enumerate(parts):
            if part:
                below.setdefault("/".join(parts[:i]), set()).add(part)
    for parent, names in sorted(below.items()):
        check_folders(names, f"{where}/{parent}".rstrip("/"))


def check_files(files: Iterable[str], where: str) -> None:
    """Raise ValueError for parquet files or shards (names below ``where``) of several splits, naming a way out."""
    found: dict[str, str] = {}
    parts: dict[str, str] = {}
    for name in sorted(files):
        path = PurePosixPath(name)
        if re.search(r"-\d+-of-\d+$", path.stem) and parts.setdefault(path.name, name) != name:
            folders = " or ".join(f"'{where}/{PurePosixPath(one).parent}'" for one in (parts[path.name], name))
            raise ValueError(f"{where} holds several sets, each with its own {path.name}: give one of {folders}")
        part = path.suffix == ".parquet" or NUMBERED.search(path.stem) is not None
        split = split_of(path.stem, anywhere=part)
        way = str(path)
        if split is not None and part:
            way = str(path.with_name(re.sub(r"[-_.]?\d+(-of-\d+)?$", "", path.stem) + "*" + path.suffix))
        for folder in path.parents:
            if split is None and (split := split_of(folder.name)) is not None:
                way = str(folder)
        if split is not None:
            found.setdefault(split, way)
    if len(found) > 1:
        ways = ", ".join(f"'{where}/{way}'" for way in found.values())
        raise ValueError(f"{where} holds several splits ({', '.join(sorted(found))}): give one of {ways}")
