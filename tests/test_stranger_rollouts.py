"""The stranger's stage that lets a model answer, with a second model, a reward, an engine and a hub of its own."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtune.testing import tiny_model_folder
from llmtune.testing.tiny import tiny_prompts
from tests.test_stranger import GAINED, STEPS, Place, assert_close, base, finish, gained, metrics, ones, place

__all__ = ["place"]

BEST = {"peft_config": {"name": "ia3", "target_modules": ",".join(GAINED)}, "disable_shuffling": True}


@pytest.fixture(scope="module")
def best(place: Place) -> Place:
    """The stage that lets a model answer, with the engine and the reward, on one rank and on two."""
    tiny_prompts(place.folder)
    elder = tiny_model_folder(place.folder / "elder", initializer_range=0.3, seed=7)
    keys = BEST | {
        "stage_config": {"name": "best_of", "elder": str(elder)}, "reward_config": "small", "engine_config": "parrot",
        "dataset": str(place.folder / "prompts.jsonl"), "save_steps": 4, "model": "me/tiny",
        "hub_config": {"name": "shelf", "root": str(place.folder / "hub")}, "cache_dir": str(place.folder / "cache"),
    }  # fmt: skip
    shutil.copytree(place.model, place.folder / "hub" / "me" / "tiny")
    recipe = place.write("best.yaml", place.keys("best", **keys))
    two = [f"output_dir={place.folder / 'best-2'}", "gradient_accumulation_steps=1", "--nproc", "2"]
    started = [place.start("-m", "llmtune", "train", recipe, *more) for more in ([], two)]
    try:
        for process in started:
            finish(process)
    finally:
        for process in started:
            process.terminate()
    return place


@pytest.mark.parametrize("ranks", [1, 2])
def test_its_stage_asks_its_engine_its_reward_and_a_second_model(best: Place, ranks: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(best.model)
    elder = AutoModelForCausalLM.from_pretrained(best.folder / "elder" / "tiny-llama", dtype=torch.float32)
    model = base(best, lambda weight: weight)
    asked = [json.loads(line)["prompt"] for line in (best.folder / "prompts.jsonl").read_text().splitlines()]
    gains = ones(model)
    optimizer = torch.optim.AdamW(gains.values(), lr=0.02, weight_decay=0.0)
    expected = []
    with gained(model, gains):
        for step in range(STEPS):
            loss = trusted = torch.zeros(())
            for row in range(8):
                question = [{"role": "user", "content": asked[(8 * step + row) % len(asked)]}]
                prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
                said = [[(sum(prompt) + 7 * s * s + 5 * place) % 90 + 5 for place in range(6)] for s in range(3)]
                ids = torch.tensor([*prompt, *min(said, key=sum)])
                with torch.no_grad():
                    trust = logps(elder, ids)[-6:].exp()
                loss = loss - (trust * logps(model, ids)[-6:]).sum()
                trusted = trusted + trust.sum()
            (loss / 8).backward()
            norm = nn.utils.clip_grad_norm_(gains.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            expected.append({"loss": loss.item() / 8, "trust": trusted.item() / 8, "grad_norm": norm.item()})
    assert_close(metrics(best, "best", ranks, "loss", "grad_norm", "trust"), expected)


def logps(model: Any, ids: Tensor) -> Tensor:
    """The log-probability of each token but the first."""
    return model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def test_plugins_and_schema_know_it(place: Place) -> None:
    listing = place.start("-m", "llmtune", "plugins", "--json")
    schema = place.start("-m", "llmtune", "schema")
    rows = [row for row in json.loads(finish(listing))["plugins"] if row["package"] == "acme-tuning"]
    assert {(row["point"], row["name"]) for row in rows} == {
        ("peft_config", "ia3"), ("quant_config", "int8_rows"), ("stage_config", "smoothed"), ("data_config", "forum"),
        ("stage_config", "best_of"), ("reward_config", "small"), ("engine_config", "parrot"),
        ("launch_config", "posse"), ("hub_config", "shelf"), ("optim_config", "polyak"),
    }  # fmt: skip
    assert {(row["version"], row["state"]) for row in rows} == {("1.4.2", "ok")}
    blocks = [
        form["properties"]
        for form in json.loads(finish(schema))["properties"]["stage_config"]["anyOf"][0]["oneOf"]
        if form.get("properties", {}).get("name") == {"const": "smoothed"}
    ]
    assert blocks[0]["beta"]["exclusiveMaximum"] == 1
    assert blocks[0]["beta"]["description"].startswith("Share of the target")
