"""What a model is given of rows that show media is, tensor for tensor, what its own processor makes of the same
conversations: of random ones, with media in every place, by templates of several habits."""

from __future__ import annotations

import json
import re
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers.image_utils import load_image
from transformers.utils import is_torchvision_available

import llmtune
from llmtune.contract.examples import BadRow, ShownText
from llmtune.data.formats import Chosen, read_row
from llmtune.data.formats.chats import OpenAi
from llmtune.data.render import Renderer
from llmtune.media.config import MediaConfig
from llmtune.media.files import MediaFiles
from llmtune.media.loading import load_processor
from llmtune.media.processor import MediaProcessor
from llmtune.model.positions import count_positions_by_document, counting_modules
from tests.tiny_audio import heard, qwen2_audio
from tests.tiny_media import MODELS

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("av")

FAMILIES: dict[str, Callable[[Path], Path]] = {**MODELS, "qwen2_audio": qwen2_audio}
FILES = {
    "image": ["turned.jpg", "palette.png", "clear.png", *(f"{at}.png" for at in range(8))],
    "audio": ["short.wav", "long.wav"],
    "video": [["0.png", "8.png", "0.png"], ["6.png"] * 4],
}
RATE = 2.0
"""Pictures a second of videos that are lists of them."""
SHOWN = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (32, 32))}]}]
"""Turns that show a picture."""
PER_TOKEN = ("mm_token_type_ids", "token_type_ids", "cross_attention_mask")
"""What has a number for each token."""
HABITS = ("as they are", "trims texts", "media first", "looks at the first")
TOOLS = [{"type": "function", "function": {"name": "look", "description": "é", "parameters": {"type": "object"}}}]
TEXTS = st.sampled_from(["", " ", "\n\n", " hello world ", "<b>é</b>", "語🙂", "what is\n", "<image"]) | st.text(
    st.sampled_from("ab é\n<語."), max_size=6
)


class Family(NamedTuple):
    """A kind of model: its processor as transformers has it, and llmtune's."""

    processor: Any
    media: MediaProcessor
    marks: dict[str, str]
    """What its own template writes for a medium of each kind."""


def template(habit: str, marks: dict[str, str], bos: str) -> tuple[str, bool]:
    """A chat template that writes `marks` for media and has the `habit` of some model's own; and whether it reads no
    content that is one text."""
    medium = "".join("{% if c.type == '" + kind + "' %}" + mark + "{% endif %}" for kind, mark in marks.items())
    text = "{% if c.type == 'text' %}{{ c.text }}{% endif %}"

    def each(part: str) -> str:
        return "{% for c in m.content %}" + part + "{% endfor %}"

    content = {
        "as they are": each(medium + text),
        "trims texts": each(medium + text.replace("c.text", "c.text | trim")),
        "media first": each(medium) + each(text.replace("{{", "\n{{")),
        "looks at the first": "{{ ': ' if m.content[0].type == 'text' else ':' }}" + each(medium + text),
    }[habit]
    parts_only = habit in ("media first", "looks at the first")
    if not parts_only:
        said = "{{ m.content" + (" | trim" if habit == "trims texts" else "") + " }}"
        content = "{% if m.content is string %}" + said + "{% else %}" + content + "{% endif %}"
    calls = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + calls + "<|im_end|>\n{% endfor %}"
    tools = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return bos + tools + turns + prompt, parts_only


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes and kinds, and sounds."""
    made, noise = tmp_path_factory.mktemp("files"), np.random.default_rng(0)

    def picture(*shape: int) -> Any:
        return Image.fromarray(noise.integers(0, 255, (*shape, 3), dtype=np.uint8))

    for at, size in enumerate(
        ((20, 70), (64, 24), (1, 1), (5, 150), (150, 7), (31, 33), (65, 129), (90, 14), (20, 70))
    ):
        picture(*size).save(made / f"{at}.png")
    exif = picture(1, 1).getexif()
    exif[0x0112] = 6  # a quarter turn
    picture(24, 40).save(made / "turned.jpg", exif=exif)
    picture(33, 30).convert("P").save(made / "palette.png", transparency=3)
    picture(32, 32).convert("RGBA").save(made / "clear.png")
    for name, seconds in (("short.wav", 0.15), ("long.wav", 0.4)):
        with wave.open(str(made / name), "wb") as sound:
            sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(16000)
            sound.writeframes(noise.integers(-9999, 9999, int(16000 * seconds), dtype=np.int16).tobytes())
    return made


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Each kind of model, made once."""
    made: dict[str, Family] = {}

    def family(name: str) -> Family:
        if name not in made:
            if name == "pixtral" and not is_torchvision_available():
                pytest.skip("its processor needs torchvision")
            model = FAMILIES[name](tmp_path_factory.mktemp(name))
            own, processor = load_processor(model), load_processor(model)
            config = MediaConfig(image_min_pixels=None, image_max_pixels=None)
            media = MediaProcessor(folder=model, tokenizer=own.tokenizer, config=config)
            kinds = [kind for kind in media.reads if kind in FILES]
            made[name] = Family(processor, media, {kind: media.written(kind) for kind in kinds})
        return made[name]

    return family


def contents(kinds: list[str], shows: st.SearchStrategy[bool]) -> st.SearchStrategy[Any]:
    """A text, or parts of which some show a medium."""
    text = st.builds(lambda said: {"type": "text", "text": said}, TEXTS)
    medium = st.sampled_from([{"type": kind, kind: file} for kind in kinds for file in FILES[kind]])
    parts = st.tuples(st.lists(text | medium, max_size=3), medium, st.lists(text | medium, max_size=3)).map(
        lambda found: [*found[0], found[1], *found[2]]
    )
    return shows.flatmap(lambda shown: parts if shown else TEXTS | text.map(lambda part: [part]))


@st.composite
def conversations(draw: st.DrawFn, kinds: list[str], tools: bool) -> dict[str, Any]:
    """A row in OpenAI's shape."""
    content = contents(kinds, st.booleans() if draw(st.integers(0, 3)) else st.just(False))
    answers, messages = TEXTS.filter(str.strip), []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(content)})
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(content)})
        if tools and draw(st.booleans()):
            call = {"type": "function", "function": {"name": "look", "arguments": {"at": draw(TEXTS)}}}
            messages.append({"role": "assistant", "content": draw(answers), "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(answers)})
    return {"messages": messages, **({"tools": TOOLS} if tools else {})}


def with_marks(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row with marks in its texts and columns of files; and with the parts that these say: the texts between."""
    marked: dict[str, Any] = {**row, "messages": []}
    said: dict[str, Any] = {**row, "messages": []}
    for message in row["messages"]:
        content, parts = message["content"], message["content"]
        if not isinstance(content, str) and any(part["type"] != "text" for part in content):
            content, parts = "", []
            for part in message["content"]:
                kind = part["type"]
                content += part["text"] if kind == "text" else f"<{kind}>"
                if kind == "text" and parts and parts[-1]["type"] == "text":
                    parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
                elif kind != "text" or part["text"]:
                    parts.append(part)
                if kind != "text":
                    marked.setdefault(f"{kind}s", []).append(part[kind])
        marked["messages"].append({**message, "content": content})
        said["messages"].append({**message, "content": parts})
    return marked, said


def as_given(row: dict[str, Any], folder: Path, parts_only: bool) -> list[dict[str, Any]]:
    """The same for transformers; texts as parts where the template reads nothing else."""

    def shown(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {"type": "image", "image": load_image(str(folder / part["image"]))}
        if part["type"] == "video":
            return {"type": "video", "video": np.stack([load_image(str(folder / name)) for name in part["video"]])}
        return {"type": "audio", "audio": heard(folder / part["audio"])} if part["type"] == "audio" else part

    turns = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [shown(part) for part in content]
        elif parts_only:
            content = [{"type": "text", "text": content}]
        turns.append({**message, "content": content})
    return turns


def of_videos(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """What a processor is told of the videos in turns, all pictures of which it takes; of none nothing."""
    parts = [part for turn in turns if not isinstance(turn["content"], str) for part in turn["content"]]
    told = [
        {"total_num_frames": len(part["video"]), "fps": RATE, "frames_indices": [*range(len(part["video"]))],
         "duration": len(part["video"]) / RATE, "height": part["video"].shape[1], "width": part["video"].shape[2]}
        for part in parts if part["type"] == "video"
    ]  # fmt: skip
    return {"video_metadata": told, "do_sample_frames": False} if told else {}


def same(found: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_inputs_are_those_of_the_processor(
    name: str, folder: Path, families: Callable[[str], Family], data: st.DataObject
) -> None:
    """Of each row by itself, of rows padded to the longest, and of rows laid end to end."""
    processor, media, marks = families(name)
    asked = partial(ProcessorMixin.apply_chat_template, processor)  # SmolVLM's own needs its part for video
    habit, tools = data.draw(st.sampled_from(HABITS)), data.draw(st.booleans())
    written, parts_only = template(habit, marks, processor.tokenizer.bos_token or "")
    for holder in (processor, processor.tokenizer, media.tokenizer):
        holder.chat_template = written
    rows = data.draw(st.lists(conversations([*marks], tools), min_size=1, max_size=3))
    if name in ("smolvlm", "internvl") and "video" in marks:  # which cannot be asked about several: see videos
        rows = rows[:1]
        contents = [message["content"] for message in rows[0]["messages"] if not isinstance(message["content"], str)]
        parts = [part for content in contents for part in content if part["type"] != "text"]
        lengths = {len(part["video"]) for part in parts if part["type"] == "video"}
        assume(len(lengths) < 2 if name == "internvl" else not lengths or all("video" in part for part in parts))
    said = rows
    if data.draw(st.booleans()):
        rows, said = map(list, zip(*map(with_marks, rows), strict=True))
    chosen = Chosen(format=OpenAi(), name="openai", why="", media=MediaFiles(folder=folder))
    results = Renderer(media.tokenizer, media=media).encode([read_row(chosen, row) for row in rows])
    found = [result[0] for result in results if not isinstance(result, BadRow)]
    assert len(found) == len(rows), results
    turns, how = [as_given(row, folder, parts_only) for row in said], {"tools": TOOLS if tools else None}
    for own, text in zip(found, asked(turns, **how), strict=True):
        answers = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
        assert processor.tokenizer.decode(own.ids[own.mask]) == "".join(answers)
    how |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    alone: list[dict[str, Any]] = []
    for own, each in zip(found, turns, strict=True):
        alone.append(dict(asked(each, **how, processor_kwargs=of_videos(each))))
        assert own.ids.tolist() == alone[-1]["input_ids"][0].tolist()
    shown, ids = [each.shown or ShownText("") for each in found], [each.ids for each in found]
    padded, flat = media.tensors(shown, ids, "padded"), media.tensors(shown, ids, "flat")
    if not any(each.media for each in shown):
        assert not padded
        assert not flat
        return
    right = {"padding": True, "padding_side": "right", **of_videos([turn for each in turns for turn in each])}
    between = name == "mllama" and is_torchvision_available()  # whose processor wants first and last rows to show some
    expected = dict(asked([SHOWN, *turns, SHOWN] if between else turns, **how, processor_kwargs=right))
    if between:
        expected = {key: value[1:-1] for key, value in expected.items()}
    real = expected.pop("attention_mask").bool()
    assert expected.pop("input_ids")[real].tolist() == np.concatenate(ids).tolist()
    assert padded.keys() == flat.keys() == expected.keys()
    for key, value in expected.items():
        if key in PER_TOKEN:  # of rows that show nothing there is none
            value[[not each.media for each in shown]] = 0
            same(padded[key][real], value[real])
            same(flat[key][0], value[real])
        else:
            same(padded[key], value)
            same(flat[key], value)
    if name.startswith("qwen") and "image" in marks:
        check_positions(media.folder, found, flat, alone)


def check_positions(folder: Path, found: list[Any], flat: Any, alone: list[Any]) -> None:
    """What documents laid end to end have as positions is what the model counts for each by itself."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    (counts,) = counting_modules(model)
    expected = []
    for each in alone:
        given = {key: value for key, value in each.items() if not key.startswith("pixel_values")}
        text = torch.arange(given["input_ids"].shape[1])
        own = (
            counts.get_rope_index(**given)[0][:, 0]
            if "mm_token_type_ids" in given and given["mm_token_type_ids"].any()
            else text.expand(3, -1)
        )
        expected.append(torch.cat([text[None], own]))
    lengths = torch.tensor([0, *(len(each.ids) for each in found)])
    laid = {
        **flat, "input_ids": torch.from_numpy(np.concatenate([each.ids for each in found]))[None].long(),
        "position_ids": torch.cat([each[0] for each in expected])[None],
        "cu_seq_lens_q": lengths.cumsum(0).int(),
    }  # fmt: skip
    count_positions_by_document(model)
    (hook,) = counts._forward_pre_hooks.values()
    same(hook(counts, (), laid)[1]["position_ids"][:, 0], torch.cat(expected, 1))


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json"])
def test_the_template_that_a_processor_reads_is_taken(place: str, folder: Path, tmp_path: Path) -> None:
    """Most models of before 2025 have it in a file that their tokenizer does not read. Another one that a recipe names
    is that of the result."""
    model = MODELS["llava"](tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    held = json.loads((model / place).read_text()) if (model / place).is_file() else {}
    (model / place).write_text(
        json.dumps({**held, "chat_template": template("trims texts", {"image": "<image>"}, "")[0]})
    )
    (tmp_path / "other.jinja").write_text(template("as they are", {"image": "<image>"}, "")[0])
    turns = [{"role": "user", "content": "<image> what "}, {"role": "assistant", "content": " red "}]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns, "images": ["0.png"]}] * 2))
    keys = {"model": str(model), "dataset": str(tmp_path / "rows.json"), "media_dir": str(folder), "bf16": False}
    processor = AutoProcessor.from_pretrained(model)
    turns[0]["content"] = [
        {"type": "image", "image": load_image(str(folder / "0.png"))},
        {"type": "text", "text": " what "},
    ]
    expected = processor.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"][0]
    assert llmtune.plan(keys).data.prepared.train.ids[: len(expected)].tolist() == expected
    run = llmtune.train(keys, template=str(tmp_path / "other.jinja"), output_dir=str(tmp_path / "run"), max_steps=1)
    written = AutoProcessor.from_pretrained(run.output_dir / "model").apply_chat_template(turns)
    assert written == "<|im_start|>user\n<image> what <|im_end|>\n<|im_start|>assistant\n red <|im_end|>\n"


def test_the_way_llava_writes_has_a_template_that_ends_answers(folder: Path, tmp_path: Path) -> None:
    """The one that is published with LLaVA 1.5 ends none, so that nothing would learn to stop."""
    model = MODELS["llava"](tmp_path / "model")
    turns = [{"role": "user", "content": "<image>what"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns, "images": ["0.png"]}] * 2))
    plan = llmtune.plan(
        {"model": str(model), "dataset": str(tmp_path / "rows.json"), "media_dir": str(folder), "template": "llava"}
    )
    processor, samples = AutoProcessor.from_pretrained(model), plan.data.prepared.train
    bos, eos = processor.tokenizer.bos_token or "", processor.tokenizer.eos_token
    text = f"{bos}USER: <image>\nwhat ASSISTANT: red{eos}"
    expected = processor(text=text, images=load_image(str(folder / "0.png")), add_special_tokens=False)["input_ids"][0]
    (own,) = samples.sequences(0)
    assert samples.ids[own].tolist() == list(expected)
    assert processor.tokenizer.decode(samples.ids[own][samples.mask[own]]).strip() == f"red{eos}"
