"""``python -m shortcutflow``, and ``torchrun -m shortcutflow``."""

from shortcutflow.cli import main

main()
