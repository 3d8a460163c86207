"""Arrays that stay in the file they are in until somebody reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class StoredArray:
    """Where an array's numbers are.

    Attributes:
        path: of the file.
        offset: of the first number, in bytes.
        shape: of the array.
        dtype: of a number, with its byte order.
        fortran: the first axis runs fastest.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that the numbers take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, in memory of its own.

        Raises:
            ValueError: if the file has become shorter than it was.
        """
        numbers = np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset)
        return numbers.reshape(self.shape, order="F" if self.fortran else "C")
