"""Drawn pictures with questions, and a tiny model with random weights that reads them: what shows in minutes, without a
download, that a model learns to see.

    python -m llmtune.testing.pictures FOLDER

writes `FOLDER/model`, `FOLDER/train.jsonl`, `FOLDER/held_out.jsonl` and `FOLDER/pictures/`: what
`recipes/pictures.yaml` trains, and what it trains on.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.testing.tiny import tiny_config

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

COLORS = ("red", "green", "blue", "yellow", "black")
SHAPES = ("circle", "square", "triangle", "ring")
COUNTS = ("one", "two", "three", "four")
QUESTIONS = {
    "color": ("Which color?", "{color}"),
    "shape": ("Which shape?", "{shape}"),
    "count": ("How many?", "{count}"),
    "all": ("What do you see?", "{count} {color} {shape}{s}"),
}
"""A question of each kind, and its answer."""
CHANCE = {"color": 1 / 5, "shape": 1 / 4, "count": 1 / 4, "all": 1 / 80}
"""The share of right answers of one who knows the words and does not look."""
SIZE = 96
"""Width and height of a picture in pixels, of which the model sees every second one."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_all(folder: Path, pictures: int = 1500, held_out: int = 100, seed: int = 0) -> None:
    """The model, and four rows of each picture, of those to train on and of those held out; all hang on `seed`."""
    vision_model_folder(folder / "model", seed)
    write_rows(folder, "train", pictures, seed=2 * seed)
    write_rows(folder, "held_out", held_out, seed=2 * seed + 1)


def write_rows(folder: Path, name: str, pictures: int, seed: int) -> Path:
    """`pictures` pictures of all pairs of a color and a shape in turn, as OpenAI messages with a column `images`."""
    chance, rows = random.Random(seed), []
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        color, shape = pairs[number % len(pairs)]
        count = chance.randrange(len(COUNTS))
        file = f"pictures/{name}_{number:04}.png"
        draw(folder / file, color, shape, count + 1, chance)
        for question, answer in QUESTIONS.values():
            said = answer.format(color=color, shape=shape, count=COUNTS[count], s="s" * (count > 0))
            messages = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": said}]
            rows.append({"messages": messages, "images": [file]})
    place = folder / f"{name}.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def draw(path: Path, color: str, shape: str, count: int, chance: random.Random) -> None:
    """A picture of `count` shapes of a color, of different sizes, none of which touches another."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen, half = ImageDraw.Draw(image), SIZE // 2
    for corner in chance.sample(range(4), count):
        radius = chance.randint(half // 4, half // 2 - 2)
        x, y = (half * at + chance.randint(radius + 1, half - radius - 1) for at in divmod(corner, 2))
        _PENS[shape](pen, x, y, radius, color)
    image.save(path)


def _circle(pen: ImageDraw, x: int, y: int, radius: int, color: str) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _square(pen: ImageDraw, x: int, y: int, radius: int, color: str) -> None:
    pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=color)


def _triangle(pen: ImageDraw, x: int, y: int, radius: int, color: str) -> None:
    pen.polygon((x, y - radius, x - radius, y + radius, x + radius, y + radius), fill=color)


def _ring(pen: ImageDraw, x: int, y: int, radius: int, color: str) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=radius // 3)


_PENS: dict[str, Callable[[ImageDraw, int, int, int, str], None]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring,
}  # fmt: skip


def vision_model_folder(folder: Path, seed: int = 0) -> Path:
    """Save a LLaVA of a SigLIP tower and a llama with random weights, some 1.3 million, and its processor."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionConfig
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer, size = _tokenizer(), {"height": SIZE // 2, "width": SIZE // 2}
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=size), tokenizer=tokenizer, patch_size=6,
        vision_feature_select_strategy="full", chat_template=TEMPLATE,
    )  # fmt: skip
    width = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(image_size=SIZE // 2, patch_size=6, vision_use_head=False, **width),
        text_config=tiny_config(
            vocab_size=len(tokenizer), num_key_value_heads=4, head_dim=32, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **width,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=64,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """A token for each word that questions and answers have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", "<image>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(_words(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>")


def _words() -> Iterator[str]:
    yield from ("user", "assistant", "system")
    yield from (question for question, _ in QUESTIONS.values())
    for word in (*COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *COUNTS):
        yield from (word, f" {word}")


def answers(model: Path, rows: Path, batch: int = 64) -> list[tuple[str, str, str]]:
    """For each row of a file by `write_rows`: the kind of its question, its answer, and what a saved model says, always
    the likeliest token. It is transformers that asks, as the model's other users do."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor, found = AutoProcessor.from_pretrained(model), []
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    kinds = {question: kind for kind, (question, _) in QUESTIONS.items()}
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    for part in (lines[at : at + batch] for at in range(0, len(lines), batch)):
        given = processor.apply_chat_template(
            [_asked(row, rows.parent) for row in part], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs={"padding": True, "padding_side": "left"},
        )  # fmt: skip
        ids = network.generate(**given, max_new_tokens=6, do_sample=False)[:, given["input_ids"].shape[1] :]
        for row, said in zip(part, processor.batch_decode(ids, skip_special_tokens=True), strict=True):
            question, right = (message["content"] for message in row["messages"])
            found.append((kinds[question.removeprefix("<image>")], right, said.strip()))
    return found


def _asked(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A row's question as transformers wants it."""
    from PIL import Image

    image = {"type": "image", "image": Image.open(folder / row["images"][0])}
    text = {"type": "text", "text": row["messages"][0]["content"].removeprefix("<image>")}
    return [{"role": "user", "content": [image, text]}]


def accuracy(given: list[tuple[str, str, str]]) -> dict[str, float]:
    """The share of right `answers` to each kind of question."""
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTIONS}
    for kind, wanted, said in given:
        right[kind].append(said == wanted)
    return {kind: sum(each) / max(1, len(each)) for kind, each in right.items()}


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    write_all(Path(sys.argv[1]))
