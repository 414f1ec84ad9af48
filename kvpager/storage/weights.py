"""Names a model by the files of its weights: for stores that several processes share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_WEIGHTS = {".bin", ".gguf", ".json", ".pt", ".pth", ".safetensors"}


def model_digest(name: str) -> str:
    """Return a digest of the files of a local model. O(bytes).

    Raises: `ValueError` if `name` is no directory and no file.
    """
    files = sorted(_files(Path(name)))
    if not files:
        raise ValueError(
            f"model={name!r}: kvpager can only read the weights of a local directory. Name the "
            'model in the stores: offload(..., model_id="NAME@REVISION").'
        )
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest.update(f"{file.name} {os.path.getsize(file)} ".encode())
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (each for each in path.iterdir() if each.suffix in _WEIGHTS)
