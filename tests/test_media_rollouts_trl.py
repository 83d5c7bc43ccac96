"""GRPO's loss and gradient on answers to prompts that show pictures are those of TRL's GRPOTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmtune.testing import running
from tests.media_by_hand import Plain
from tests.test_media_rollouts import STAGE, answers, grpo, models, prepared, shaken
from tests.test_media_stages import ASKED

__all__ = ["models"]

pytest.importorskip("PIL")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_loss_and_gradient_equal_trls(name: str, models: Any, place: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl, which the loss is compared with")
    from datasets import Dataset

    plan, objective = running.start(grpo(models(name), place, f"trl-{name}"))
    batches = prepared(plan, objective)
    shaken(plan.model.module)
    plain = Plain(models(name), models(name), place)
    plain.model.load_state_dict(plan.model.module.state_dict())
    found = sum(objective(batch).total for batch in batches) / sum(batch.weight for batch in batches)
    found.backward()
    rows = sum(batch.sequences for batch in batches)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, num_generations=3, beta=0.1, temperature=1.3,
        per_device_train_batch_size=rows, max_completion_length=6, num_iterations=2, use_bias_correction_kl=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=plain.model, args=config, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "How much?"}] * rows), processing_class=plain.processor,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    expected = trainer._compute_loss(plain.model.train(), laid_out(batches, plain, place))
    expected.backward()
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        for model in (plan.model.module, plain.model)
    ]
    assert STAGE["beta"] == 0.1 and found.item() == pytest.approx(expected.item(), rel=1e-5, abs=5e-7)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def laid_out(batches: list[Any], plain: Plain, place: Path) -> dict[str, Any]:
    """All answers as TRL lays them out, with what the processor makes of each question alone."""
    asked, said, kinds, media, known, advantages = [], [], [], {}, {"old_logps": [], "ref_logps": []}, []
    images = []
    for question, ids, batch, mine, number in answers(batches, ASKED):
        made = plain.inputs([question.turn(place)], add_generation_prompt=True)
        asked.append(made.pop("input_ids")[0])
        del made["attention_mask"]
        kinds.append(made.pop("mm_token_type_ids", torch.zeros(1, len(asked[-1]), dtype=torch.int64))[0])
        for key, each in made.items():
            media.setdefault(key, []).append(each)
        said.append(torch.tensor(ids))
        images.append(len(question.images))
        advantages.append(batch.extra["advantages"][number])
        for key, held in known.items():
            held.append(batch.extra[key][mine])

    def padded(each: list[Tensor], side: str) -> Tensor:
        return pad_sequence(each, batch_first=True, padding_side=side)

    types = torch.cat([padded(kinds, "left"), torch.zeros_like(padded(said, "right"))], 1)
    grids = {"mm_token_type_ids": types} if "image_grid_thw" in media else {}
    return {
        "prompt_ids": padded(asked, "left"), "prompt_mask": padded([torch.ones_like(each) for each in asked], "left"),
        "completion_ids": padded(said, "right"),
        "completion_mask": padded([torch.ones_like(each) for each in said], "right"),
        "advantages": torch.stack(advantages), "old_per_token_logps": padded(known["old_logps"], "right"),
        "ref_per_token_logps": padded(known["ref_logps"], "right"), "num_images": images,
        "num_items_in_batch": torch.tensor(sum(map(len, said))), **grids,
        **{key: torch.cat(each) for key, each in media.items()},
    }  # fmt: skip
