"""Models answer prompts that show pictures and sound, and learn from their answers: GRPO's numbers are those of a loop
in transformers over the same answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtune import GenerateConfig
from llmtune.contract.errors import PluginError
from llmtune.contract.examples import Media
from llmtune.media import processor
from llmtune.media.kept import KeptMedia
from llmtune.media.opening import open_image
from llmtune.model.modalities import placeholders_of
from llmtune.testing import running
from tests import tiny_audio, tiny_media
from tests.media_by_hand import Asked, Plain
from tests.test_audio_training import opened as opened_ears
from tests.test_media_stages import ASKED, recipe

pytest.importorskip("PIL")
HEARD = (Asked("<audio>what is in the picture", (), ["0.wav"]), Asked("hello"), Asked("is it <audio>", (), ["1.wav"]))
STAGE = {
    "name": "grpo", "num_generations": 3, "max_new_tokens": 6, "num_iterations": 2, "beta": 0.1, "temperature": 1.3,
}  # fmt: skip
MODELS = ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "mllama", "qwen2_audio", "omni")
SOUND = tuple(tiny_audio.MODELS)


def grpo(model: Path, place: Path, name: str, asked: Sequence[Asked] = ASKED, **keys: Any) -> dict[str, Any]:
    """A recipe of one step that answers all questions."""
    given = {
        "stage_config": STAGE, "reward_config": "reference", "device": "cpu", "bf16": False, "save_steps": None,
        "freeze_vision_tower": False, "freeze_multi_modal_projector": False,
        "per_device_train_batch_size": len(asked), **keys,
    }  # fmt: skip
    return recipe(model, place, name, [each.row(number=at) for at, each in enumerate(asked)], **given)


def prepared(plan: Any, objective: Any) -> list[Any]:
    """The first step's answers."""
    batches = plan.data.batches.step(0, plan.device)
    with torch.no_grad():
        return list(objective(lambda: objective.stage.prepare(objective.model, batches, objective.context)))


def shaken(model: Any, by: float = 0.02) -> None:
    """Move every weight at random."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight += by * torch.randn_like(weight)


@pytest.fixture(scope="module")
def models(place: Path) -> Any:
    """The folder of a tiny model, by its name; beside it stand sounds."""
    for at in range(2):
        tiny_audio.tone(place / f"{at}.wav", (220, 880)[at], 0.3 + 0.25 * at)
    return cache(lambda name: {**tiny_media.MODELS, **tiny_audio.MODELS}[name](place / name))


def opened(name: str, folder: Path, place: Path) -> Plain:
    """The model as transformers opens it."""
    return Plain(opened_ears(folder, name) if name in SOUND else folder, folder, place)


def answers(batches: Sequence[Any], asked: Sequence[Asked]) -> list[tuple[Asked, list[int], Any, Tensor, int]]:
    """For each answer: its question, its tokens, its batch, which of its targets are the answer's, and its number."""
    found = []
    for batch in batches:
        for number, (sample, ids) in enumerate(zip(batch.sample_ids, batch.rows(), strict=True)):
            mine = batch.target_sequence == number
            found.append((asked[sample], ids[len(ids) - int(mine.sum()) :], batch, mine, number))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_an_update_is_that_of_a_loop_in_transformers(name: str, models: Any, place: Path) -> None:
    """Over the same answers, between two updates, when probabilities have moved from what they were and from those of
    the reference: log-probabilities, advantages, the loss, and the norm of its gradient."""
    if name in SOUND:
        pytest.importorskip("av")
    asked = HEARD if name in SOUND else ASKED
    # Mllama's rows see the empty places that longer lists of pictures beside them have: transformers masks none.
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4} if name == "mllama" else {}
    plan, objective = running.start(grpo(models(name), place, name, asked, **alone))
    batches = prepared(plan, objective)
    before, after = (opened(name, models(name), place) for _ in range(2))
    shaken(plan.model.module)
    after.model.load_state_dict({key: each for key, each in plan.model.module.state_dict().items()})
    weight = sum(batch.weight for batch in batches)
    found = sum(objective(batch).total for batch in batches) / weight
    found.backward()
    said = answers(batches, asked)
    assert len(said) == 3 * len(asked) and weight == sum(len(ids) for _, ids, *_ in said)
    unsaid = placeholders_of(plan.model.module.config)
    rewards, total = {}, torch.zeros(())
    for question, ids, batch, mine, number in said:
        assert not set(ids) & set(unsaid)
        rewards.setdefault(question.text, []).append(sum(token % 2 == 0 for token in ids) / len(ids))
        with torch.no_grad():
            old = before.logps(question, ids, 1.3)
        torch.testing.assert_close(batch.extra["old_logps"][mine], old, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch.extra["ref_logps"][mine], old, rtol=1e-5, atol=1e-5)
        assert batch.extra["reward"][number] == pytest.approx(rewards[question.text][-1])
    for question, ids, batch, mine, number in said:
        group = torch.tensor(rewards[question.text])
        advantage = (batch.extra["reward"][number] - group.mean()) / (group.std() + 1e-4)
        assert batch.extra["advantages"][number].item() == pytest.approx(advantage.item(), rel=1e-5, abs=1e-6)
        new, old = after.logps(question, ids, 1.3), batch.extra["old_logps"][mine]
        ratio, apart = (new - old).exp(), old - new
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        total = total + (loss + 0.1 * (apart.exp() - apart - 1) * ratio).sum()
    expected = total / weight
    expected.backward()
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        for model in (plan.model.module, after.model)
    ]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=5e-7)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_what_a_prompt_shows_is_opened_once_for_all_of_its_answers(
    models: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, objective = running.start(grpo(models("llava"), place, "once"))
    found: list[str] = []

    def opening(path: str, *sizes: int | None) -> Any:
        found.append(Path(path).name)
        return open_image(path, *sizes)

    monkeypatch.setattr(processor, "open_image", opening)
    prepared(plan, objective)
    assert sorted(found) == ["0.png", "1.png", "2.png", "4.png"]


def test_a_stage_that_forgets_what_its_prompts_show_is_told(models: Any, place: Path) -> None:
    """A model would answer them without seeing anything."""
    plan, objective = running.start(grpo(models("llava"), place, "forgets"))
    (batch,) = plan.data.batches.step(0, plan.device)
    context: Any = objective.context
    with pytest.raises(PluginError, match="shows none; the stage has to give"):
        context.generate(plan.model.module, batch.rows(), GenerateConfig(max_new_tokens=2), range(4))
    with pytest.raises(PluginError, match="shows none; the stage has to give"):
        context.batch([(row, 1) for row in batch.rows()])
    assert not context.batch([([1, 2], 1)]).media


def test_no_more_is_kept_open_than_there_is_room_for() -> None:
    opened: list[Media] = []

    def sound(medium: Media) -> Any:
        opened.append(medium)
        return np.zeros(int(str(medium.path)), np.float32)

    first, second, large = (Media("audio", name) for name in ("10", "20", "100"))
    kept = KeptMedia(160)
    for medium in (first, second, first, second, large, second, first):
        assert len(kept.get(medium, sound)) == int(str(medium.path))
    assert opened == [first, second, large, second, first]


SEES = """
from pathlib import Path

seen = []

def parity(completion_ids, completions, prompts, images, wanted):
    assert all(Path(file).is_file() for files in images for file in files)
    seen.append((prompts[0], [Path(file).name for file in images[0]]))
    return [sum(token % 2 == side for token in ids) / len(ids) for ids, side in zip(completion_ids, wanted)]
"""


@pytest.fixture
def eyes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of a reward that looks at what was shown."""
    (tmp_path / "eyes.py").write_text(SEES)
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("eyes")
    sys.modules.pop("eyes", None)


def test_the_reward_of_answers_that_hang_on_the_picture_rises(models: Any, place: Path, eyes: Any) -> None:
    """Of one question, right are the even tokens before red pictures and the odd ones before blue: who does not look
    has half of the reward. The function sees each row's files and the prompt as the template wrote it."""
    for at in range(8):
        color, shape = ("red", "blue")[at % 2], ("circle", "square")[at // 2 % 2]
        tiny_media.draw(place / f"seen-{at}.png", color, shape, (20 + 2 * at, 20 + 2 * at))
    written = [Asked("<image>hello", [f"seen-{at}.png"]).row(wanted=at % 2) for at in range(8)]
    stage = {"name": "grpo", "num_generations": 8, "max_new_tokens": 4}
    keys = grpo(
        models("llava"), place, "seen", (), stage_config=stage, max_steps=60, per_device_train_batch_size=8,
        reward_config={"name": "function", "function": "eyes:parity"}, max_grad_norm=1.0,
    )  # fmt: skip
    Path(keys["dataset"]).write_text(json.dumps(written))
    rewards = [row["reward"] for row in running.train(keys).metrics]
    assert sum(rewards[:5]) / 5 < 0.6 and sum(rewards[-5:]) / 5 > 0.9
    assert eyes.seen[0] == ("<|im_start|>user\n<image>\nhello<|im_end|>\n<|im_start|>assistant\n", ["seen-0.png"])
