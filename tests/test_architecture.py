"""docs/architecture.md has the layers of the import contract, and a way that is not too long."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()


def test_the_way_of_an_image_has_at_most_40_files() -> None:
    way = PAGE.partition("<!-- the way of an image")[2].partition("<!-- end of the way -->")[0]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. `", way, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) <= 40


def test_the_picture_has_the_layers_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = " ".join(contracts[0]["layers"])
    picture = PAGE.split("```")[1]
    drawn = re.findall(r"\b(\w+)(?:\.py|/)", picture)
    known = set(re.findall(r"shortcutflow\.(\w+)", layers))
    assert [name for name in drawn if name not in known] == []
    assert known - set(drawn) == {"inputs", "old_names", "plugins"}, "small ones that the picture leaves out"
    # The order of lines is the order of layers.
    rank = {name: i for i, layer in enumerate(contracts[0]["layers"]) for name in re.findall(r"\.(\w+)", layer)}
    ranks = [rank[name] for name in drawn]
    assert ranks == sorted(ranks)
