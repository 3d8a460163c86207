"""Which labels a source has, and the class number of each."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

MOST_CLASSES = 1_000_000
_FIELDS = {
    "label", "labels", "class", "classes", "cls", "class_id", "class_idx", "class_index", "class_label", "label_id",
    "label_idx", "category", "category_id", "target", "targets", "fine_label", "coarse_label", "y",
}  # fmt: skip
_FIELDS_OF_NAMES = {"class_name", "classname", "label_name", "label_text", "category_name"}
_PART = re.compile(r"(part|batch|chunk|shard|fold|split|bucket)[-_ ]?[0-9]+", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0*)?", re.ASCII)


def choice_of(labels: object) -> Any:
    """A choice of labels without the words for True and False; see :data:`LabelChoice`."""
    return {"auto": True, "none": False, "": False}.get(labels, labels) if isinstance(labels, str) else labels


LabelChoice = Annotated[bool | str, BeforeValidator(choice_of)]
"""True ("auto") takes the labels that are there, False ("none") no labels; "folder" the folders' names, "json" those of
``dataset.json`` or of ``KEY.json``, and any other word the column, extension or field of this name."""


def how_to_choose(*choices: str) -> str:
    """The end of an error that a choice of labels would resolve."""
    named = " or ".join(f"--labels {choice}" for choice in choices)
    return f"choose with {named} (in a recipe: data.labels={choices[0]})"


class NoLabel(NamedTuple):
    """Why an image has no usable label."""

    reason: str


def number_labels(
    values: Sequence[Any], where: str, *, names: Sequence[str] = (), words: bool = False
) -> tuple[list[int | NoLabel], tuple[str, ...]]:
    """The class number of each value, and the class names.

    Whole numbers are class numbers, however they are written. Words are class names, numbered in their order; of
    both together the more frequent kind counts and the other has no label, unless ``words``.

    Args:
        values: as they stand in the source; None where there is none.
        where: they stand, for messages.
        names: of class 0, 1, ... where the source gives them.
        words: take all values for names if some are not numbers.

    Raises:
        ValueError: if none of them can be used.
    """
    values = [_simple(value) for value in values]
    found = [plain_label(value) for value in values]
    counts = Counter(type(value) for value in found)
    if counts[str] > (0 if words else counts[int]) or not counts[int]:
        pairs = zip(found, values, strict=True)
        texts = [value if isinstance(value, NoLabel) else str(raw).strip() for value, raw in pairs]
        class_names = tuple(sorted({text for text in texts if isinstance(text, str)}))
        number = {name: i for i, name in enumerate(class_names)}
        numbers = [number[text] if isinstance(text, str) else text for text in texts]
    else:
        numbers = [NoLabel(f"its label is {v[:40]!r}, others are numbers") if isinstance(v, str) else v for v in found]
        highest = max(value for value in numbers if isinstance(value, int))
        class_names = tuple(names) if len(names) > highest else tuple(map(str, range(highest + 1)))
    if not class_names:
        reason = f", the first: {found[0].reason}" if found and isinstance(found[0], NoLabel) else ""
        raise ValueError(
            f"none of the {len(found)} labels in {where} can be used{reason}. Without labels: --labels none"
        )
    return numbers, class_names


def _simple(value: Any) -> Any:
    """Without a list of one, as text instead of its bytes, and as an int instead of a whole decimal number."""
    if type(value) in (list, tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return NoLabel(f"its label is {value[:20]!r}, which is no text")
    return int(value) if isinstance(value, Decimal) and value == value.to_integral_value() else value


def plain_label(value: Any) -> int | str | NoLabel:
    """A number, a word, or why it is neither."""
    if isinstance(value, NoLabel):
        return value
    if value is None:
        return NoLabel("it has no label, others have")
    if isinstance(value, str):
        value = value.strip()
        if not _NUMBER.fullmatch(value):
            return value or NoLabel("its label is empty")
        value = int(value.partition(".")[0])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and 0 <= value < MOST_CLASSES:
        return int(value)
    if isinstance(value, list | tuple):
        return NoLabel(f"it has {len(value)} labels, one is needed")
    return NoLabel(f"its label is {str(value)[:40]}, numbers must be whole, at least 0 and below {MOST_CLASSES}")


def choose_field(fields: Iterable[str], where: str, prefix: str = "") -> str | None:
    """The field of a table or of JSON that holds the label, by its name; None if there is none.

    Raises:
        ValueError: if there are several, naming them.
    """
    fields = sorted(fields)
    found = [name for name in fields if name.lower() in _FIELDS]
    found = found or [name for name in fields if name.lower() in _FIELDS_OF_NAMES]
    if len(found) > 1:
        choices = [prefix + name for name in found] + ["none"]
        raise ValueError(f"{where} has several fields that may be the label: {how_to_choose(*choices)}")
    return found[0] if found else None


def dataset_json(content: bytes, where: str) -> dict[str, object] | None:
    """Labels by file name, as EDM and StyleGAN store them; None if it says that there are none.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        pairs = json.loads(content)["labels"]
        if pairs is None:
            return None
        labels: dict[str, object] = {}
        for name, label in pairs:
            if labels.setdefault(str(name), label) != label:
                labels[str(name)] = NoLabel("it has several different labels in dataset.json")
        return labels
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{where} is not {{"labels": [["00000/img.png", 3], ...]}} as EDM and StyleGAN write it ({error}): repair '
            "or remove it"
        ) from error


def metadata_labels(content: bytes, where: str, field: str | None) -> dict[str, object] | None:
    """Labels by file name from ``metadata.csv`` or ``.jsonl`` as Hugging Face's image folders have them, or None.

    Raises:
        ValueError: if it cannot be read, has no such field, or several may be the label.
    """
    try:
        text = content.decode("utf-8-sig")
        if where.endswith(".csv"):
            table: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
        else:
            table = [json.loads(line) for line in text.splitlines() if line.strip()]
        names = [row["file_name"] for row in table]
        fields = {str(name) for row in table for name in row if name}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{where} is no table with a field 'file_name' ({error}): repair or remove it") from error
    chosen = field or choose_field(fields, where)
    if field is not None and field not in fields:
        raise ValueError(f"{where} has no field {field!r}, it has {', '.join(sorted(fields))}")
    return None if chosen is None else {str(name): row.get(chosen) for name, row in zip(names, table, strict=True)}


def label_column(content: bytes, suffix: str) -> str | None:
    """The column of a table (``.csv``, ``.tsv`` or ``.jsonl``) that by its name holds labels, or None."""
    head = content[: 2**16].decode("utf-8-sig", errors="replace").splitlines()[:1]
    try:
        if suffix == ".jsonl":
            columns = list(json.loads(head[0]))
        elif suffix in (".csv", ".tsv"):
            columns = next(csv.reader(head, delimiter="\t" if suffix == ".tsv" else ","))
        else:
            return None
    except (ValueError, IndexError, TypeError, StopIteration, RecursionError, csv.Error):
        return None
    found = [str(name).strip() for name in columns]
    return next((name for name in found if name.lower() in _FIELDS | _FIELDS_OF_NAMES), None)


def is_bucket_layout(names: Sequence[str]) -> bool:
    """Whether folders only number parts of a set: 00000, 00001, ..., FFHQ's 00000, 01000, ..., or part1, part2, ..."""
    if len(names) > 1 and all(_PART.fullmatch(name) for name in names):
        return True
    if len(names) < 2 or not 2 <= len(names[0]) <= 18 or len({len(name) for name in names}) > 1:
        return False
    if not all(re.fullmatch(r"[0-9]+", name) for name in names):
        return False
    numbers = sorted(map(int, names))
    gaps = [b - a for a, b in pairwise(numbers)]
    step = min(gaps)
    regular = step in (1, 10, 100, 1000, 10_000) and all(gap % step == 0 for gap in gaps)
    return regular and (numbers[-1] - numbers[0]) // step < 2 * len(names)
