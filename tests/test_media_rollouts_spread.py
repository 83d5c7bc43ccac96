"""Roll-outs on prompts that show pictures are the same over ranks, micro-batches, layouts and interruptions, of
adapters on few bits as well; and what does not go with them is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.testing import running, tiny_model_folder
from llmtune.testing.ranks import in_ranks
from tests.runs import killed_at
from tests.test_media_rollouts import STAGE, answers, grpo, models, prepared, shaken
from tests.test_media_stages import ASKED
from tests.test_resume import assert_equal_runs, forget_after

__all__ = ["models"]

pytest.importorskip("PIL")
LORA = {"peft_config": {"name": "lora", "r": 4, "lora_dropout": 0.0}, "init_config": "init_on_meta"}
PPO = {"name": "ppo", "max_new_tokens": 6, "ppo_epochs": 2, "ppo_buffer_size": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("qwen2_vl", {}),
    "qlora": ("llava", {**LORA, "quant_config": {"name": "bnb", "quantization_bit": 4}}),
    "ppo": ("gemma3", {**LORA, "stage_config": PPO, "disable_shuffling": False}),
}
MICRO = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
SPREAD: dict[str, dict[str, Any]] = {
    "full": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "qlora": {"per_device_train_batch_size": 2},
    "ppo": {"per_device_train_batch_size": 2},
    "tensor": {"dist_config": {"name": "fsdp2", "tp_size": 2}},
}


def train_each(recipes: list[dict[str, Any]]) -> None:
    for keys in recipes:
        running.train(keys)


def test_ranks_and_micro_batches_change_nothing(models: Any, place: Path) -> None:
    """Two ranks, each with prompts of its own or sharing every layer's products; one micro-batch or four; some of which
    show nothing."""
    keys = {"max_steps": 2, "optim_config": {"name": "adamw", "eps": 1e-3}}  # else it makes steps of rounding
    recipes = {name: grpo(models(model), place, name, **keys, **own) for name, (model, own) in CASES.items()}
    train_each([*recipes.values()])
    four = {name: {**keys, **MICRO, "output_dir": str(place / f"four-{name}")} for name, keys in recipes.items()}
    train_each([*four.values()])
    recipes["tensor"] = recipes["full"]
    two = [{**recipes[name], **more, "output_dir": str(place / f"two-{name}")} for name, more in SPREAD.items()]
    in_ranks(2, place / "ranks", train_each, two)
    runs = [(name, f"{kind}-{name}") for kind in ("two", "four") for name in CASES] + [("full", "two-tensor")]
    for name, other in runs:
        one, both = (llmtune.load(place / run).metrics for run in (f"run-{name}", other))
        assert len(one) == len(both) == 2
        for ours, theirs in zip(one, both, strict=True):
            for metric in ("loss", "grad_norm", "reward", "kl", "tokens", "completions/length"):
                assert theirs[metric] == pytest.approx(ours[metric], rel=1e-4, abs=1e-6), (other, metric)


INTERRUPTED = {"max_steps": 4, "save_steps": 1, "save_total_limit": None, **MICRO, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("case", ["qlora", "ppo"])
def test_a_run_goes_on_bit_by_bit(case: str, models: Any, place: Path) -> None:
    model, more = CASES[case]
    keys = grpo(models(model), place, f"straight-{case}", **{**more, **INTERRUPTED})
    running.train(keys)
    broken = {**keys, "output_dir": str(place / f"broken-{case}")}
    shutil.copytree(keys["output_dir"], broken["output_dir"])
    forget_after(Path(broken["output_dir"]), 2)
    running.train(broken)
    assert_equal_runs(place / f"run-straight-{case}", place / f"broken-{case}")


def test_a_stream_that_was_killed_goes_on_bit_by_bit(models: Any, place: Path) -> None:
    keys = grpo(models("llava"), place, "stream", **INTERRUPTED, streaming=True)
    running.train(keys)
    streamed = {**keys, "output_dir": str(place / "streamed")}
    killed_at(2, place / "streamed", lambda: running.train(streamed))
    running.train(streamed)
    assert_equal_runs(place / "run-stream", place / "streamed")


def test_the_reference_of_an_adapter_is_its_base(models: Any, place: Path) -> None:
    """By transformers, on the answers of the adapter; whose own log-probabilities are those of the merged weights."""
    from peft.tuners.lora import LoraLayer

    from tests.media_by_hand import Plain

    plan, objective = running.start(grpo(models("qwen2_vl"), place, "adapter", **LORA))
    shaken(torch.nn.ParameterList([each for each in plan.model.module.parameters() if each.requires_grad]), 0.1)
    batches = prepared(plan, objective)
    base, merged = (Plain(models("qwen2_vl"), models("qwen2_vl"), place) for _ in range(2))
    for name, layer in plan.model.module.named_modules():
        if isinstance(layer, LoraLayer):
            merged.model.get_submodule(name).weight.data += layer.get_delta_weight("default")
    apart = 0.0
    with torch.no_grad():
        for question, ids, batch, mine, _ in answers(batches, ASKED):
            then, now = base.logps(question, ids, 1.3), merged.logps(question, ids, 1.3)
            torch.testing.assert_close(batch.extra["ref_logps"][mine], then, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(batch.extra["old_logps"][mine], now, rtol=1e-5, atol=1e-5)
            apart = max(apart, (then - now).abs().max().item())
    assert apart > 0.01


@pytest.mark.parametrize("model", ["qwen2_vl", "gemma3"])
def test_answers_laid_end_to_end_are_those_in_rows_of_their_own(model: str, models: Any, place: Path) -> None:
    """As attention that knows the bounds of documents has them, so that no batch has padding."""
    found = []
    for name in ("rows", "flat"):
        plan, objective = running.start(grpo(models(model), place, name))
        context: Any = objective.context
        context._rollouts = replace(context.rollouts, flat=name == "flat")
        batches = prepared(plan, objective)
        assert all((batch.document_starts is not None) == (name == "flat") for batch in batches)
        found.append({
            (batch.sample_ids[number], *ids): batch.extra["old_logps"][mine]
            for _, ids, batch, mine, number in answers(batches, ASKED)
        })  # fmt: skip
    assert found[0].keys() == found[1].keys()
    for key, logps in found[0].items():
        torch.testing.assert_close(found[1][key], logps, rtol=1e-5, atol=1e-5)


def text_model(folder: Path, model: Path) -> Path:
    """A model that reads text only, in the tokens of one that reads pictures."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    made = tiny_model_folder(folder, vocab_size=448)
    for each in made.glob("*token*"):
        each.unlink()
    tokenizer.save_pretrained(made)
    return made


def otherwise(model: Path, target: Path) -> Path:
    """A copy of a model whose processor makes other numbers of the same pictures."""
    shutil.copytree(model, target)
    place = target / "processor_config.json"
    about = json.loads(place.read_text())
    about["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    place.write_text(json.dumps(about))
    return target


def test_what_does_not_fit_is_refused_in_a_sentence(models: Any, place: Path, tmp_path: Path) -> None:
    model = models("gemma3")
    text, other = text_model(tmp_path, model), otherwise(model, tmp_path / "other")
    cases = (
        ({"packing": True}, "packing: found true, but the data are prompts, which are answered one by one"),
        ({"dist_config": {"name": "fsdp2", "cp_size": 2}}, "cp_size is 2, but the loss of prompts needs whole answers"),
        ({"stage_config": {**STAGE, "ref_model": str(text)}}, f"ref_model: {text} reads no image, which the data show"),
        ({"stage_config": {**STAGE, "ref_model": str(other)}}, "otherwise than the trained model does"),
        (
            {"engine_config": "vllm", **LORA},
            "engine_config: vllm answers prompts of text only, and the data show image",
        ),
    )
    reward = {"name": "rule", "match": "length", "max_tokens": 4}
    for number, (keys, sentence) in enumerate(cases):
        with pytest.raises(llmtune.LlmtuneError) as caught:
            llmtune.plan(grpo(model, place, f"refused-{number}", reward_config=reward, **keys), nproc=2)
        assert sentence in str(caught.value)
