"""Which extra of this package brings a package that is not installed."""

from __future__ import annotations

EXTRA_OF = {
    "PIL": "train",
    "cleanfid": "eval",
    "diffusers": "latents",
    "gradio": "demo",
    "gym_pusht": "policy",
    "huggingface_hub": "hub",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "pyarrow": "parquet",
    "scipy": "train",
    "sklearn": "digits",
    "tensorboard": "train",
    "webdataset": "train",
    "x_transformers": "transformer",
}
"""By the name that is imported; pyproject.toml says what each extra holds."""


def remedy(error: BaseException) -> str | None:
    """A sentence that names the extra to install, where a failed import does not say it itself; else None."""
    if not isinstance(error, ImportError) or "pip install" in str(error):
        return None
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, ModuleNotFoundError) and cause.name):
        cause = cause.__cause__
    package = str(cause.name).partition(".")[0] if isinstance(cause, ModuleNotFoundError) else None
    if package not in EXTRA_OF:
        return None
    return f"this needs {package}, which is not installed: pip install 'shortcutflow[{EXTRA_OF[package]}]'"
