"""What tells the files of one model from those of another, without reading all of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.folders import size_and_hash
from llmtune.model.weight_files import read_header, weight_names

if TYPE_CHECKING:
    from llmtune.model.edits import Ledger

_SAMPLE_BYTES = 1024


def fingerprint(folder: Path) -> str:
    """SHA-256 over a model folder's config and, of each weight file, its header, its size and 1 kB of every tensor.

    Another model, or the same after more training, has another one; a single damaged byte may go unnoticed.
    Raises LoadError where the folder holds no weights, or damaged ones.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in weight_names(folder):
        tensors = read_header(folder / name)
        digest.update(repr([(key, tensors[key]) for key in sorted(tensors)]).encode())
        with (folder / name).open("rb") as file:
            for tensor in tensors.values():
                file.seek(tensor.start + max(0, (tensor.stop - tensor.start - _SAMPLE_BYTES) // 2))
                digest.update(file.read(min(_SAMPLE_BYTES, tensor.stop - tensor.start)))
    return digest.hexdigest()


def base_fingerprint(folder: Path, ledger: Ledger) -> str:
    """The `fingerprint` of a model's folder, followed by the hashes of the adapters that are merged into it."""
    return " ".join([fingerprint(folder), *sorted(size_and_hash(file)[1] for file in ledger.beneath())])
