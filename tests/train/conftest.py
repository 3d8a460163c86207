"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortcutflow.data.digits import write_digits


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards with the digits."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder)
    return folder
