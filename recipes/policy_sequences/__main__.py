"""``python -m recipes.policy_sequences``, also under torchrun."""

from recipes.policy_sequences import recipe
from shortcutflow.cli import launch

if __name__ == "__main__":
    launch(recipe())
