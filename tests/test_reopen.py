"""A run is used as it was trained: its template, its system message, its structure, from wherever it is opened."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import RecipeError
from llmtune.inference.reopen import open_model, open_plan, recipe_of, saved_at
from llmtune.recipe.recipe import load_recipe
from tests.runs import FLOAT32, LORA, recipe, stored_types

JINJA = (
    "{%- for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}[assistant] {% endif %}"
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


@pytest.fixture(scope="module")
def base(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as base models come: its tokenizer has no chat template."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("base") / "model"))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def run(base: Path, chats: str, tmp_path_factory: pytest.TempPathFactory) -> llmtune.Run:
    """Trained with a template file that has gone since, from a relative path, with a system message."""
    folder = tmp_path_factory.mktemp("reopen")
    (folder / "my.jinja").write_text(JINJA)
    shutil.copytree(base, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        keys = recipe(
            "model", chats, folder / "run", template="my.jinja", default_system="Be brief.", max_steps=6, save_steps=3,
            save_total_limit=None, sample_prompts=["Who?"],
        )  # fmt: skip
        made = llmtune.train(keys)
    (folder / "my.jinja").unlink()
    return made


def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that is rendered from here on."""
    from llmtune.data import prompts

    seen: list[str] = []
    encode = prompts.encode

    def spy(tokenizer: Any, messages: Any, kwargs: Any) -> torch.Tensor:
        ids = encode(tokenizer, messages, kwargs)
        seen.append(tokenizer.decode(ids[0]))
        return ids

    monkeypatch.setattr(prompts, "encode", spy)
    return seen


def test_chat_uses_the_template_and_system_message_of_training(
    run: llmtune.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = "[system] Be brief.<|im_end|>\n[user] Who?<|im_end|>\n[assistant] "
    seen = prompts(monkeypatch)
    llmtune.load(run.output_dir).chat("Who?", max_new_tokens=2)
    assert main(["chat", str(run.output_dir), "--prompt", "Who?", "max_new_tokens=2", "device=cpu"]) == 0
    assert seen == [expected, expected]
    assert main(["chat", str(run.output_dir), "--prompt", "Who?", "max_new_tokens=2", "default_system=null"]) == 0
    assert seen[2] == expected.partition("\n")[2]


def test_export_writes_the_template_of_training(run: llmtune.Run, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    target = run.export(tmp_path / "merged", infer_dtype="float32")
    assert AutoTokenizer.from_pretrained(target).chat_template == JINJA
    assert stored_types(target) == FLOAT32


def test_a_plain_model_takes_a_named_template(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = open_model(base, template="chatml")
    assert "<|im_start|>" in tokenizer.chat_template
    assert main(["chat", str(base), "--prompt", "Who?", "max_new_tokens=1", "template=chatml"]) == 0


def test_a_run_opens_from_any_folder_and_by_any_of_its_names(
    run: llmtune.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = logits(run.model()[0])
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(open_model(run.output_dir)[0]), expected)
    monkeypatch.chdir(run.output_dir)
    assert torch.equal(logits(open_model("model")[0]), expected)
    assert torch.equal(logits(open_model(".")[0]), expected)
    monkeypatch.chdir(run.output_dir / "checkpoints")
    early = logits(open_model("step-00000003")[0])
    assert not torch.allclose(early, expected, atol=1e-4)
    assert saved_at(run.output_dir / "checkpoints") is None
    assert saved_at(run.output_dir / "checkpoints" / "step-00000003" / "state") is None


def test_a_local_model_is_recorded_by_its_full_path(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = tmp_path / "a${b}"
    odd.symlink_to(base)
    monkeypatch.chdir(tmp_path)
    made = load_recipe({"model": "./a\\${b}"})
    assert made.model.model == "./a${b}"
    (tmp_path / "resolved.yaml").write_text(made.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml").model.model == str(odd)
    assert load_recipe({"model": "owner/name"}).resolved["model"] == "owner/name"


def test_a_run_is_used_on_an_eight_bit_base(run: llmtune.Run, capsys: pytest.CaptureFixture[str]) -> None:
    eight = {"name": "bnb", "quantization_bit": 8}
    plan = open_plan(run.output_dir, device="cpu", quant_config=eight)
    assert any("int8" in line for _, change in plan.ledger.changes for line in change.report)
    model, _ = open_model(run.output_dir, device="cpu", quant_config=eight)
    expected = logits(run.model()[0])
    assert torch.allclose(logits(model), expected, atol=0.1 * float(expected.abs().max()))
    words = ["chat", str(run.output_dir), "quant_config={name: bnb, quantization_bit: 8}", "--prompt", "Who?"]
    assert main([*words, "max_new_tokens=2"]) == 0, capsys.readouterr().err


def test_a_whole_model_is_quantised_if_asked_to(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", peft_config=None, max_steps=2, learning_rate=1e-3)
    run = llmtune.train(keys)
    plan = open_plan(run.output_dir, device="cpu", quant_config={"name": "bnb", "quantization_bit": 8})
    assert any("int8" in line for _, change in plan.ledger.changes for line in change.report)


def test_a_run_that_went_on_from_an_adapter_opens_without_it(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    first = llmtune.train(recipe(tiny_llama, chats, tmp_path / "first", max_steps=4, peft_config={**LORA, "r": 6}))
    going_on = {"name": "lora", "adapter_name_or_path": str(first.output_dir)}
    keys = recipe(tiny_llama, chats, tmp_path / "second", max_steps=4, save_steps=2, peft_config=going_on)
    second = llmtune.train(keys)
    expected = logits(second.model()[0])
    assert not torch.allclose(expected, logits(first.model()[0]), atol=1e-4)
    shutil.rmtree(first.output_dir)
    assert torch.equal(logits(llmtune.load(second.output_dir).model()[0]), expected)
    assert stored_types(second.export(tmp_path / "merged", infer_dtype="float32")) == FLOAT32
    steps = sorted((second.output_dir / "checkpoints").glob("step-*"))
    open_model(steps[-1])
    shutil.rmtree(second.output_dir / "model")
    (second.output_dir / "trained.safetensors").unlink()
    assert torch.equal(logits(open_model(second.output_dir)[0]), logits(open_model(steps[-1])[0]))


def test_chat_keywords_keep_the_conversation(run: llmtune.Run) -> None:
    opened = llmtune.load(run.output_dir)
    opened.chat("One?", max_new_tokens=2, do_sample=False)
    opened.chat("Two?", repetition_penalty=1.5)
    talk = opened._conversation
    assert [message["content"] for message in talk.messages if message["role"] == "user"] == ["One?", "Two?"]
    assert (talk.config.max_new_tokens, talk.config.repetition_penalty) == (2, 1.5)
    with pytest.raises(RecipeError, match="temprature: no such key"):
        opened.chat("Three?", temprature=0.5)
    with pytest.raises(RecipeError, match="temperature: found 0, allowed is a number > 0"):
        opened.chat("Three?", temperature=0)
    assert opened.chat("Three?") == talk.messages[-1]["content"]
    assert len(talk.messages) == 6


def test_answers_come_from_the_record(run: llmtune.Run) -> None:
    assert len(run.answers) == 1 and run.answers[0][0] == "Who?"
    assert llmtune.load(run.output_dir).answers == run.answers
    record = json.loads((run.output_dir / "run.json").read_text())
    assert record["answers"] == [list(answer) for answer in run.answers]
    assert "Who?" in llmtune.load(run.output_dir)._repr_html_()


def test_export_holds_one_model_at_a_time(run: llmtune.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from llmtune.inference import export

    held: list[int] = []
    before = {id(thing) for thing in gc.get_objects() if type(thing) is LlamaForCausalLM}
    opening = export.open_plan

    def spy(*args: Any, **keys: Any) -> Any:
        held.append(sum(type(thing) is LlamaForCausalLM and id(thing) not in before for thing in gc.get_objects()))
        return opening(*args, **keys)

    monkeypatch.setattr(export, "open_plan", spy)
    target = run.export(tmp_path / "merged", infer_dtype="float32")
    assert held == [0] and stored_types(target) == FLOAT32


def test_export_takes_keys_of_the_adapter(run: llmtune.Run, tmp_path: Path) -> None:
    target = run.export(tmp_path / "merged", infer_dtype="float32", peft_config=LORA)
    assert stored_types(target) == FLOAT32


def test_a_template_given_at_use_wins(run: llmtune.Run) -> None:
    assert recipe_of(run.output_dir).data.template == str(run.output_dir.resolve() / "model" / "chat_template.jinja")
    assert recipe_of(run.output_dir, template="alpaca").data.template == "alpaca"
