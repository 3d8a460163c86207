"""Networks from TorchScript files.

A TorchScript file is a program of tensor operations. Python's pickle never sees it, so it names no Python function to
call; but it computes what it likes, may read and write files, and torch warns of files that are made to break its
loader. So it is only as trustworthy as where it came from, and results name it by its SHA-256.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from typing import Any

import torch

from shortcutflow.evaluation.features.weights_files import HeldFile

LARGEST = 4 * 2**30
"""Bytes of a TorchScript file, packed and unpacked."""


def load_torchscript(file: HeldFile, device: torch.device | str = "cpu") -> Any:
    """The file's module, in evaluation mode and without gradients.

    Raises:
        ValueError: if it is no TorchScript archive, would unpack to more than 4 GiB, or cannot be loaded.
    """
    _check_archive(file)
    try:
        with warnings.catch_warnings():
            # torch.export, which torch recommends instead, does not read the published files.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(io.BytesIO(file.content), map_location=device)
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file.path} cannot be loaded as TorchScript: {_first_line(error)}") from error
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def _check_archive(file: HeldFile) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(file.content)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(
            f"{file.path} is no TorchScript file, which is a zip archive: {_first_line(error)}; "
            "torch.jit.save writes one"
        ) from error
    if not any("/code/" in info.filename for info in infos):
        raise ValueError(
            f"{file.path} is an archive without code, such as torch.save writes: a pickle, which is never loaded; "
            "save the network with torch.jit.save(torch.jit.trace(network, example), path)"
        )
    if (size := sum(info.file_size for info in infos)) > LARGEST:
        raise ValueError(f"{file.path} would unpack to {size} bytes; at most {LARGEST} are allowed")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
