"""Several adapters: all but the last are merged into the weights as these are loaded, and the last trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_lora import LoraRecipe, build
from peft import LoraConfig, PeftModel, get_peft_model

from llmtune import LoadError, PlanError

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
}


def saved_by_peft(source: Any, folder: Path, seed: int, **keys: Any) -> None:
    """An adapter of PEFT with random numbers in all its tensors. It leaves `source` as it was."""
    torch.manual_seed(seed)
    theirs = get_peft_model(source, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **keys}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder, save_embedding_layers=False)
    theirs.unload()


def merged_by_peft(source: Any, *folders: Path) -> Any:
    for folder in folders:
        source = PeftModel.from_pretrained(source, folder).merge_and_unload()
    return source.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_former_adapters_are_merged_as_peft_does(tools: Any, tmp_path: Path, kind: str) -> None:
    def base() -> Any:
        return tools["original"](tools["config"]())

    first, second, third = (tmp_path / name for name in ("first", "second/deep", "third"))
    saved_by_peft(base(), first, 1, **KINDS[kind])
    saved_by_peft(base(), second, 2, **KINDS[kind])
    expected = merged_by_peft(base(), first, second)(tools["ids"]).logits

    fresh = build(LoraRecipe(adapter_name_or_path=(str(first), str(second)), create_new_adapter=True, pissa_init=True))
    model, change = tools["adapted"](base(), fresh)
    torch.testing.assert_close(model(tools["ids"]).logits, expected, rtol=1e-4, atol=1e-5)
    assert [line for line in change.report if "is merged into the weights" in line] and not change.files
    trained = tools["disturb"](model)
    fresh.save(model, trained, third, tools["context"]())
    torch.testing.assert_close(
        merged_by_peft(base(), first, second, third)(tools["ids"]).logits,
        model(tools["ids"]).logits, rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    parameters = fresh.reopened(third)
    assert parameters["adapter_name_or_path"] == (str(first), str(second), str(third))
    again, _ = tools["adapted"](base(), build(LoraRecipe(**parameters)), tools["context"](mode="infer"))
    assert torch.equal(again(tools["ids"]).logits, model(tools["ids"]).logits)

    last = build(LoraRecipe(adapter_name_or_path=str(first.parent / "first") + "," + str(second)))
    continued, change = tools["adapted"](base(), last)
    torch.testing.assert_close(continued(tools["ids"]).logits, expected, rtol=1e-4, atol=1e-5)
    assert change.files and {name for name, p in continued.named_parameters() if p.requires_grad} == set(change.files)


def test_a_subfolder_holds_the_adapter(tools: Any, tmp_path: Path) -> None:
    source = tools["original"](tools["config"]())
    saved_by_peft(source, tmp_path / "repo" / "best", 1)
    edit = build(LoraRecipe(adapter_name_or_path=str(tmp_path / "repo"), adapter_folder="best"))
    model, _ = tools["adapted"](source, edit)
    expected = merged_by_peft(source, tmp_path / "repo" / "best")(tools["ids"]).logits
    torch.testing.assert_close(model(tools["ids"]).logits, expected, rtol=1e-4, atol=1e-5)


def test_former_adapters_that_do_not_fit(tools: Any, tmp_path: Path) -> None:
    saved_by_peft(tools["original"](tools["config"](num_hidden_layers=3)), tmp_path / "other", 1)
    saved_by_peft(tools["original"](tools["config"](hidden_size=64, head_dim=16)), tmp_path / "wide", 1)
    tied = tools["original"](tools["config"](tie_word_embeddings=True))
    saved_by_peft(tied, tmp_path / "tied", 1, target_modules=["embed_tokens"])
    source = tools["original"](tools["config"]())
    saved_by_peft(source, tmp_path / "biased", 1, lora_bias=True, init_lora_weights=False)
    saved_by_peft(source, tmp_path / "invoked", 1, alora_invocation_tokens=[5, 6])
    saved_by_peft(source, tmp_path / "tokens", 1, trainable_token_indices=[5, 6])
    for name, start, error, sentence in (
        ("biased", source, PlanError, "has biases of its own.*export it first"),
        ("invoked", source, PlanError, r"has alora_invocation_tokens: \[5, 6\], which changes what its weights mean"),
        ("tokens", source, PlanError, "has trainable_token_indices"),
        ("other", source, LoadError, r"not part of this model: model\.layers\.2"),
        ("wide", source, LoadError, "of another shape"),
        ("tied", tied, PlanError, "embed_tokens.weight, whose weight another module shares.*export it first"),
    ):
        recipe = LoraRecipe(adapter_name_or_path=str(tmp_path / name), create_new_adapter=True, target_modules="q_proj")
        with pytest.raises(error, match=sentence):
            tools["adapted"](start, build(recipe))
