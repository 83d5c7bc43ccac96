"""Preferences on rows of sounds and of video: losses and gradient norms are those of formulas on log-probabilities that
transformers gives a row at a time, from what the processor makes of it alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.media_by_hand import shaken
from tests.test_audio_training import THINKERS, opened
from tests.test_audio_training import rows_by_hand as sounds_by_hand
from tests.test_media_stages import recipe, trained
from tests.test_video_training import AS_THEY_ARE, film
from tests.test_video_training import rows_by_hand as videos_by_hand
from tests.tiny_audio import MODELS as HEARING
from tests.tiny_audio import tone
from tests.tiny_media import MODELS

pytest.importorskip("av")
SOUNDS = (("<audio>what", ["0.wav"]), ("hello", []), ("how <audio> is", ["1.wav"]))
VIDEOS = (("<video>what is it", ["short.mp4"]), ("hello", []), ("how <video>", ["long.mp4"]))
BETTER, WORSE = ("red square", "world", "blue"), ("blue", "how many", "red circle here")
WANTED, LABELLED = (True, False, True), (BETTER[0], WORSE[1], BETTER[2])
BETA = 0.5


class ByHand:
    """Questions about sounds or video, and what transformers says to answers."""

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.place = name, place
        self.folder = (HEARING | MODELS)[name](place / "model")
        self.other = shaken(self.folder, place / "other")
        self.hears = name in HEARING
        self.kind, self.asked = ("audios", SOUNDS) if self.hears else ("videos", VIDEOS)
        for at in range(2):
            tone(place / f"{at}.wav", 440, 0.3 + at)
        film(place / "short.mp4", 1.0)
        film(place / "long.mp4", 2.5)

    def rows(self, **columns: Sequence[Any]) -> list[dict[str, Any]]:
        """The questions and what they show, with these columns."""
        found = [{"prompt": text, **({self.kind: files} if files else {})} for text, files in self.asked]
        return [row | {key: each[at] for key, each in columns.items()} for at, row in enumerate(found)]

    def logps(self, model: Any, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(rows,) the summed log-probability of each answer, and its tokens."""
        turns = [
            {
                "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
                self.kind: files,
            }
            for (text, files), answer in zip(self.asked, answers, strict=True)
        ]
        (self.place / "rows.json").write_text(json.dumps(turns))
        sums, counts = [], []
        for batch, labels in (sounds_by_hand if self.hears else videos_by_hand)(self.folder, self.place):
            at = labels[0, 1:] != -100
            said = model(**batch).logits[0, :-1].float().log_softmax(-1)[at]
            sums.append(said.gather(1, labels[0, 1:][at][:, None]).sum())
            counts.append(at.sum())
        return torch.stack(sums), torch.stack(counts)


@pytest.mark.parametrize("name", ["qwen2_audio", "omni", "qwen2_5_vl"])
def test_preferences_about_sounds_and_video_equal_their_formulas(name: str, tmp_path: Path) -> None:
    """Of pairs in one batch, row by row and packed; of KTO packed, where answers before other questions' media are."""
    if name not in HEARING:
        pytest.importorskip("torchvision")
    by_hand = ByHand(name, tmp_path)
    model, other = (opened(folder, name).eval() for folder in (by_hand.folder, by_hand.other))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in key or key == "lm_head.weight")
    (better, many), (worse, few) = (by_hand.logps(model, answers) for answers in (BETTER, WORSE))
    with torch.no_grad():
        judged = [by_hand.logps(other, answers)[0] for answers in (BETTER, WORSE)]
        moved = [by_hand.logps(each, [*LABELLED[1:], LABELLED[0]])[0] for each in (model, other)]
    ahead, behind = better - judged[0], worse - judged[1]
    kl = (moved[0] - moved[1]).mean()
    assert kl > 0.01
    mean = torch.stack([better / many, worse / few])
    odds = mean[0] - mean[1] - (torch.log1p(-mean[0].exp()) - torch.log1p(-mean[1].exp()))
    apart = torch.where(torch.tensor(WANTED), ahead - kl, kl - behind)
    expected = {
        "sigmoid": -logsigmoid(BETA * (ahead - behind)).mean(),
        "orpo": (-mean[0] - BETA * logsigmoid(odds)).mean(),
        "simpo": -logsigmoid(BETA * (mean[0] - mean[1]) - 0.5).mean(),
        "kto": (1 - torch.sigmoid(BETA * apart)).mean(),
    }
    rowwise = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    packed = {"packing": True} if name not in THINKERS else rowwise
    for loss, ways in {"sigmoid": {}, "orpo": rowwise, "simpo": packed, "kto": packed}.items():
        stage = {"name": "kto"} if loss == "kto" else {"name": "dpo", "pref_loss": loss}
        stage |= {"ref_model": str(by_hand.other)} if loss in ("sigmoid", "kto") else {}
        columns = {"completion": LABELLED, "label": WANTED} if loss == "kto" else {"chosen": BETTER, "rejected": WORSE}
        keys = {"stage_config": {**stage, "pref_beta": BETA}, **AS_THEY_ARE, "per_device_train_batch_size": 3, **ways}
        found = trained(recipe(by_hand.folder, tmp_path, loss, by_hand.rows(**columns), **keys))
        learns = [each for each in model.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(expected[loss], learns, retain_graph=True, allow_unused=True)
        norm = torch.nn.utils.get_total_norm([each for each in gradients if each is not None])
        assert found["loss"] == pytest.approx(expected[loss].item(), rel=1e-5), loss
        assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-5), loss
