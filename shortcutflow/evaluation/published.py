"""Statistics that others have published, where they already lie on this machine."""

from __future__ import annotations

import re
from pathlib import Path

CLEAN_FID = "clean-fid:"
"""Begins the names of clean-fid's own statistics."""


def clean_fid_statistics(name: str, protocol: str) -> Path:
    """The file of clean-fid's own statistics, "DATASET-SPLIT" or "DATASET-SPLIT-SIZE", in clean-fid's folder of them.

    Raises:
        ValueError: if the name has another form, or the protocol is not clean-fid's.
        FileNotFoundError: if the file is not there, naming it and its place.
        ImportError: without clean-fid.
    """
    if protocol != "clean-fid":
        raise ValueError(f"{CLEAN_FID}{name} goes with --protocol clean-fid, not {protocol}")
    asked = re.fullmatch(r"(\w+)-(\w+?)(?:-(\d+|na))?", name)
    if asked is None:
        raise ValueError(f"clean-fid's statistics are named as {CLEAN_FID}cifar10-train or -train-32, got {name!r}")
    from importlib.util import find_spec

    spec = find_spec("cleanfid")
    if spec is None or spec.origin is None:
        raise ImportError("clean-fid's statistics come with clean-fid: pip install 'shortcutflow[eval]'")
    stats = Path(spec.origin).parent / "stats"
    stem = f"{asked[1]}_clean_{asked[2]}".lower()  # as clean-fid names its files
    found = [path for path in sorted(stats.glob(f"{stem}_*.npz")) if path.stem.removeprefix(f"{stem}_").isalnum()]
    if asked[3]:
        found = [path for path in found if path.stem == f"{stem}_{asked[3]}"]
    if not found:
        raise FileNotFoundError(
            f"there is no {stem}_{asked[3] or 'SIZE'}.npz in {stats}: clean-fid fetches it there when it "
            "is first asked for, or put it there by hand"
        )
    if len(found) > 1:
        sizes = ", ".join(path.stem.removeprefix(f"{stem}_") for path in found)
        raise ValueError(f"clean-fid's statistics {name} are there for sizes {sizes}: add one, as in {name}-32")
    return found[0]
