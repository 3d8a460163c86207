"""Sources as people have them: labels are found or asked for, nothing is mixed, and what is left out is listed."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.labels import is_bucket_layout
from shortcutflow.data.sources.readers import RawSource
from shortcutflow.data.sources.splits import split_of
from tests.data.pictures import contents, picture, tar_of, write_files, write_parquet, written, zip_of

P = [picture(i, (8, 8)) for i in range(8)]


def labels(source: RawSource) -> dict[str, int | None]:
    return {item.name: item.label for item in source.items}


def left_out(source: RawSource) -> dict[str, str]:
    return dict(source.skipped)


# Labels beside the images

EDM = {f"0000{i // 2}/img{i}.png": P[i] for i in range(4)}


def edm(values: list[Any] | None, files: dict[str, bytes] = EDM) -> dict[str, bytes]:
    pairs = None if values is None else [[name, value] for name, value in zip(sorted(files), values, strict=True)]
    return files | {"dataset.json": json.dumps({"labels": pairs}).encode()}


@pytest.mark.parametrize("packed", [False, True])
def test_dataset_json(packed: bool, tmp_path: Path) -> None:
    def opened(name: str, files: dict[str, bytes], **options: Any) -> RawSource:
        path = tmp_path / name
        return open_source(written(path, zip_of(files)) if packed else write_files(path, files), **options)

    found = opened("a.zip", edm([2, 0, 1, 2]))
    assert labels(found) == dict(zip(sorted(EDM), [2, 0, 1, 2], strict=True))
    assert (found.class_names, found.skipped) == (("0", "1", "2"), ())
    assert set(labels(opened("b.zip", edm(None))).values()) == {None}
    assert opened("c.zip", edm(None), labels="folder").class_names == ("00000", "00001")
    assert set(labels(opened("d.zip", edm([2, 0, 1, 2]), labels="none")).values()) == {None}
    more = edm([1, 0, 1, 1]) | {"00001/new.png": P[5]}
    del more["00000/img0.png"]
    assert set(left_out(opened("e.zip", more))) == {"00000/img0.png", "00001/new.png"}
    twice = {"labels": [["00000/img0.png", 1], ["00000/img1.png", 0], ["00000/img0.png", 2]]}
    several = opened("h.zip", EDM | {"dataset.json": json.dumps(twice).encode()})
    assert "several different labels" in left_out(several)["00000/img0.png"]
    with pytest.raises(ValueError, match=r"holds no labels: choose with --labels folder or --labels none"):
        opened("f.zip", edm(None), labels="json")
    with pytest.raises(ValueError, match="it has 2 labels, one is needed"):
        opened("g.zip", edm([[0.5, 0.5]] * 4))


@pytest.mark.parametrize(
    ("names", "buckets"),
    [
        (["00000", "00001"], True),
        (["00000", "01000", "02000"], True),
        (["00000", "00001", "00003", "00004"], True),
        ([str(i) for i in range(10)], False),
        ([str(i) for i in range(12)], False),
        (["0000045", "0000099", "0000117"], False),
        (["n01", "n02"], False),
        (["part1", "part2"], True),
        (["batch_1", "batch_2", "party"], False),
        (["00000"], False),
    ],
)
def test_bucket_layouts(names: list[str], buckets: bool, tmp_path: Path) -> None:
    assert is_bucket_layout(names) == buckets
    root = write_files(tmp_path / "raw", {f"set/{name}/{name}.png": P[0] for name in names})
    if buckets:
        with pytest.raises(ValueError, match=r"are they classes\? choose with --labels folder or --labels json"):
            open_source(root)
        assert open_source(root, labels="folder").class_names == tuple(names)
        assert open_source(root, labels="none").class_names == ()
    elif len(names) > 1:
        assert open_source(root).class_names == tuple(sorted(names))


def test_metadata_and_members_beside_images(tmp_path: Path) -> None:
    flat = {f"{i}.png": P[i] for i in range(3)}
    table = b"file_name,label,colour\n0.png,dog,1\n1.png,ant,2\n2.png,dog,3\n"
    root = write_files(tmp_path / "csv", flat | {"metadata.csv": table})
    assert (open_source(root).class_names, list(labels(open_source(root)).values())) == (("ant", "dog"), [1, 0, 1])
    assert list(labels(open_source(root, labels="colour")).values()) == [1, 2, 3]
    lines = b"".join(json.dumps({"file_name": name, "label": 4}).encode() + b"\n" for name in flat)
    assert set(labels(open_source(write_files(tmp_path / "jsonl", flat | {"metadata.jsonl": lines}))).values()) == {4}
    buckets = {f"0000{i}/{i}.{end}": body for i in range(3) for end, body in
               (("jpg", P[i]), ("json", json.dumps({"caption": "x", "class_id": i}).encode()))}  # fmt: skip
    assert list(labels(open_source(write_files(tmp_path / "buckets", buckets))).values()) == [0, 1, 2]
    unpacked = {f"{i}.{end}": body for i in range(3) for end, body in (("jpg", P[i]), ("cls", str(i).encode()))}
    assert list(labels(open_source(write_files(tmp_path / "cls", unpacked))).values()) == [0, 1, 2]


# Webdataset


def shard(path: Path, *samples: dict[str, bytes | str | dict[str, Any]]) -> Path:
    """Members of sample i called ``000i.EXTENSION``."""
    members = {}
    for i, sample in enumerate(samples):
        for extension, body in sample.items():
            text = json.dumps(body) if isinstance(body, dict) else body
            members[f"{i:04d}.{extension}"] = text.encode() if isinstance(text, str) else text
    return written(path, tar_of(members))


@pytest.mark.parametrize(
    ("beside", "numbers", "names"),
    [
        ([{"cls": "1"}, {"cls": "0"}], [1, 0], ("0", "1")),
        ([{"cls": "dog"}, {"cls": "ant"}], [1, 0], ("ant", "dog")),
        ([{"txt": "1"}, {"txt": "0"}], [1, 0], ("0", "1")),
        ([{"txt": "a dog"}, {"txt": "3"}], [None, None], ()),
        ([{"json": {"class_id": 1}}, {"json": {"class_id": 0}}], [1, 0], ("0", "1")),
        ([{"json": {"label": 1.0}}, {"json": {"label": [0]}}], [1, 0], ("0", "1")),
        ([{"json": {"caption": "x"}}, {"json": {"caption": "y"}}], [None, None], ()),
        ([{"CLS": "1"}, {"CLS": "0"}], [1, 0], ("0", "1")),
        ([{"cls": "dog"}, {"cls": "ant"}, {"cls": "1"}], [2, 1, 0], ("1", "ant", "dog")),
    ],
)
def test_labels_of_shards(beside: list[Any], numbers: list[int | None], names: tuple[str, ...], tmp_path: Path) -> None:
    source = open_source(shard(tmp_path / "s.tar", *({"jpg": P[i], **members} for i, members in enumerate(beside))))
    assert ([item.label for item in source.items], source.class_names) == (numbers, names)
    assert bool(source.notes) == ("cls" not in str(beside).lower() and "dog" not in str(beside))


def test_fields_of_shards_can_be_chosen(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", *({"jpg": P[i], "json": {"fine_label": i, "coarse_label": 0, "a": {"b": 2 - i}}}
                                       for i in range(3)))  # fmt: skip
    with pytest.raises(ValueError, match="--labels json:coarse_label or --labels json:fine_label or --labels none"):
        open_source(path)
    assert [item.label for item in open_source(path, labels="json:a.b").items] == [2, 1, 0]
    with pytest.raises(ValueError, match="has no labels in 'json:c'"):
        open_source(path, labels="json:c")


def test_keys_end_at_the_first_dot(tmp_path: Path) -> None:
    members = {
        "a.b/01.image.jpg": P[0], "a.b/01.cls": b"0", "02.jpg": P[1], "02.mask.png": P[2], "02.cls": b"1",
        "22.05.jpg": P[3], "22.06.jpg": P[4], "22.cls": b"0", "03.jpg": P[5], "03.png": P[6], "03.cls": b"1",
        "04.cls": b"1", "README": b"",
    }  # fmt: skip
    source = open_source(written(tmp_path / "x.tar", tar_of(members)))
    assert labels(source) == {"02.jpg": 1, "03.jpg": 1, "a.b/01.image.jpg": 0}
    assert set(left_out(source)) == {"02.mask.png", "22.05.jpg", "22.06.jpg", "03.png", "04.cls", "README"}
    assert "without an image" in left_out(source)["04.cls"]
    with pytest.raises(ValueError, match="key ends at the first dot"):
        open_source(written(tmp_path / "y.tar", tar_of({f"img.{i}.{e}": b"1" for i in "12" for e in ("jpg", "cls")})))


def test_shards_by_braces_and_shards_of_one_name(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"x/s-{i:03d}.tar", {"jpg": P[i], "cls": str(i)})
    assert [item.label for item in open_source(tmp_path / "x/s-{000..001}.tar").items] == [0, 1]
    assert [item.label for item in open_source(tmp_path / "x/s-{000,002}.tar").items] == [0, 2]
    assert len(open_source(tmp_path / "x/s-*.tar").items) == 3
    for braces, count in [("00{{0..1},2}", 3), ("{000..002..2}", 2), ("{002..000}", 3), ("{000,000}", 1)]:
        assert len(open_source(tmp_path / f"x/s-{braces}.tar").items) == count
    for braces in ("{0..99999}{0..99999..1}", "{-9999999..0}"):
        with pytest.raises(ValueError, match="at most 1000000 are read"):
            open_source(tmp_path / f"x/s-{braces}.tar")
    with pytest.raises(FileNotFoundError, match=r"s-003\.tar, one of the 4 files"):
        open_source(tmp_path / "x/s-{000..003}.tar")
    for i, name in enumerate("ab"):
        shard(tmp_path / f"y/{name}/s-000.tar", {"jpg": P[i], "cls": str(i)})
    assert len(set(labels(open_source(tmp_path / "y")))) == 2


# Splits and mixtures


@pytest.mark.parametrize(
    "folders",
    [
        ["train2017", "val2017"], ["training", "testing"], ["train", "test", "unlabeled"], ["images", "masks"],
        ["Train", "Validation"], ["train_32x32", "valid_32x32"], ["train", "dev"], ["train", "holdout"],
        ["ant/train", "ant/test", "bee/train"], ["trainA", "testA"], ["JPEGImages", "SegmentationClass"],
        ["train", "eval", "x"], ["seg_train", "seg_test", "seg_pred"], ["TRAIN", "VAL"], ["train-clean", "dev-clean"],
        ["HR", "LR"], ["hq", "lq"], ["DIV2K_train_HR", "DIV2K_train_LR_bicubic"], ["input", "target"],
        ["imagesTr", "imagesTs", "labelsTr"], ["Training", "PublicTest", "PrivateTest"],
        ["bounding_box_train", "bounding_box_test", "query"],
        ["blur", "sharp"],
    ],
)  # fmt: skip
def test_splits_are_not_classes(folders: list[str], tmp_path: Path) -> None:
    root = write_files(tmp_path / "raw", {f"{folder}/c/{i}.png": P[i] for i, folder in enumerate(folders)})
    for choice in (True, False):
        with pytest.raises(ValueError, match=r"holds the splits .* give one of them, such as"):
            open_source(root, labels=choice)
    assert len(open_source(root, labels="folder").items) == len(folders)


def test_words_of_splits_in_other_names(tmp_path: Path) -> None:
    names = ["blur", "bullet_train", "bus", "sharp", "te", "test_pattern", "tr", "train"]
    root = write_files(tmp_path / "raw", {f"{name}/0.png": P[0] for name in names})
    assert open_source(root).class_names == tuple(names)
    assert split_of("x-train-00000-of-00003", anywhere=True) == "train"


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize(
    ("names", "way"),
    [(["x-train-00000", "x-validation-00000"], "x-train*"), (["train/0000", "test/0000"], "train"),
     (["data/train-00000-of-00001", "data/test-00000-of-00001"], "data/train*")],
)  # fmt: skip
def test_splits_of_parquet_files_and_shards(kind: str, names: list[str], way: str, tmp_path: Path) -> None:
    for i, name in enumerate(names):
        path = tmp_path / f"set/{name}.{kind}"
        if kind == "tar":
            shard(path, {"jpg": P[i], "cls": "0"})
        else:
            pytest.importorskip("pyarrow")
            write_parquet(path, {"ant/0.jpg": P[i]})
    with pytest.raises(ValueError, match="holds several splits") as caught:
        open_source(tmp_path / "set")
    pattern = tmp_path / "set" / way
    named = pattern if (tmp_path / "set" / way).is_dir() else pattern.with_name(pattern.name + f".{kind}")
    assert f"'{named}'" in str(caught.value)
    assert len(open_source(named).items) == 1


def test_several_sets_of_parquet_files(tmp_path: Path) -> None:
    """Configurations of one Hugging Face repository, each with all of its parts."""
    pytest.importorskip("pyarrow")
    for name in ("large", "small"):
        write_parquet(tmp_path / f"set/{name}/train-00000-of-00001.parquet", {"ant/0.jpg": P[0]})
    with pytest.raises(
        ValueError, match=r"several sets, each with its own train-\S+: give one of '\S+/large' or '\S+/s"
    ):
        open_source(tmp_path / "set")
    assert len(open_source(tmp_path / "set/small").items) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("labels.csv", b"id,breed,label\n0,x,1\n"), ("train.tsv", b"image\tclass\n0\t1\n"),
     ("list.jsonl", b'{"image": "0.png", "category": 1}\n')],
)  # fmt: skip
def test_tables_of_other_forms_are_a_question(name: str, content: bytes, tmp_path: Path) -> None:
    root = write_files(tmp_path / "raw", {f"{i}.png": P[i] for i in range(3)} | {name: content})
    with pytest.raises(ValueError, match=rf"has no labels, but its {name} has a column .*--labels none"):
        open_source(root)
    assert {item.label for item in open_source(root, labels="none").items} == {None}
    write_files(root, {name: b"image,width\n0,3\n", "imagelabels.mat": b"x", "broken.csv": b""})
    source = open_source(root)
    assert "imagelabels.mat" in source.notes[-1]
    assert left_out(source).keys() == {name, "imagelabels.mat", "broken.csv"}


def test_images_beside_shards_or_parquet_files(tmp_path: Path) -> None:
    write_files(tmp_path / "raw", {"preview.png": P[0]})
    shard(tmp_path / "raw/s-000.tar", {"jpg": P[1], "cls": "0"})
    with pytest.raises(ValueError, match=r"1 images \(preview\.png\) beside 1 tar archives .*'\S+/raw/\*\.tar'"):
        open_source(tmp_path / "raw")
    assert len(open_source(tmp_path / "raw/*.tar").items) == 1


# Class folders and names


def test_classes_without_a_readable_image_keep_their_number(tmp_path: Path) -> None:
    files = {"ant/1.png": P[1], "bee/2.heic": b"..", "cat/3.png": P[3], "notes/a.txt": b"x", "@eaDir/1.png": P[0],
             "#recycle/1.png": P[0], "lost+found/x": b"", "ant/@eaDir/1.png": P[0]}  # fmt: skip
    root = write_files(tmp_path / "raw", files)
    (root / "dog").mkdir()
    source = open_source(root)
    assert source.class_names == ("ant", "bee", "cat", "dog")
    assert labels(source) == {"ant/1.png": 0, "cat/3.png": 2}
    assert set(left_out(source)) == {"bee/", "bee/2.heic", "dog/", "notes/a.txt"}
    assert "bee, dog" in source.notes[0]
    numbers = open_source(write_files(tmp_path / "numbers", {f"{i}/{i}.png": P[0] for i in range(11)}))
    assert (labels(numbers)["10/10.png"], numbers.notes[0][-11:]) == (2, ": '10' is 2")
    os.mkfifo(root / "ant/pipe.png")
    assert "neither a plain file" in left_out(open_source(root))["ant/pipe.png"]
    alone = write_files(tmp_path / "alone", {"ant/1.png": P[1], "bee/2.heic": b".."})
    with pytest.raises(ValueError, match=r"lie in 'ant', .*\(bee\): choose with --labels folder or --labels none"):
        open_source(alone)
    assert open_source(alone, labels="folder").class_names == ("ant", "bee")
    assert open_source(alone, labels="none").class_names == ()


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/raw/caf\xe9"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(ValueError, match=r"caf\\xe9.* is not UTF-8"):
        open_source(tmp_path / "raw")
    packed = tar_of({"cafX/1.png": P[0]}).replace(b"cafX", b"caf\xe9")
    header = bytearray(packed[:512])
    header[148:156] = b" " * 8
    packed = packed[:148] + b"%06o\0 " % sum(header) + packed[156:]
    with pytest.raises(ValueError, match=r"caf\\xe9.* is not UTF-8"):
        open_source(written(tmp_path / "x.tar", packed))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_of_archives_in_other_encodings(kind: str, tmp_path: Path) -> None:
    """Which encoding cannot be seen, so it is asked, and the classes have their names in the order of these."""
    path = tmp_path / f"x.{kind}"
    files = {"ant/0.png": P[0], "\u732b/1.png": P[1], "\u72d7/2.png": P[2]}
    if kind == "tar":
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="gbk") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        content = zip_of(
            {name.replace("\u732b", "c__t").replace("\u72d7", "d__g"): file for name, file in files.items()}
        )
        for stand_in, name in ((b"c__t", "\u732b"), (b"d__g", "\u72d7")):
            content = content.replace(stand_in, (name.encode("gbk") * 2)[:4])
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not UTF-8: which encoding is it\? Choose with --encoding gbk"):
        open_source(path)
    repeat = 2 if kind == "zip" else 1
    assert open_source(path, encoding="gbk").class_names == ("ant", "\u72d7" * repeat, "\u732b" * repeat)
    assert len(open_source(path, labels=False).items) == 3, "without classes their names do not matter"
    with pytest.raises(ValueError, match="unknown encoding: no_such"):
        open_source(path, encoding="no_such")


def test_links_doubles_and_appended_tars(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, target in [("c/1.png", tarfile.SYMTYPE, "../a/1.png"), ("a/1.png", tarfile.REGTYPE, ""),
                                   ("b/1.png", tarfile.LNKTYPE, "a/1.png"), ("d/1.png", tarfile.SYMTYPE, "/etc/passwd"),
                                   ("e/1.png", tarfile.SYMTYPE, "1.png")]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 0 if target else len(P[0])
            tar.addfile(info, io.BytesIO(P[0]) if not target else None)
    more = tar_of({"f/2.png": P[2], "a/1.png": P[1]})
    source = open_source(written(tmp_path / "x.tar", out.getvalue() + more))
    assert contents(source) == sorted([(P[1], 0), (P[1], 1), (P[1], 2), (P[2], 5)])
    assert {"d/1.png", "e/1.png", "a/1.png"} <= set(left_out(source))
    with pytest.raises(ValueError, match="is damaged"):
        open_source(written(tmp_path / "y.tar", out.getvalue() + b"no tar at all" * 100))


@pytest.mark.parametrize("inner", ["ant.tar", "ant.tar.gz", "ant.tgz"])
def test_a_compressed_class_does_not_vanish(inner: str, tmp_path: Path) -> None:
    packed = gzip.compress(tar_of({"0.png": P[0]}))
    files = {inner: packed} | {f"{name}.tar": tar_of({"1.png": P[i]}) for i, name in enumerate(["bee", "cat"])}
    source = open_source(written(tmp_path / "x.tar", tar_of(files)))
    assert (source.class_names, labels(source)) == (("ant", "bee", "cat"), {"bee/1.png": 1, "cat/1.png": 2})
    assert "compressed by gzip" in left_out(source)[inner]
    with pytest.raises(ValueError, match=rf"{inner} is compressed .*plain \.tar"):
        open_source(write_files(tmp_path / "raw", files))


def test_archives_beside_each_other(tmp_path: Path) -> None:
    files = {f"{i}.tar": tar_of({"0.png": P[i]}) for i in range(2)} | {"README.md": b""}
    source = open_source(write_files(tmp_path / "tars", files))
    assert "README.md" in left_out(source)
    assert "numbered archives are parts of one set; --labels folder" in source.notes[0]
    zips = {f"{name}.zip": zip_of({"ant/0.png": P[0]}) for name in ("train", "test")}
    with pytest.raises(ValueError, match=r"one at a time, such as \S+/zips/test\.zip"):
        open_source(write_files(tmp_path / "zips", zips))


def test_links_to_folders_of_an_archive(tmp_path: Path) -> None:
    out = io.BytesIO(tar_of({"ant/0.png": P[0], "cat/1.png": P[1]}))
    with tarfile.open(fileobj=out, mode="a") as tar:
        info = tarfile.TarInfo("bee")
        info.type, info.linkname = tarfile.SYMTYPE, "ant"
        tar.addfile(info)
    source = open_source(written(tmp_path / "x.tar", out.getvalue()))
    assert labels(source) == {"ant/0.png": 0, "bee/0.png": 1, "cat/1.png": 2}


@pytest.mark.parametrize("name", ["x.tar", "x.zip", "x.parquet", "x.jpg"])
def test_empty_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty: it has 0 bytes"):
        open_source(written(tmp_path / name, b""))


# Parquet


def table(path: Path, **columns: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(P[:3], pa.binary()), **columns}), path)
    return path


@pytest.mark.parametrize(
    ("columns", "numbers", "names"),
    [
        ({"label": ["dog", "ant", "dog"]}, [1, 0, 1], ("ant", "dog")),
        ({"label": ["10", "9", "x"]}, [0, 1, 2], ("10", "9", "x")),
        ({"label": [2.0, 0.0, 1.0]}, [2, 0, 1], ("0", "1", "2")),
        ({"label": [True, False, True]}, [1, 0, 1], ("0", "1")),
        ({"labels": [[2], [0], [1]]}, [2, 0, 1], ("0", "1", "2")),
        ({"class": [2, 0, 1], "text": ["a", "b", "c"]}, [2, 0, 1], ("0", "1", "2")),
        ({"category": ["b", "a", "b"]}, [1, 0, 1], ("a", "b")),
        ({"class_id": [1, 0, 1], "similarity": [0.1, 0.2, 0.3]}, [1, 0, 1], ("0", "1")),
        ({"caption": ["a", "b", "c"]}, [None] * 3, ()),
        ({"label": [Decimal(2), Decimal(0), Decimal(1)]}, [2, 0, 1], ("0", "1", "2")),
        ({"label": [b"dog", b"ant", b"dog"]}, [1, 0, 1], ("ant", "dog")),
    ],
)  # fmt: skip
def test_labels_of_parquet_files(columns: Any, numbers: list[int], names: tuple[str, ...], tmp_path: Path) -> None:
    source = open_source(table(tmp_path / "x.parquet", **columns))
    assert ([item.label for item in source.items], source.class_names) == (numbers, names)


def test_columns_that_are_not_clear(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    words = pa.array(["b", "a", "b"]).dictionary_encode()
    assert open_source(table(tmp_path / "d.parquet", label=words)).class_names == ("a", "b")
    assert "other columns: score" in open_source(table(tmp_path / "s.parquet", score=[0.1, 0.2, 0.3])).notes[0]
    two = table(tmp_path / "two.parquet", fine_label=[0, 1, 2], coarse_label=[0, 0, 1])
    with pytest.raises(ValueError, match="--labels coarse_label or --labels fine_label or --labels none"):
        open_source(two)
    assert [item.label for item in open_source(two, labels="fine_label").items] == [0, 1, 2]
    with pytest.raises(ValueError, match="no column 'x' of labels: choose with --labels fine_label"):
        open_source(two, labels="x")
    with pytest.raises(ValueError, match=r"no column called label.*--labels breed or --labels none"):
        open_source(table(tmp_path / "o.parquet", breed=["a", "b", "c"]))
    struct = table(tmp_path / "struct.parquet", label=[{"id": 1, "name": "b"}, {"id": 0, "name": "a"}, None])
    with pytest.raises(
        ValueError, match=r"'label' of .* has several fields: choose with --labels label\.id or --labels"
    ):
        open_source(struct)
    assert [item.label for item in open_source(struct, labels="label.id").items] == [1, 0]
    assert open_source(struct, labels="label.name").class_names == ("a", "b")
    assert open_source(struct, labels="label.id").skipped[0].reason == "it has no label, others have"
    hidden = table(tmp_path / "hidden.parquet", label=[-1, -1, -1])
    with pytest.raises(ValueError, match=r"none of the 3 labels .* its label is -1.*--labels none"):
        open_source(hidden)
    assert len(open_source(hidden, labels="none").items) == 3
    empty = table(tmp_path / "empty.parquet", label=[0, 1, 2])
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    with pytest.raises(ValueError, match="holds no images: its 1 parquet files have no rows"):
        open_source(empty)
