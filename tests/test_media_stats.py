"""What statistics and the preview say of rows that show media."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llmtune
from tests.tiny_media import MODELS, rows

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("media")
    return {"model": str(MODELS["llava_next"](place / "model")), "dataset": str(rows(place)), "bf16": False}


def test_statistics_count_what_rows_show_apart_from_text(keys: dict[str, Any]) -> None:
    """Against the processor's own answer for each picture by itself."""
    from PIL import Image

    from llmtune.media.loading import load_processor
    from llmtune.media.opening import open_image

    found = llmtune.stats(keys, image_max_pixels=700, image_min_pixels=500)
    whole = json.loads(Path(keys["dataset"]).read_text())
    names = [row.get("images", []) for row in whole]
    folder = Path(keys["dataset"]).parent
    opened = {name: Image.open(folder / name).size for shown in names for name in shown}
    sizes = sorted(opened.values(), key=lambda size: size[0] * size[1])
    pixels = [width * height for width, height in sizes]
    media = found.media
    assert media is not None and media.pictures is not None
    assert (media.samples, dict(media.media)) == (sum(map(bool, names)), {"image": sum(map(len, names))})
    assert dict(media.most) == {"image": max(map(len, names))}
    assert media.tokens + media.text_tokens == found.all.tokens
    own = load_processor(Path(keys["model"]))
    expected, most = 0, 0
    for shown in names:
        pictures = [open_image(str(folder / name), 700, 500) for name in shown]
        count = 0
        if pictures:
            ids = own(text="<image>" * len(pictures), images=pictures)["input_ids"]
            count = sum(token in own.image_token_ids for token in (ids[0] if isinstance(ids[0], list) else ids))
        expected, most = expected + count, max(most, count)
    assert (media.tokens, media.most_tokens) == (expected, most)
    assert (media.pictures.smallest, media.pictures.largest) == (sizes[0], sizes[-1])
    assert media.pictures.larger == sum(each > 700 for each in pixels) > 0
    assert media.pictures.smaller == sum(each < 500 for each in pixels) > 0
    assert f"{media.tokens:,} tokens stand for them" in str(found)
    assert json.loads(json.dumps(found.as_dict(), default=str))["media"]["tokens"] == media.tokens


def test_statistics_of_text_say_nothing_of_media(keys: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "text.json"
    place.write_text(json.dumps([row for row in json.loads(Path(keys["dataset"]).read_text()) if "images" not in row]))
    found = llmtune.stats({**keys, "dataset": str(place)})
    assert found.media is None
    assert "stand for" not in str(found)


def test_a_page_of_a_preview_holds_the_pictures_small_and_a_terminal_names_them(keys: dict[str, Any]) -> None:
    import base64
    import io
    import re

    from PIL import Image

    found = llmtune.preview(keys, n=4)
    assert "shows 0.png" in str(found)
    assert "data:image" not in str(found)
    page = found.html()
    held = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="(\d).png"', page)
    assert [name for _, name in held] == ["0", "1", "2"]  # the fourth shows nothing
    for content, name in held:
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        assert shown.tobytes() == Image.open(Path(keys["dataset"]).parent / f"{name}.png").convert("RGB").tobytes()
    places = [page.index(text) for text in ("0.png, ", 'alt="0.png"', "shows 1.png", 'alt="1.png"') if text in page]
    assert places == sorted(places)
