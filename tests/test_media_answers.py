"""Models that read pictures answer prompts that show some what transformers' own `generate` answers with the
processor's own batch, token for token; alone, in a batch, several times, and spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune import GenerateConfig, ShownPrompt, generate
from llmtune.contract.examples import Conversation, Media
from llmtune.data.render import Renderer
from llmtune.distributed.fsdp2 import reshard
from llmtune.media.marks import MARKS
from llmtune.media.processor import MediaProcessor
from llmtune.testing.ranks import in_ranks
from llmtune.testing.running import build
from tests.tiny_media import MODELS, draw

pytest.importorskip("PIL")
NAMES = ("llava", "llava_next", "gemma3", "idefics3", "qwen2_vl", "qwen3_vl", "mllama")
MARK = MARKS["image"]
GREEDY = GenerateConfig(do_sample=False, max_new_tokens=6)
SAMPLED = GenerateConfig(max_new_tokens=6, temperature=1.5, top_p=1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    draw(folder / "red.png", "red", "circle", (40, 30))
    draw(folder / "blue.png", "blue", "square", (36, 36))
    return folder


@pytest.fixture(scope="module")
def opened(place: Path) -> Any:
    """Of a kind: model, processor of transformers, and llmtune's around it."""

    @cache
    def made(name: str) -> tuple[Any, Any, MediaProcessor]:
        from transformers import AutoModelForImageTextToText

        folder = MODELS[name](place / name)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        from transformers import AutoTokenizer

        for each in model.parameters():  # weights large enough for what is shown to decide the answer
            each.data.mul_(4)
        media = MediaProcessor(folder=folder, tokenizer=AutoTokenizer.from_pretrained(folder))
        return model, media.processor, media

    return made


ASKED = [("what is in the picture ", ["red"]), ("hello world", []), ("{} is blue, and {} is how many", ["red", "blue"]),
         ("what is in the picture ", ["blue"]), ("what is in the picture ", ["red"])]  # fmt: skip
"""Questions and the pictures they show, where `{}` stands or at the beginning."""


def parts(text: str, names: Sequence[str]) -> list[str]:
    """Texts and names of pictures, turn by turn."""
    text = text if "{}" in text else "{}" * len(names) + text
    found = [text.split("{}")[0]]
    for name, after in zip(names, text.split("{}")[1:], strict=True):
        found += [name, after]
    return found


def prompt(media: MediaProcessor, place: Path, text: str, names: Sequence[str]) -> Any:
    """The prompt as llmtune has it."""
    content = "".join(MARK if at % 2 else part for at, part in enumerate(parts(text, names)))
    shown = tuple(Media("image", str(place / f"{name}.png")) for name in names)
    asked = Conversation(messages=[{"role": "user", "content": content}], media=shown)
    made = Renderer(media.tokenizer, media=media).prompt(asked)
    ids = tuple(made.ids.tolist())
    return ids if made.shown is None else ShownPrompt(ids=ids, shown=made.shown)


def theirs(processor: Any, place: Path, asked: Sequence[tuple[str, Sequence[str]]]) -> dict[str, torch.Tensor]:
    """The processor's batch of questions, padded on the left."""
    from PIL import Image

    rows = []
    for text, names in asked:
        content = [
            {"type": "image", "image": Image.open(place / f"{part}.png")} if at % 2 else {"type": "text", "text": part}
            for at, part in enumerate(parts(text, names))
            if part
        ]
        rows.append([{"role": "user", "content": content}])
    processor.tokenizer.padding_side = "left"
    return dict(processor.apply_chat_template(
        rows, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
        add_generation_prompt=True,
    ))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_answers_are_those_of_transformers(name: str, opened: Any, place: Path) -> None:
    model, processor, media = opened(name)
    prompts = [prompt(media, place, *each) for each in ASKED]
    batch = theirs(processor, place, ASKED)
    said = model.generate(
        **batch, do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0, suppress_tokens=media.placeholders
    )
    expected = [tuple(row) for row in said[:, batch["input_ids"].shape[1] :].tolist()]
    # The first and the last are the same: they are read once.
    for some in ([0, 1, 2, 3, 4], [0, 1, 2, 3]):
        found = generate(model, media.tokenizer, [prompts[at] for at in some], GREEDY, stop=[2], media=media)
        for at, answer in zip(some, found, strict=True):
            assert answer.ids == expected[at][: len(answer.ids)]
            assert answer.ids[-1] == 2 or len(answer.ids) == 6
    assert len({expected[0], expected[3]}) == 2, "the picture does not decide the answer"
    seeds = list(range(5))
    for config in (SAMPLED, GenerateConfig(do_sample=False, num_beams=2, max_new_tokens=4)):
        together = generate(model, media.tokenizer, prompts, config, seeds=seeds, media=media)
        alone = [generate(model, media.tokenizer, [each], config, seeds=[seed], media=media)[0]
                 for each, seed in zip(prompts, seeds, strict=True)]  # fmt: skip
        assert together == alone


CASES: dict[str, dict[str, Any]] = {
    "llava": {"peft_config": {"name": "lora", "r": 2}, "quant_config": {"name": "bnb", "quantization_bit": 4}},
    "gemma3": {},
}


def said_by_ranks(place: Path, shares: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
    """What each case's model answers to this rank's share of the prompts."""
    return {f"{name} {case}": said for name in CASES for case, said in said_by(name, place, shares).items()}


def said_by(name: str, place: Path, shares: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
    keys = {"output_dir": str(place / "run"), "device": "cpu", "dist_config": "fsdp2", **CASES[name]}
    plan, objective = build({"model": str(place / name), **keys}, "build")
    media = MediaProcessor(folder=place / name, tokenizer=plan.tokenizer)

    def said(rows: list[int]) -> list[Any]:
        prompts = [prompt(media, place, *ASKED[at]) for at in rows]
        return generate(plan.module, plan.tokenizer, prompts, GREEDY, seeds=rows, media=media)

    found = {case: objective(partial(said, share[plan.ranks.rank])) for case, share in shares.items()}
    reshard(objective)
    return found


def test_ranks_that_are_shown_other_things_answer_as_one(opened: Any, place: Path, tmp_path: Path) -> None:
    """Some show pictures where others show none, or have nothing to answer: all ranks' towers work all the same."""
    for name in CASES:
        opened(name)
    one = said_by_ranks(place, {"all": [[0, 1, 2, 0, 3]]})
    shares = {"all": [[1], [2, 0, 3]], "none": [[0], []], "again": [[0, 0], [1]]}
    two = in_ranks(2, tmp_path, said_by_ranks, place, shares)
    for name in CASES:
        first, second, third, _, fifth = one[f"{name} all"]
        found = {case: [*two[0][f"{name} {case}"], *two[1][f"{name} {case}"]] for case in shares}
        assert found == {"all": [second, third, first, fifth], "none": [first], "again": [first, first, second]}
