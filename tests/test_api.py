"""What a user calls: train, plan, build, load, chat, export, from Python and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import PlanError
from tests.runs import FLOAT32, LORA, recipe, stored_types


@pytest.fixture(scope="module")
def run(tiny_tied_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> llmtune.Run:
    folder = tmp_path_factory.mktemp("api") / "run"
    keys = recipe(
        tiny_tied_llama, chats, folder, save_steps=6, sample_prompts=["Who?"], plot_loss=True, packing=True,
        logger_config="tensorboard", max_steps=30, val_size=4, eval_strategy="epoch",
    )  # fmt: skip
    return llmtune.train(keys)


def ask(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer("<|im_start|>user\nHow much is 3 and 3?<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=ids["input_ids"]).logits


def test_a_run_shows_what_happened(run: llmtune.Run) -> None:
    assert run.status == "done"
    first, *_, last = (row for row in run.metrics if "loss" in row)
    assert first["loss"] > last["loss"]
    assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"} <= first.keys()
    assert any("eval_loss" in row for row in run.metrics)
    assert (run.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert run.plot().axes
    assert "done" in repr(run) and "Who?" in run._repr_html_()
    files = {path.name for path in run.output_dir.iterdir()}
    assert {"recipe.yaml", "resolved.yaml", "run.json", "metrics.jsonl", "model", "checkpoints", "loggers"} <= files
    assert [path.name for path in (run.output_dir / "loggers").iterdir()] == ["tensorboard"]
    record = json.loads((run.output_dir / "run.json").read_text())
    assert record["plugins"]["peft_config lora"].startswith("llmtune-lora ")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: run.chat(None), "text: found null, allowed is text or a list of a mapping"),
        (lambda run: run.chat("<image>", images="a.png"), 'images: found "a.png", allowed is a list'),
        (lambda run: run.reward("a", ["q"]), r"question: found \['q'\], allowed is text or null"),
        (lambda run: run.export(5), "export_dir: found 5, allowed is text or a path"),
        (lambda run: run.plot(5), "path: found 5, allowed is text or a path or null"),
        (lambda run: run.predict("x", nproc=0), "nproc: found 0, allowed is a whole number >= 1 or null"),
        (lambda run: run.predict("x", output_dir=5), "output_dir: found 5, allowed is text"),
        (lambda run: run.predict("x", device="gpu"), 'device: found "gpu", allowed is one of "auto", "cpu", "cuda"'),
        (lambda run: llmtune.load(run), "run_dir: found Run.*, allowed is text or a path"),
        (lambda run: llmtune.train(5), "recipe: found 5, allowed is text or a path or a mapping"),
        (lambda run: llmtune.plan({}, ranks="2"), 'ranks: found "2", allowed is a whole number >= 1'),
        (lambda run: llmtune.plan({}, ranks=2, device=80), "device: found 80, allowed is text or null"),
    ],
)
def test_an_argument_of_another_type_is_told(run: llmtune.Run, call: Callable[[llmtune.Run], Any], said: str) -> None:
    with pytest.raises(llmtune.RecipeError, match=said):
        call(run)


def test_a_message_without_a_content_is_told(run: llmtune.Run) -> None:
    with pytest.raises(llmtune.DataError, match="needed is a last one of the role user, and its content"):
        run.chat([{"role": "user"}])


def test_the_adapter_loads_in_peft_and_answers_alike(run: llmtune.Run, tiny_tied_llama: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_tied_llama)
    model = PeftModel.from_pretrained(base, run.output_dir / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.output_dir / "model")
    assert tokenizer.chat_template
    ours, _ = llmtune.load(run.output_dir).model()
    assert torch.allclose(ask(model, tokenizer), ask(ours, tokenizer), atol=1e-6)


def test_a_checkpoint_opens_as_it_was(run: llmtune.Run) -> None:
    from llmtune.inference.reopen import open_model

    early, tokenizer = open_model(run.output_dir / "checkpoints" / "step-00000006")
    late, _ = run.model()
    assert not torch.allclose(ask(early, tokenizer), ask(late, tokenizer), atol=1e-4)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_exported_model_is_plain_and_answers_alike(run: llmtune.Run, legacy: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = run.export(tmp_path / "merged", infer_dtype="float32", export_legacy_format=legacy)
    model = AutoModelForCausalLM.from_pretrained(target, weights_only=True)
    tokenizer = AutoTokenizer.from_pretrained(target)
    ours, _ = run.model()
    assert torch.allclose(ask(model.eval(), tokenizer), ask(ours, tokenizer), atol=1e-4)
    assert (target / "pytorch_model.bin").exists() == legacy
    assert model.dtype == torch.float32 and stored_types(target) == FLOAT32


def test_export_refuses_a_folder_in_use(run: llmtune.Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(PlanError, match="export_dir: .* is not empty"):
        run.export(tmp_path)


def test_an_untrained_adapter_is_not_exported(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    run = llmtune.train(recipe(tiny_llama, chats, tmp_path / "run", max_steps=1, warmup_steps=5))
    with pytest.raises(PlanError, match="answers exactly like the base"):
        run.export(tmp_path / "merged")


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_config": None, "learning_rate": 1e-3},
        {"peft_config": {"name": "freeze", "freeze_trainable_layers": -1}, "learning_rate": 1e-3},
        {"peft_config": {**LORA, "use_dora": True}, "quant_config": "bnb"},
        {"peft_config": {**LORA, "modules_to_save": "lm_head"}},
    ],
    ids=["full", "freeze", "qdora", "modules_to_save"],
)
def test_every_method_reopens_and_exports(
    changes: dict[str, Any], tiny_tied_llama: str, chats: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = llmtune.train(recipe(tiny_tied_llama, chats, tmp_path / "run", max_steps=4, **changes))
    model, tokenizer = llmtune.load(tmp_path / "run").model()
    target = run.export(tmp_path / "merged", infer_dtype="float32")
    assert stored_types(target) == FLOAT32
    merged = AutoModelForCausalLM.from_pretrained(target).eval()
    # A quantised base differs from the unquantised one it is merged onto, by what 4 bits lose.
    tolerance = 0.3 if "quant_config" in changes else 1e-4
    assert torch.allclose(ask(merged, tokenizer), ask(model, tokenizer), atol=tolerance)


def test_build_gives_a_model_to_train_by_hand(tiny_llama: str) -> None:
    model, tokenizer = llmtune.build({"model": tiny_llama, "device": "cpu", "peft_config": LORA})
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert ask(model, tokenizer).shape[-1] == model.config.vocab_size


def test_a_plan_reads_no_weights_and_says_what_will_happen(folder: Path, chats: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) > 10
    plan = llmtune.plan(
        recipe(str(folder), chats, tmp_path / "run", quant_config="bnb", num_train_epochs=1.5, max_steps=None)
    )
    assert all(parameter.is_meta for parameter in plan.model.module.parameters())
    text = str(plan)
    for said in (
        "nf4",
        "14 layers",
        "q_proj",
        "trainable of",
        "8 rows a step",
        "Steps",
        str(tmp_path / "run"),
        "llmtune-lora",
    ):
        assert said in text, said
    assert plan.steps == 5  # 24 rows, 8 a step: 3 an epoch, half an epoch more
    assert not (tmp_path / "run").exists()
    assert "<pre" in plan._repr_html_()


def test_packing_gives_each_sample_the_loss_it_has_alone(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    from llmtune.data import collate
    from llmtune.training.building import build_objective

    for kernels in (None, "auto"):
        keys = recipe(tiny_llama, chats, tmp_path / "run", packing=True, kernel_config=kernels, peft_config=None)
        plan = llmtune.plan(keys)
        objective = build_objective(plan.model).eval()
        samples = [plan.data.prepared.train.sample(index) for index in range(6)]
        with torch.no_grad():
            alone = [objective(collate([sample], flat=True, pad_id=0)).total for sample in samples]
            for together in ([0, 1, 2], [2, 1, 0], [5, 3, 0, 4]):
                packed = objective(collate([samples[index] for index in together], flat=True, pad_id=0)).total
                assert packed.item() == pytest.approx(sum(alone[index].item() for index in together), rel=1e-5)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llmtune", *words], capture_output=True, text=True, timeout=200)


def test_the_command_line_from_recipe_to_answer(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(recipe(tiny_llama, chats, tmp_path / "run", sample_prompts=["Who?"])))
    trained = command("train", str(path), "max_steps=2", "peft_config.r=2", "--nproc", "2")
    assert trained.returncode == 0, trained.stderr
    assert "llmtune chat" in trained.stdout
    assert "Question: Who?" in trained.stdout  # generation while the model is spread over ranks
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ranks"] == 2
    said = command("chat", str(tmp_path / "run"), "--prompt", "Who?", "max_new_tokens=4", "do_sample=false")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    exported = command("export", str(tmp_path / "run"), f"export_dir={tmp_path / 'merged'}")
    assert exported.returncode == 0, exported.stderr
    assert stored_types(tmp_path / "merged") == FLOAT32
    plain = command("chat", str(tmp_path / "merged"), "--prompt", "Who?", "max_new_tokens=4", "do_sample=false")
    assert plain.stdout == said.stdout
