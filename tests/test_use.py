"""What was trained is used as it was trained, exported as its base is stored, and refused where it would be another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import CheckpointError, LoadError, PlanError
from llmtune.folders import size_and_hash
from llmtune.inference import export
from llmtune.inference.reopen import open_model, recipe_of
from llmtune.model.fingerprint import fingerprint
from tests.runs import LORA, recipe, stored_types
from tests.tiny import tiny_model_folder

IDS = torch.arange(3, 40)[None]
FREE = {"max_new_tokens": 2, "do_sample": False}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def stored_in(folder: Path, dtype: torch.dtype, but: tuple[str, ...] = ()) -> Path:
    """The model folder with its weights in another type, those named `but` excepted."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor if name in but else tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


# ---- the type of an export -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_an_export_has_the_type_of_the_base(peft: Any, dtype: torch.dtype, chats: str, tmp_path: Path) -> None:
    base = stored_in(tiny_model_folder(tmp_path), dtype)
    run = llmtune.train(recipe(str(base), chats, tmp_path / "run", peft_config=peft, max_steps=2))
    for legacy in (False, True):
        merged = run.export(tmp_path / f"merged-{legacy}", export_legacy_format=legacy)
        assert stored_types(merged) == {str(dtype)}
        assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == dtype
    assert stored_types(run.export(tmp_path / "wide", infer_dtype="float32")) == {"torch.float32"}


def test_a_mixed_base_is_exported_as_its_config_says(chats: str, tmp_path: Path) -> None:
    base = stored_in(tiny_model_folder(tmp_path), torch.bfloat16, but=("lm_head.weight", "model.embed_tokens.weight"))
    run = llmtune.train(recipe(str(base), chats, tmp_path / "run", max_steps=2))
    assert stored_types(run.export(tmp_path / "merged")) == {"torch.bfloat16"}


def test_the_legacy_format_is_cut_into_files_of_the_size_asked_for(
    chats: str, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = llmtune.train(recipe(tiny_llama, chats, tmp_path / "run", max_steps=2))
    writing = export.write
    monkeypatch.setattr(export, "write", lambda *given: writing(*given[:3], Small()))
    merged = run.export(tmp_path / "merged")
    assert len(list(merged.glob("pytorch_model-0000*-of-0000*.bin"))) > 1
    plain = AutoModelForCausalLM.from_pretrained(merged, weights_only=True)
    assert stored_types(merged) == {"torch.float32"}
    torch.testing.assert_close(logits(plain), logits(run.model()[0]), rtol=1e-4, atol=1e-5)


class Small:
    """Files of 20 kB."""

    export_size, export_legacy_format, export_hub_model_id = 2e-5, True, None


# ---- which adapters ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> list[llmtune.Run]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        llmtune.train(recipe(tiny_llama, chats, root / str(seed), max_steps=3, seed=seed, sample_prompts=["Who?"]))
        for seed in (1, 2)
    ]


def test_adapters_of_others_are_merged_into_their_base(
    adapters: list[llmtune.Run], tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that are named, in order, from the command line or a recipe."""
    places = [str(run.output_dir / "model") for run in adapters]
    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for number, place in enumerate(places, 1):
        theirs = PeftModel.from_pretrained(theirs, place).merge_and_unload()
        named = "{name: lora, adapter_name_or_path: [" + ", ".join(places[:number]) + "]}"
        target = tmp_path / str(number)
        assert main(["export", tiny_llama, f"peft_config={named}", f"export_dir={target}"]) == 0, (
            capsys.readouterr().err
        )
        assert stored_types(target) == {"torch.float32"}
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(target)), logits(theirs))
    file = tmp_path / "both.yaml"
    file.write_text(f"model: {tiny_llama}\npeft_config:\n  name: lora\n  adapter_name_or_path: [{', '.join(places)}]\n")
    torch.testing.assert_close(logits(open_model(file)[0]), logits(theirs))
    assert main(["chat", str(file), "--prompt", "Who?", "max_new_tokens=2"]) == 0
    assert stored_types(export.export(file, export_dir=str(tmp_path / "file"))) == {"torch.float32"}


def test_an_adapter_beneath_is_found_from_any_folder(
    adapters: list[llmtune.Run], tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the recipe names it from the folder that training was started in."""
    monkeypatch.chdir(adapters[0].output_dir.parent)
    peft = {"name": "lora", "r": 4, "adapter_name_or_path": adapters[0].output_dir.name, "create_new_adapter": True}
    run = llmtune.train(recipe(tiny_llama, chats, tmp_path / "run", max_steps=1, peft_config=peft))
    expected = logits(run.model()[0])
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(open_model(run.output_dir)[0]), expected)


def test_exports_are_uploaded_to_hugging_face_alone(adapters: list[llmtune.Run], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="export_hub_model_id: llmtune uploads to Hugging Face alone.*is ModelScope;"):
        adapters[0].export(tmp_path / "merged", export_hub_model_id="me/tiny", hub_config="modelscope")
    assert not (tmp_path / "merged").exists()


def test_a_run_is_used_with_its_own_adapter_only(adapters: list[llmtune.Run], tmp_path: Path) -> None:
    one, other = (str(run.output_dir) for run in adapters)
    named = {"peft_config.adapter_name_or_path": f"{one},{other}"}
    with pytest.raises(PlanError, match=r"used with the adapter that it trained; for others, name their base: .*llama"):
        adapters[0].export(tmp_path / "merged", **named)
    with pytest.raises(PlanError, match="used with the adapter that it trained"):
        open_model(one, **named)


def test_what_was_not_trained_is_not_used(
    adapters: list[llmtune.Run], tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps(recipe(tiny_llama, chats, tmp_path / "run")))
    with pytest.raises(PlanError, match=rf"lora names no files of an adapter.*such as {tmp_path / 'run'}"):
        open_model(file)
    with pytest.raises(PlanError, match="so that it would be an untrained one"):
        open_model(file, peft_config={"name": "lora", "r": 4, "pissa_init": True})
    with pytest.raises(PlanError, match="there is nothing to merge; name a run"):
        export.export(tiny_llama, export_dir=str(tmp_path / "merged"))


# ---- what a run remembers ------------------------------------------------------------------------------------------


@pytest.fixture
def copied(adapters: list[llmtune.Run], tiny_llama: str, tmp_path: Path) -> tuple[Path, Path]:
    """(run, base), both of which a test may spoil."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    run = Path(shutil.copytree(adapters[0].output_dir, tmp_path / "run"))
    text = (run / "resolved.yaml").read_text()
    (run / "resolved.yaml").write_text(text.replace(tiny_llama, str(base)))
    record = json.loads((run / "run.json").read_text())
    assert record["model_fingerprint"] == fingerprint(base)
    assert record["trained_sha256"] == size_and_hash(run / "trained.safetensors")[1]
    return run, base


def note(run: Path, **facts: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | facts))


def test_a_base_that_was_replaced_is_noticed(copied: tuple[Path, Path], tmp_path: Path) -> None:
    run, base = copied
    open_model(run)
    shutil.copy(tiny_model_folder(tmp_path / "other", seed=5) / "model.safetensors", base)
    for use in (lambda: open_model(run), lambda: export.export(run, export_dir=str(tmp_path / "merged"))):
        with pytest.raises(LoadError, match=r"base are not those that .*run was trained on"):
            use()
    same = shutil.copytree(base, tmp_path / "same")
    open_model(run, model=str(same))  # at the user's word


def test_a_damaged_result_is_noticed(copied: tuple[Path, Path]) -> None:
    run, _ = copied
    file = run / "trained.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"trained\.safetensors: damaged"):
        open_model(run)


def test_the_recorded_commit_and_the_saved_template_are_used(copied: tuple[Path, Path]) -> None:
    run, base = copied
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    _, tokenizer = open_model(run)
    assert tokenizer.chat_template == (run / "model" / "chat_template.jinja").read_text()
    (run / "model" / "chat_template.jinja").rename(run / "chat_template.jinja")
    assert open_model(run)[1].chat_template == (run / "chat_template.jinja").read_text()
    commit = "0123456789" * 4
    note(run, model_origin="hub", model_revision=commit)
    assert recipe_of(run).model.revision == commit
    assert recipe_of(run, revision="main").model.revision == "main"
    assert recipe_of(run, model="me/other").model.revision is None


def test_stretched_positions_are_no_part_of_an_adapter_and_the_plan_says_so(
    tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    """Read by PEFT the adapter is another model, until the base's config is what the run's was; an export has it."""
    keys = recipe(tiny_llama, chats, tmp_path / "run", rope_scaling={"rope_type": "linear", "factor": 4.0}, max_steps=3)
    note = "rope_scaling is no part of an adapter"
    assert note in str(llmtune.plan(keys)) and note not in str(llmtune.plan({**keys, "peft_config": None}))
    run = llmtune.train(keys)
    expected = logits(run.model()[0])
    stretched = run.model()[0].config
    for config, same in ((None, False), (stretched, True)):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, config=config)
        theirs = logits(PeftModel.from_pretrained(base, run.output_dir / "model"))
        assert torch.allclose(theirs, expected, atol=1e-4) == same
    merged = run.export(tmp_path / "merged")
    assert stored_types(merged) == {"torch.float32"}
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, rtol=1e-4, atol=1e-4)


# ---- without a chat template, and with a variable of it -------------------------------------------------------------


def test_a_run_without_chat_template_goes_on_with_plain_text(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} and {n} make {2 * n}. " * 9}) + "\n" for n in range(24)))
    keys = recipe(str(base), str(texts), tmp_path / "run", stage_config="pt", sample_prompts=["2 and 2 make"])
    run = llmtune.train({**keys, "max_steps": 8})
    model, tokenizer = run.model()
    ids = torch.tensor([tokenizer("2 and 2 make")["input_ids"]])
    by_hand = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(by_hand, skip_special_tokens=True).strip()
    assert run.answers[0][2] == expected
    assert run.chat("2 and 2 make", max_new_tokens=64, do_sample=False) == expected
    assert run.chat("2 and 2 make") == expected  # no turn is remembered
    words = ["--prompt", "2 and 2 make", "max_new_tokens=64", "do_sample=false", "device=cpu"]
    merged = run.export(tmp_path / "merged")
    assert stored_types(merged) == {"torch.float32"}
    capsys.readouterr()
    for place in (run.output_dir, merged):
        assert main(["chat", str(place), *words]) == 0
        said = capsys.readouterr()
        assert said.out.strip() == expected and "no chat template, so text is continued" in said.err


THINKING = (
    "{%- for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}[assistant] {{ 'fast ' if enable_thinking is false else 'slow ' }}{% endif %}"
)


def test_thinking_is_as_the_recipe_says_in_training_chat_and_sample_answers(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtune.data import prompts

    seen: list[str] = []
    encode = prompts.encode

    def spy(tokenizer: Any, messages: Any, variables: Any) -> torch.Tensor:
        ids = encode(tokenizer, messages, variables)
        seen.append(tokenizer.decode(ids[0]).rpartition("[assistant] ")[2])
        return ids

    monkeypatch.setattr(prompts, "encode", spy)
    (tmp_path / "my.jinja").write_text(THINKING)
    keys = recipe(tiny_llama, chats, tmp_path / "run", template=str(tmp_path / "my.jinja"), max_steps=1)
    run = llmtune.train({**keys, "enable_thinking": False, "sample_prompts": ["Who?"]})
    llmtune.load(run.output_dir).chat("Who?", **FREE)
    assert main(["chat", str(run.output_dir), "--prompt", "Who?", "max_new_tokens=2", "device=cpu"]) == 0
    assert [said.strip() for said in seen] == ["fast"] * 4
    assert main(["chat", str(run.output_dir), "--prompt", "x", "max_new_tokens=2", "enable_thinking=true"]) == 0
    assert seen[-1].strip() == "slow"
