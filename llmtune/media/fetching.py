"""Files that rows name by an address."""

from __future__ import annotations

import string
import time
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from llmtune.contract.examples import BadRow

LARGEST_DOWNLOAD = 2**28
"""Bytes of a file that is fetched from an address: 256 MiB."""
_SECONDS, _MOST_SECONDS = 30.0, 600.0
"""How long an address may say nothing, and how long all of a file may take."""
_WAITS = (0.5, 2.0)
"""Seconds before a server that is busy, or a connection that breaks, is asked again."""
_BUSY = (408, 429, 500, 502, 503, 504)


def content_at(address: str) -> bytes:
    """What an address holds; spaces and letters beyond ASCII in it may stand as they are, as in a browser. BadRow where
    it cannot be fetched."""
    written = urllib.parse.quote(address, safe=string.punctuation)
    asked = urllib.request.Request(written, headers={"User-Agent": "llmtune"})  # some refuse Python's own
    waits = iter(_WAITS)
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=_SECONDS) as answer:
                content = _downloaded(answer)
        except (OSError, ValueError, HTTPException) as error:
            lasting = isinstance(error, ValueError) or (isinstance(error, HTTPError) and error.code not in _BUSY)
            if lasting or (wait := next(waits, None)) is None:
                said = " ".join(str(error).split())
                raise BadRow("media cannot be fetched", f"{address[:80]}: {said}") from None
            time.sleep(wait)
            continue
        if len(content) > LARGEST_DOWNLOAD:
            raise BadRow("media cannot be fetched", f"{address[:80]} has more than {LARGEST_DOWNLOAD:,} bytes")
        return content


def _downloaded(answer: Any) -> bytes:
    """What a server sends, up to one byte more than is allowed. OSError where it ends early, ValueError
    where it goes on for ever."""
    content, until = bytearray(), time.monotonic() + _MOST_SECONDS
    while len(content) <= LARGEST_DOWNLOAD and (part := answer.read1(2**16)):
        content += part
        if time.monotonic() > until:
            raise ValueError(f"{len(content):,} bytes took longer than {_MOST_SECONDS:.0f} seconds")
    if answer.length and len(content) <= LARGEST_DOWNLOAD:
        raise OSError(f"the connection ended {answer.length:,} bytes before the file's end")
    return bytes(content)
