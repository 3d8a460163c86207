"""``shortcutflow prepare`` as a process of its own, to be killed by tests."""

import sys

from shortcutflow.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
