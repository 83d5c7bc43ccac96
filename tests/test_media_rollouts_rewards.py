"""PPO on prompts that show pictures: what a policy and its value head say and learn is what a loop in transformers
gives; and reward models, which look at the pictures or read the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.testing import running
from tests.media_by_hand import Plain
from tests.test_media_pairs import pairs
from tests.test_media_rollouts import answers, grpo, models, prepared, shaken
from tests.test_media_rollouts_spread import otherwise, text_model
from tests.test_media_stages import ASKED, recipe

__all__ = ["models"]

pytest.importorskip("PIL")
PPO = {"name": "ppo", "max_new_tokens": 6, "ppo_epochs": 2, "temperature": 1.3, "vf_coef": 0.3, "cliprange_value": 0.01}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_an_update_of_ppo_is_that_of_a_loop_in_transformers(name: str, models: Any, place: Path) -> None:
    """With values and log-probabilities as they were in the same run, and then moved."""
    plan, objective = running.start(grpo(models(name), place, f"ppo-{name}", stage_config=PPO))
    reference, before, after = (Plain(models(name), models(name), place) for _ in range(3))
    module = plan.model.module

    def taken(plain: Plain) -> Any:
        """Give it the weights of the policy; its value head."""
        weights = dict(module.state_dict())
        head = torch.nn.Linear(32, 1)
        head.load_state_dict({key: weights.pop(f"value_head.{key}") for key in ("weight", "bias")})
        plain.model.load_state_dict(weights)
        return head

    def said(plain: Plain, head: Any, question: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        start, found = plain.after(question, ids)
        logps = (found.logits[0, start - 1 : -1].float() / 1.3).log_softmax(-1)
        return logps.gather(1, torch.tensor(ids)[:, None])[:, 0], head(found.hidden_states[-1][0, start - 1 : -1])[:, 0]

    shaken(module)
    head = taken(before)
    batches = prepared(plan, objective)
    shaken(module, 0.01)
    new_head = taken(after)
    weight = sum(batch.weight for batch in batches)
    found = sum(objective(batch).total for batch in batches) / weight
    found.backward()
    total = torch.zeros(())
    for question, ids, batch, mine, number in answers(batches, ASKED):
        extra = {key: each[mine] for key, each in batch.extra.items() if each.shape == mine.shape}
        with torch.no_grad():
            old, values = said(before, head, question, ids)
            ref = reference.logps(question, ids, 1.3)
        torch.testing.assert_close(extra["old_logps"], old, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(extra["old_values"], values, rtol=1e-5, atol=1e-5)
        assert batch.extra["kl"][number].item() == pytest.approx((old - ref).sum().item(), rel=1e-4, abs=1e-5)
        logps, values = said(after, new_head, question, ids)
        ratio, advantage, returns = (logps - extra["old_logps"]).exp(), extra["advantages"], extra["returns"]
        near = extra["old_values"] + (values - extra["old_values"]).clamp(-0.01, 0.01)
        policy = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        total = total + (policy + 0.15 * torch.max((values - returns) ** 2, (near - returns) ** 2)).sum()
    expected = total / weight
    expected.backward()
    trained = [*after.model.parameters(), *new_head.parameters()]
    norms = [torch.nn.utils.get_total_norm([each.grad for each in some if each.grad is not None]).item()
             for some in (module.parameters(), trained)]  # fmt: skip
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=5e-7)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.fixture(scope="module")
def judge(models: Any, place: Path) -> Path:
    """A reward model that looks at pictures."""
    llmtune.train(recipe(models("gemma3"), place, "rm", pairs(), stage_config="rm", learning_rate=0.01, max_steps=3))
    return place / "run-rm"


@pytest.mark.parametrize("reads", ["run", "other", "text"])
def test_a_reward_model_sees_the_pictures_or_reads_the_text(
    reads: str, models: Any, judge: Path, place: Path, tmp_path: Path
) -> None:
    """A run of stage rm, a model whose processor makes other numbers of a picture, and one that reads text alone."""
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    if reads == "text":
        folder = text_model(tmp_path, models("gemma3"))
        LlamaForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    else:
        folder = judge if reads == "run" else otherwise(judge / "model", tmp_path / "other")
    reward = {"name": "model", "reward_model": str(folder), "batch_size": 5}
    plan, objective = running.start(grpo(models("gemma3"), place, f"judged-{reads}", reward_config=reward))
    batches = prepared(plan, objective)
    files = folder / "model" if reads == "run" else folder
    head: Any = AutoModelForSequenceClassification.from_pretrained(files, dtype=torch.float32).eval()
    tokenizer, scores = plan.model.tokenizer, []
    plain = Plain(head, models("gemma3") if reads == "text" else files, place)
    for question, ids, batch, _, number in answers(batches, ASKED):
        ending = tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
        said = [*(ids if batch.extra["cut"][number] else ids[:-1]), *ending]
        if reads == "text":
            text = "".join(part.get("text", "<start_of_image>") for part in question.turn(place)["content"])
            asked = tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            found = head(input_ids=torch.tensor([[*asked, *said]]))
        else:
            _, found = plain.after(question, said)
        scores.append(found.logits.item())
        assert batch.extra["reward"][number].item() == pytest.approx(scores[-1], rel=1e-4, abs=1e-5)
    assert len({round(each, 4) for each in scores}) > 4
