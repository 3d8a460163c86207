"""Every test of this folder runs with the package in ``installed/`` there; those of other folders do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backbones_contract.cases import third_party_installed


@pytest.fixture(autouse=True)
def third_party() -> Iterator[None]:
    with third_party_installed():
        yield
