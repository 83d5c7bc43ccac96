"""A name for the content of a data set."""

from __future__ import annotations

import hashlib

from llmtune.contract.errors import DataError
from llmtune.data.hashes import file_hash
from llmtune.data.reading.dataset import Dataset
from llmtune.data.reading.files import kind_of
from llmtune.data.reading.hub import hub_content


def content_key(dataset: Dataset) -> str:
    """SHA-256 over the content of the files in their order. DataError if one cannot be read."""
    if dataset.hub is not None:
        return hub_content(dataset)
    digest = hashlib.sha256()
    for path in dataset.files:
        try:
            digest.update(f"{kind_of(path)} {file_hash(path)}\n".encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from None
    return digest.hexdigest()
