"""Small pictures in class folders, and the same ones packed in every way that can be prepared."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from shortcutflow.data.sources.readers import RawSource

CLASSES = ("ant", "bee", "cat")


def picture(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A JPEG that tells its number by its noise."""
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "JPEG", quality=90)
    return out.getvalue()


def pictures(count: int) -> dict[str, bytes]:
    """Files by name, ``ant/00.jpg``, ..., in turns of the three classes."""
    return {f"{CLASSES[i % 3]}/{i:02d}.jpg": picture(i) for i in range(count)}


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tar_of(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def by_class(files: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        folder, _, last = name.partition("/")
        found.setdefault(folder, {})[last] = content
    return found


def webdataset_of(files: Mapping[str, bytes], *, as_json: bool = False) -> bytes:
    members = {}
    for name, content in files.items():
        folder, _, last = name.partition("/")
        label = CLASSES.index(folder)
        key = f"{folder}-{last.partition('.')[0]}"
        members[f"{key}.jpg"] = content
        members[f"{key}.txt"] = b"a caption"
        if as_json:
            members[f"{key}.json"] = json.dumps({"label": label}).encode()
        else:
            members[f"{key}.cls"] = str(label).encode()
    return tar_of(members)


def write_parquet(path: Path, files: Mapping[str, bytes], *, as_struct: bool = True, group: int = 4) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = list(files.values())
    labels = [CLASSES.index(name.partition("/")[0]) for name in files]
    if as_struct:
        images = pa.array([{"bytes": content, "path": name} for name, content in files.items()])
    else:
        images = pa.array(contents, pa.binary())
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    if as_struct:
        features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def contents(source: RawSource) -> list[tuple[bytes, int | None]]:
    """Bytes and label of every picture of a source, sorted."""
    return sorted((source.read(item), item.label) for item in source.items)


def files_of(folder: Path) -> dict[str, bytes]:
    """What a prepared folder holds, half-written files too."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


FILES = pictures(11)
"""The images that the tests of sources pack in every way."""
