"""Table 1 of the paper (arXiv 2410.12557): FID-50k of DiT-B at 128, 4 and 1 steps."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One cell group of the paper's table.

    Attributes:
        fid: at 128, 4 and 1 steps.
        checked: whether the numbers were read in the paper, in its authors' page or in a text that quotes them. The
            others are from memory and are printed with a question mark.
    """

    fid: tuple[float, float, float]
    checked: tuple[bool, bool, bool] = (True, True, True)

    def cells(self) -> list[str]:
        """Its three numbers as text."""
        return [f"{fid:g}{'' if sure else '?'}" for fid, sure in zip(self.fid, self.checked, strict=True)]


UNCHECKED = (False, False, False)
ONE_STEP_CHECKED = (False, False, True)

PAPER: dict[str, tuple[Published, Published]] = {
    "Progressive distillation": (
        Published((302.9, 251.3, 14.8), UNCHECKED),
        Published((201.9, 142.5, 35.6), UNCHECKED),
    ),
    "Consistency distillation": (Published((59.5, 39.6, 38.2)), Published((132.8, 98.0, 136.5), UNCHECKED)),
    "Reflow": (Published((16.1, 18.4, 23.2), ONE_STEP_CHECKED), Published((16.9, 32.8, 44.8), ONE_STEP_CHECKED)),
    "Flow matching": (Published((7.3, 63.3, 280.5)), Published((17.3, 108.2, 324.8))),
    "Consistency training": (Published((53.7, 19.0, 33.2)), Published((42.8, 43.0, 69.7))),
    "Live reflow": (Published((6.3, 27.2, 43.3), UNCHECKED), Published((46.3, 95.8, 58.1), UNCHECKED)),
    "Shortcut": (Published((6.9, 13.8, 20.5)), Published((15.5, 28.3, 40.3))),
}
"""By method: CelebA-HQ-256 (unconditional) and ImageNet-256 (class-conditional)."""
