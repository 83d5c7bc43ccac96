"""A small copy of a picture inside of a page."""

from __future__ import annotations

import base64
import io
from html import escape

from llmtune.contract.examples import BadRow
from llmtune.media.opening import open_image

SIDE = 160
"""Pixels of the longer side."""


def thumbnail(path: str) -> str:
    """An `img` element that holds the picture, small; nothing where it can no longer be read."""
    try:
        image = open_image(path, None, None)
    except BadRow:
        return ""
    image.thumbnail((SIDE, SIDE))
    kept = io.BytesIO()
    image.save(kept, "PNG")
    content, name = base64.b64encode(kept.getvalue()).decode(), escape(path.rpartition("/")[2])
    return f'<img src="data:image/png;base64,{content}" alt="{name}" title="{name}" style="margin-right: 8px">'
