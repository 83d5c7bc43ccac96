"""What a model's own processor makes of a rendered text and its media: token ids, and the tensors of a batch.

Every answer is a call of the processor itself, so that all it does (tiles, grids, time stamps, marks for masks) is as
transformers has it for every kind of model.
"""

from __future__ import annotations

import copy
import inspect
import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.contract.examples import PER_TOKEN, BadRow, Media, ShownText
from llmtune.media.beside import beside, in_places
from llmtune.media.by_size import by_size
from llmtune.media.config import MediaConfig
from llmtune.media.content import opened_each
from llmtune.media.hearing import Hearing
from llmtune.media.kept import KeptMedia
from llmtune.media.loading import load_processor
from llmtune.media.opening import Video, open_audio, open_blank, open_image, open_video
from llmtune.media.read import ReadMedia, ShownTokens, TokenLayout
from llmtune.media.spans import by_replacements, by_runs, keeping_texts

if TYPE_CHECKING:
    from torch import Tensor

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What a model that reads media has at least one of."""
ARGUMENT = {"image": "images", "video": "videos", "audio": "audio"}
"""What a processor calls a list of media of each kind."""
_BEFORE, _AFTER = "beforehand", "afterwards"
BLANK = ""
"""The path of a medium that shows nothing."""
_REPLACED = "return_text_replacement_offsets"
_SECONDS = "video_second_per_grid"
"""What the processors of Qwen-Omni say as if two pictures a second, or one, were taken of every video."""


@dataclass(frozen=True, kw_only=True)
class MediaProcessor:
    """A model's processor, read when the first row with media comes."""

    folder: Path
    """The model's files."""
    tokenizer: Any
    """The run's tokenizer, which takes the place of the processor's own."""
    config: MediaConfig = field(default_factory=MediaConfig)
    trust_remote_code: bool = False
    keeps_bytes: int = 0
    """Most bytes of opened media that are kept for whoever asks for them again."""
    most_decoded: int | None = None
    """Most pixels of a video that are decoded, all its pictures together; None is any number."""

    @cached_property
    def processor(self) -> Any:
        """transformers' processor. DataError where there is none."""
        found = load_processor(self.folder, self.trust_remote_code)
        found.tokenizer = self.tokenizer
        return found

    @cached_property
    def _texts(self) -> list[Any]:
        """The texts that the processors of `_reader` give their tokenizer."""
        return []

    @cached_property
    def _reader(self) -> Any:
        """The processor for tokens alone."""
        found = copy.copy(self.processor) if self.trust_remote_code else by_size(self.processor)
        found.tokenizer = keeping_texts(self.tokenizer, self._texts)
        return found

    def facts(self) -> dict[str, Any]:
        """What tokens depend on, besides the files: what the processor's own files say, and the recipe's keys."""
        said = [path.read_text("utf-8") for path in map(self.folder.joinpath, PROCESSOR_FILES) if path.is_file()]
        return {"processor": said, **asdict(self.config), "media_dir": None}

    @property
    def reads(self) -> tuple[str, ...]:
        """The kinds of media that the model takes."""
        parts = {"image": self._part("image_processor"), "video": self._part("video_processor"), "audio": self._hears}
        return tuple(kind for kind, part in parts.items() if part is not None)

    def _part(self, name: str) -> Any:
        return vars(self.processor).get(name)

    @property
    def _hears(self) -> Any:
        """What makes features of sounds; None also where the processor reads no sounds beside a text, but leaves their
        tokens to a tokenizer of mistral-common (Voxtral)."""
        takes = inspect.signature(type(self.processor).__call__).parameters
        alone = "audio" not in takes and "text" in takes
        return None if alone else self._part("feature_extractor") or self._part("audio_processor")

    @cached_property
    def placeholders(self) -> list[int]:
        """The ids of tokens that stand for media."""
        own = self.processor
        found = [*own.image_token_ids, *own.video_token_ids, *own.audio_token_ids]
        return [int(token) for token in found if token is not None]

    def encode(self, shown: ShownText, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """(tokens,) int32 of a text with its media, and for each span of its characters the tokens (first, stop) that
        share one with it. BadRow where media cannot be read, or the text has no place for each."""
        self._texts.clear()
        out = self._called([shown], True, return_offsets_mapping=True, **{_REPLACED: True})
        ids = np.asarray(out["input_ids"][0], np.int32)
        if not spans:
            return ids, []
        whole = str(next(iter(self._texts[-1]), "")) if self._texts else ""
        replaced = next(iter(out.get("text_replacement_offsets", ())), ())
        places = by_replacements(whole, shown.text, spans, replaced) or by_runs(whole, shown.text, spans, self._marks())
        if not places or "offset_mapping" not in out:
            what = f"{type(self.processor).__name__} writes a text in which the answers of the row cannot be found"
            raise BadRow("answers that cannot be told", f"{what}; use a model of another kind")
        offsets = np.asarray(out["offset_mapping"][0]).reshape(-1, 2).tolist()
        starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
        found = [(bisect_right(stops, start), bisect_left(starts, stop)) for start, stop in places]
        return ids, found

    def _marks(self) -> list[str]:
        """The tokens in what stands for media in a text."""
        written = "".join(map(self.written, self.reads))
        return [token for token in self.tokenizer.get_added_vocab() if token in written]

    def fillers(self, kinds: Sequence[str], rows: Sequence[ShownText]) -> list[ShownTokens]:
        """A document with a blank medium of each of `kinds` that no row shows.

        A tower that takes part in one rank's batch and not in another's would leave them waiting for each other; and
        weights of a tower would decay in steps of one rank that they do not in those of several.
        """
        there = {medium.kind for row in rows for medium in row.media}
        return [self._blank(kind) for kind in kinds if kind not in there]

    def _blank(self, kind: str) -> ShownTokens:
        if kind not in self._blanks:
            shown = ShownText(self.begin + self.written(kind), (Media(kind, BLANK),))  # type: ignore[arg-type]
            self._blanks[kind] = ShownTokens(self.encode(shown, [])[0], shown)
        return self._blanks[kind]

    def written(self, kind: str) -> str:
        """What stands for a medium in a text: what the chat template writes between two texts, else what the processor
        looks for. BadRow if the model has no place for one."""
        parts = [{"type": "text", "text": _BEFORE}, {"type": kind}, {"type": "text", "text": _AFTER}]
        with suppress(Exception):  # a template raises whatever it likes
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
            if between := text.partition(_BEFORE)[2].partition(_AFTER)[0]:
                return between
        names = ("boi_token", "image_token") if kind == "image" else (f"{kind}_token",)
        for name in names:
            if token := getattr(self.processor, name, None):
                return str(token)
        raise BadRow(
            "media the model cannot read", f"{type(self.processor).__name__} has no place for {kind} in a text"
        )

    @cached_property
    def begin(self) -> str:
        """What the tokenizer puts before every text: its token of the beginning, or nothing."""
        bos, first = self.tokenizer.bos_token, self.tokenizer("")["input_ids"][:1]
        return bos if bos and first == [self.tokenizer.bos_token_id] else ""

    @cached_property
    def _blanks(self) -> dict[str, ShownTokens]:
        return {}

    def read(self, rows: Sequence[ShownText]) -> ReadMedia:
        """The media of a batch's rows, opened and processed; DataError where one cannot be."""
        try:
            return self.made(rows)
        except BadRow as bad:
            raise DataError(f"media: {bad}; it could be read when the data were tokenised") from bad

    def made(self, rows: Sequence[ShownText]) -> ReadMedia:
        """The same of rows that are read for the first time; BadRow where one cannot be."""
        if not any(row.media for row in rows):
            return ReadMedia({})
        begin = self.begin  # of texts of which some have it, and some get it, all have it
        texts = [f"{begin}{row.text}" if row.text and not row.text.startswith(begin) else row.text for row in rows]
        rows = [ShownText(text, row.media) for text, row in zip(texts, rows, strict=True)]
        return ReadMedia(dict(self._called(rows, padding=True, padding_side="right", return_tensors="pt")))

    def tensors(self, rows: Sequence[ShownText], ids: Sequence[Any], layout: TokenLayout) -> Mapping[str, Tensor]:
        """What the model is given of a batch besides its tokens, which are those of the texts."""
        return self.read(rows).tensors([*map(ShownTokens, map(np.asarray, ids), rows)], layout)

    def prompt_tensors(
        self,
        rows: Sequence[ShownText],
        ids: Sequence[Sequence[int]],
        width: int,
        given: Sequence[int] | None = None,
        read: ReadMedia | None = None,
    ) -> Mapping[str, Tensor]:
        """The same of prompts that are padded on the left to `width` tokens, of which the first ones may be `given`.
        What they show may have been `read`."""
        counts = given or map(len, ids)
        some = [count if count < len(own) else None for count, own in zip(counts, ids, strict=True)]
        read = read or self.read(rows)
        return read.tensors([*map(ShownTokens, map(np.asarray, ids), rows, some)], "left", width)

    def _called(self, rows: Sequence[ShownText], quick: bool = False, **options: Any) -> Any:
        """The processor's answer for some texts with their media; tensors of tokens have a row for each text. With
        `quick` its tokens alone, for which it is given the sizes of pictures."""
        by_size = quick and not self.trust_remote_code  # a model's own code may count by what a picture shows
        shows = [opened_each(row.media, lambda medium: self.opened(medium, by_size)) for row in rows]
        kinds = {medium.kind for row in rows for medium in row.media}
        lengths = {len(one.frames) for some in shows for one in some if isinstance(one, Video)}
        # Some stack these in vain (InternVL), or count what fills up shorter videos, and lose pictures (SmolVLM).
        one_by_one = len(rows) > 1 and "video" in kinds and (len(lengths) > 1 or "image" in kinds)
        places = [at for at, row in enumerate(rows) if row.media]
        if not (one_by_one or kinds == {"audio"} or (self._by_row and 0 < len(places) < len(rows))):
            return self._answered(rows, shows, quick, **options)
        if one_by_one:
            out = beside([self._answered([rows[at]], [shows[at]], quick, **options) for at in places])
        else:  # Of sounds some (Audio Flamingo) want one of each text; Mllama stops at a first row without a picture.
            out = self._answered([rows[at] for at in places], [shows[at] for at in places], quick, **options)
        if len(places) == len(rows):
            return out
        absent = self._absent if self._by_row else {}
        return {
            name: in_places(value, places, len(rows), absent.get(name))
            if name in PER_TOKEN or name in absent
            else value
            for name, value in out.items()
        }

    @property
    def _by_row(self) -> bool:
        """Whether what is made of pictures has an entry for each row, as where a row's tokens attend to them."""
        with suppress(AttributeError):  # Qwen-Omni's asks for its part for video, which needs torchvision
            return "cross_attention_mask" in self.processor.model_input_names
        return False

    @cached_property
    def _absent(self) -> dict[str, Tensor]:
        """What such an entry is for a picture that is not there, by the names of its tensors: what the processor fills
        a row up with beside another that shows one more."""
        one = self._blank("image").shown
        two = ShownText(one.text + self.written("image"), one.media * 2)
        shows = [[self.opened(medium) for medium in row.media] for row in (one, two)]
        made = self._answered([one, two], shows, False, padding=True, return_tensors="pt")
        return {name: value[0, 1] for name, value in made.items() if name not in PER_TOKEN}

    def _answered(
        self, rows: Sequence[ShownText], shows: Sequence[Sequence[Any]], quick: bool, **options: Any
    ) -> Mapping[str, Any]:
        """The same of texts that go together, with their opened media."""
        processor = self._reader if quick else self.processor
        given: dict[str, Any] = {}
        self._check_kinds(rows)
        for kind in {medium.kind for row in rows for medium in row.media}:
            own = [[one for one, medium in zip(some, row.media, strict=True) if medium.kind == kind]
                   for some, row in zip(shows, rows, strict=True)]  # fmt: skip
            given[ARGUMENT[kind]] = own if kind == "image" else [one for some in own for one in some]
        if videos := given.get("videos", []):
            given |= {"video_metadata": [video.metadata() for video in videos], "do_sample_frames": False}
            given["videos"] = [video.frames for video in videos]
        if "return_tensors" not in options:  # Ovis 2, and of video SmolVLM and InternVL, take no lists
            given |= {f"{kind}_kwargs": {"return_tensors": "pt"} for kind in ("images", "videos") if kind in given}
        if "audio" in given:
            given["sampling_rate"] = self._hearing.rate
        bos = self.tokenizer.bos_token
        if bos and any(row.text.startswith(bos) for row in rows):
            options["add_special_tokens"] = False
        given |= {name: options.pop(name) for name in ("return_tensors", _REPLACED) if name in options}
        try:  # `padding` outside of `text_kwargs` would be that of sounds, too
            out = processor(text=[row.text for row in rows], text_kwargs=options, **given)
        except Exception as error:  # processors raise ValueError, IndexError, StopIteration, TypeError
            said = f"{type(self.processor).__name__} says: {error}"
            if len(many := {len(video.frames) for video in videos}) > 1:
                said = f"a row shows videos of {min(many)} to {max(many)} pictures; show one, or lower video_maxlen"
            raise BadRow("processor refuses", said) from error
        if _SECONDS in out and "return_tensors" in given:
            step = self._part("video_processor").temporal_patch_size
            out[_SECONDS] = out[_SECONDS].new_tensor([step / video.taken_fps for video in videos])
        return out

    def _check_kinds(self, rows: Sequence[ShownText]) -> None:
        """BadRow for pictures beside video where what is made of both has one name (SmolVLM): one would be lost."""
        if {"image", "video"} <= {medium.kind for row in rows for medium in row.media}:
            image, video = (self._part(f"{kind}_processor").model_input_names for kind in ("image", "video"))
            if "pixel_values" in {*image} & {*video}:
                said = f"{type(self.processor).__name__} makes one thing of pictures and video"
                raise BadRow("pictures beside video", f"{said}, allowed in a row are those of one kind")

    def opened(self, medium: Media, quick: bool = False) -> Any:
        """What a processor is given of a medium, with `quick` of a picture a blank one of its size. BadRow if it
        cannot be read, or the model reads none of its kind."""
        if medium.kind not in self.reads:
            taken = f"{type(self.processor).__name__} takes {' and '.join(self.reads) or 'text alone'}"
            fix = "; of models that see video, that part needs torchvision" if medium.kind == "video" else ""
            raise BadRow("media the model cannot read", f"{taken}, and a message shows {medium.kind}{fix}")
        keeps = self.keeps_bytes and not quick
        return self._kept.get(medium, self._opened) if keeps else self._opened(medium, quick)

    @cached_property
    def _kept(self) -> KeptMedia:
        return KeptMedia(self.keeps_bytes)

    def _opened(self, medium: Media, quick: bool = False) -> Any:
        if medium.path == BLANK:
            return self._opened_blank(medium.kind)
        if medium.kind == "video":
            return open_video(medium.path, self.config, self.most_decoded)
        assert isinstance(medium.path, str)
        if medium.kind == "audio":
            return self._hearing.whole(open_audio(medium.path, self._hearing.rate), medium.path)
        read = open_blank if quick else open_image
        return read(medium.path, self.config.image_max_pixels, self.config.image_min_pixels)

    def _opened_blank(self, kind: str) -> Any:
        from PIL import Image

        if kind == "video":
            return Video(np.zeros((2, 32, 32, 3), np.uint8), self.config.video_fps, [0, 1], 2)
        return np.zeros(self._hearing.rate, np.float32) if kind == "audio" else Image.new("RGB", (32, 32))

    @cached_property
    def _hearing(self) -> Hearing:
        return Hearing(self.processor, self._hears, self._heard)

    def _heard(self, sound: np.ndarray) -> Mapping[str, Any]:
        return self._answered([self._blank("audio").shown], [[sound]], False, return_tensors="pt")


def media_processor(
    folder: Path, tokenizer: Any, config: MediaConfig, trust_remote_code: bool
) -> MediaProcessor | None:
    """The processor of the model in `folder`; None where it reads text only."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    names = {key.name for key in fields(MediaConfig)}
    keys = {name: value for name, value in vars(config).items() if name in names}
    return MediaProcessor(
        folder=folder, tokenizer=tokenizer, config=MediaConfig(**keys), trust_remote_code=trust_remote_code
    )


def copy_processor(folder: Path, target: Path) -> None:
    """Put the files of the processor in `folder`, where there are any, beside a model that was trained from it, whose
    chat template they would go before."""
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text("utf-8"))
            said.pop("chat_template", None)
            (target / name).write_text(json.dumps(said, indent=2) + "\n", "utf-8")
