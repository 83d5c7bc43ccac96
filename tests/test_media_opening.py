"""Files of pictures, video and sound are opened whole, upright and of a sane size, or refused; no file reads others."""

from __future__ import annotations

import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtune.contract.examples import BadRow
from llmtune.media.config import MediaConfig
from llmtune.media.opening import open_audio, open_blank, open_image, open_video
from tests.tiny_media import draw

pytest.importorskip("PIL")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, and one that is broken off."""
    made = tmp_path / "inside"
    made.mkdir()
    for number, (color, shape) in enumerate((("red", "circle"), ("blue", "square"))):
        draw(made / f"{number}.png", color, shape, (32, 24))
    (made / "broken.png").write_bytes((made / "0.png").read_bytes()[:60])
    return made


def test_pictures_are_opened_upright_in_rgb_and_of_a_sane_size(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(str(tmp_path / "turned.jpg"), None, None).size == (20, 40)
    Image.new("P", (40, 20)).save(tmp_path / "palette.png")
    small = open_image(str(tmp_path / "palette.png"), 200, None)
    assert (small.mode, small.size) == ("RGB", (20, 10))
    assert open_image(str(tmp_path / "palette.png"), None, 3200).size == (80, 40)
    with pytest.raises(BadRow, match=r"broken.png cannot be read") as caught:
        open_image(str(folder / "broken.png"), None, None)
    assert caught.value.reason == "broken media"
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + data)
    with pytest.raises(BadRow, match="bomb.png has more pixels than Pillow opens, allowed are 134,217,728 in all"):
        open_image(str(tmp_path / "bomb.png"), None, None)


def test_pictures_of_every_kind_are_what_transformers_opens(tmp_path: Path) -> None:
    """CMYK, palettes with transparency, alpha, grey, one bit, the first picture of animations, turned ones."""
    from PIL import Image
    from transformers.image_utils import load_image

    random_bytes = np.random.default_rng(0)
    color = Image.fromarray(random_bytes.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    turned = color.getexif()
    turned[0x0112] = 6
    clear = Image.fromarray(random_bytes.integers(0, 255, (9, 12, 4), dtype=np.uint8), "RGBA")
    color.convert("CMYK").save(tmp_path / "cmyk.jpg")
    color.convert("P").save(tmp_path / "palette.png", transparency=3)
    clear.save(tmp_path / "clear.png")
    clear.save(tmp_path / "clear.webp", lossless=True)
    clear.convert("LA").save(tmp_path / "grey.png")
    color.convert("1").save(tmp_path / "bit.png")
    color.save(tmp_path / "turned.tiff", exif=turned)
    color.save(tmp_path / "turned.png", exif=turned)
    for name in ("moves.gif", "moves.webp"):
        color.save(tmp_path / name, save_all=True, append_images=[color.rotate(180)])
    color.save(tmp_path / "turned.jpg", exif=turned)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 11
    for file in files:
        ours, theirs = open_image(str(file), None, None), load_image(str(file))
        assert (ours.size, ours.tobytes()) == (theirs.size, theirs.tobytes()), file.name
        for most, least in ((None, None), (50, None), (None, 300)):  # what is told by the head of a file
            whole, blank = open_image(str(file), most, least), open_blank(str(file), most, least)
            assert (blank.size, blank.mode) == (whole.size, whole.mode), file.name


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_pictures_that_would_become_white_are_refused(kind: type, tmp_path: Path) -> None:
    """transformers opens them, as white ones."""
    from PIL import Image

    Image.fromarray(np.full((9, 12), 20_000, kind)).save(tmp_path / "scan.tiff")
    for opens in (open_image, open_blank):
        with pytest.raises(BadRow, match="has more than 8 bits for each colour of a pixel, which would be cut"):
            opens(str(tmp_path / "scan.tiff"), None, None)


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp", "tiff", "bmp"])
def test_a_picture_that_is_cut_off_is_found_before_it_is_trained_on(kind: str, tmp_path: Path) -> None:
    """Wherever the file ends too early: told by its size as well as opened."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    Image.fromarray(noise).save(whole)
    content = whole.read_bytes()
    for share in (0.02, 0.3, 0.6, 0.95):
        cut.write_bytes(content[: int(len(content) * share)])
        for read in (open_image, open_blank):
            with pytest.raises(BadRow, match=f"cut.{kind} cannot be read"):
                read(str(cut), None, None)


def write_video(path: Path, codec: str, frames: int, picture: Any = None) -> None:
    """Pictures of 64 x 48, black ones if none is given, ten a second."""
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.zeros((48, 64, 3), np.uint8) if picture is None else picture, format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    "matrix", [(a, b, c, d) for one in (1, -1) for other in (1, -1)
               for a, b, c, d in ((one, 0, 0, other), (0, one, other, 0))]
)  # fmt: skip
def test_a_video_is_turned_and_mirrored_as_its_file_says(matrix: tuple[int, ...], tmp_path: Path) -> None:
    """By the matrix in its head, as phones write it: the pixel (x, y) stands at (a x + c y, b x + d y)."""
    seen = np.zeros((48, 64, 3), np.uint8)
    seen[:, :32], seen[:, 32:], seen[:16] = (200, 0, 0), (0, 0, 200), (0, 200, 0)
    write_video(tmp_path / "lies.mp4", "mpeg4", 2, seen)
    content = bytearray((tmp_path / "lies.mp4").read_bytes())
    a, b, c, d = (65536 * value for value in matrix)
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "lies.mp4").write_bytes(content)
    frames = open_video(str(tmp_path / "lies.mp4"), MediaConfig(video_fps=10.0)).frames
    ys, xs = np.mgrid[:48, :64]
    at_x, at_y = (sign_x * xs + sign_y * ys for sign_x, sign_y in (matrix[::2], matrix[1::2]))
    wanted = np.zeros((np.ptp(at_y) + 1, np.ptp(at_x) + 1, 3), np.uint8)
    wanted[at_y - at_y.min(), at_x - at_x.min()] = seen
    assert frames.shape == (2, *wanted.shape)
    assert np.abs(frames - wanted.astype(int)).mean() < 20


def test_videos_and_sounds_that_would_fill_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "video.mp4", "mpeg4", 4)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000)
        sound.writeframes(bytes(2 * 8000))
    config = MediaConfig(video_fps=10.0, video_max_pixels=None)
    monkeypatch.setattr("llmtune.media.opening.MOST_VIDEO_PIXELS", 3 * 64 * 48)
    with pytest.raises(BadRow, match="64 x 48 pixels, of which 4 are taken.*lower video_maxlen or video_max_pixels"):
        open_video(str(tmp_path / "video.mp4"), config)
    assert len(open_video(str(tmp_path / "video.mp4"), MediaConfig(video_fps=10.0, video_max_pixels=768)).frames) == 4
    monkeypatch.setattr("llmtune.media.opening.MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(BadRow, match="pictures of 64 x 48 pixels, allowed are 3,071"):
        open_video(str(tmp_path / "video.mp4"), config)
    monkeypatch.setattr("llmtune.media.opening.MOST_SAMPLES", 8000)
    with pytest.raises(BadRow, match="sound.wav is longer than 0 seconds, allowed are 8,000 samples"):
        open_audio(str(tmp_path / "sound.wav"), 16000)


def test_a_sound_that_is_cut_off_is_found(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "whole.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 16_000))
    whole = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "piped.wav").write_bytes(whole[:4] + b"\xff" * 4 + whole[8:])
    assert len(open_audio(str(tmp_path / "piped.wav"), 16_000)) == len(open_audio(str(tmp_path / "whole.wav"), 16_000))
    with pytest.raises(BadRow, match="cut.wav ends after 16,022 of the 32,044 bytes that its head names"):
        open_audio(str(tmp_path / "cut.wav"), 16_000)


@pytest.mark.parametrize(("codec", "kind"), [("pcm_s16le", "<i2"), ("pcm_u8", "u1"), ("pcm_f64le", "<f8")])
@pytest.mark.parametrize(("layout", "channels"), [("mono", 1), ("stereo", 2), ("5.1", 6), ("7.1", 8)])
def test_a_sound_is_the_mean_of_its_channels(layout: str, channels: int, codec: str, kind: str, tmp_path: Path) -> None:
    """FFmpeg's own mix of them is louder: 0.9 in both of stereo becomes 1.27, in all of 5.1 3.07."""
    av = pytest.importorskip("av")
    sound = np.random.default_rng(0).uniform(-0.9, 0.9, (4000, channels)) + 0.05
    number = np.dtype(kind)
    zero, scale = {"i": (0, 2**15), "u": (128, 128), "f": (0, 1)}[number.kind]
    stored = (sound * scale + zero).astype(number)
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        stream = file.add_stream(codec, rate=16_000, layout=layout)
        packet = av.Packet(stored.tobytes())
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        file.mux(packet)
    mean = ((stored.astype(np.float64) - zero) / scale).mean(1)
    np.testing.assert_allclose(open_audio(str(tmp_path / "sound.wav"), 16_000), mean, atol=1e-6)
    halved = open_audio(str(tmp_path / "sound.wav"), 8000)
    assert abs(halved.mean() - mean.mean()) < 1e-3 and len(halved) == pytest.approx(2000, abs=20)


def test_no_file_reads_others_or_runs_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Playlists name files outside of media_dir, and pictures of PostScript run Ghostscript."""
    av = pytest.importorskip("av")
    inside = tmp_path / "inside"
    inside.mkdir()
    write_video(tmp_path / "secret.ts", "mpeg2video", 20)
    assert len(open_video(str(tmp_path / "secret.ts"), MediaConfig()).frames)
    lines = "#EXTM3U", "#EXT-X-TARGETDURATION:2", "#EXTINF:2.0,", "../secret.ts", "#EXT-X-ENDLIST"
    (inside / "list.m3u8").write_text("\n".join(lines))
    with av.open(inside / "list.m3u8") as container:
        assert container.format.name == "hls"
    (inside / "link.ts").symlink_to(tmp_path / "secret.ts")
    (inside / "list.mp4").write_text("ffconcat version 1.0\nfile link.ts\n")
    for name in ("list.m3u8", "list.mp4"):
        with pytest.raises(BadRow, match=f"{name} cannot be read"):
            open_video(str(inside / name), MediaConfig())
    (inside / "drawn.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(BadRow, match="is a program that draws a picture"):
        open_image(str(inside / "drawn.png"), None, None)
    pictures = tuple(str(draw(inside / f"{number}.png", "red", "circle", (32, 24))) for number in range(3))
    monkeypatch.setattr("llmtune.media.opening.MOST_VIDEO_PIXELS", 2 * 32 * 24)
    with pytest.raises(BadRow, match="0.png has pictures of 32 x 24 pixels, of which 3 are taken"):
        open_video(pictures, MediaConfig(video_min_pixels=None))


def test_videos_and_sounds_are_sampled(folder: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(tmp_path / "video.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(0, 200, 10):  # two seconds
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = open_video(str(tmp_path / "video.mp4"), MediaConfig(video_fps=2.0, video_min_pixels=None))
    assert (video.indices, video.total, video.fps, video.frames.shape) == ([0, 6, 12, 19], 20, 10.0, (4, 48, 64, 3))
    shades = video.frames.mean((1, 2, 3))
    assert np.abs(shades - np.array([0, 60, 120, 190])).max() < 12
    few = open_video(str(tmp_path / "video.mp4"), MediaConfig(video_fps=10.0, video_maxlen=3, video_max_pixels=768))
    assert few.frames.shape == (3, 24, 32, 3)
    taken = open_video((str(folder / "0.png"), str(folder / "1.png")), MediaConfig(video_min_pixels=None))
    assert taken.frames.shape == (2, 24, 32, 3)
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000)
        sound.writeframes((tone * 32767).astype("<i2").tobytes())
    heard = open_audio(str(tmp_path / "tone.wav"), 16000)
    assert abs(len(heard) - 16000) < 64
    assert int(np.abs(np.fft.rfft(heard[:16000])).argmax()) == 440
    with pytest.raises(BadRow, match="broken.png"):
        open_audio(str(folder / "broken.png"), 16000)
