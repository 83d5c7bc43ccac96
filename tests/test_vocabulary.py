"""New tokens: ids, rows, what the rows start from, that they learn, and that what is saved can be used elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.model.vocabulary import add_tokens
from tests.by_hand import adapt_by_hand, assert_same, base_by_hand, train_by_hand
from tests.runs import FLOAT32, stored_types
from tests.spawn import in_ranks
from tests.test_parity import LORA, numbers, recipe
from tests.test_resume import forget_after
from tests.tiny import tiny_model_folder, tiny_tokenizer

TOKENS = ("<|note|>", "<|sum|>", "<|end|>")
NEW: dict[str, Any] = {"new_special_tokens": list(TOKENS), "resize_vocab": True}
SAVED = {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze": {
        "peft_config": {"name": "freeze", "freeze_trainable_layers": 1, "freeze_extra_modules": "embed_tokens,lm_head"}
    },
    "lora": {"peft_config": SAVED},
    "qlora": {"peft_config": SAVED, "quant_config": {"name": "bnb"}},
}  # fmt: skip
CASES = [(ties, method) for ties in ("untied", "tied") for method in METHODS]
STEPS = 5
TWO = [(*case, init) for case in CASES for init in ("init_on_meta", "init_on_rank0", "init_on_default")]
TWO = [two for two in TWO if two[1] != "freeze" or two[2] == "init_on_meta"]


@pytest.fixture(scope="module")
def models(tiny_llama: str, tiny_tied_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    spare = tiny_model_folder(tmp_path_factory.mktemp("spare"), vocab_size=len(tiny_tokenizer()) + 5)
    bias = tiny_model_folder(tmp_path_factory.mktemp("bias"), "phi")
    return {"untied": tiny_llama, "tied": tiny_tied_llama, "spare": str(spare), "bias": str(bias)}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conversations in which the new tokens are read and written."""
    rows = []
    for number in range(24):
        asked = f"<|note|>How much is {number} and {number}?<|end|>" + " Please." * (number % 4)
        told = f"<|sum|>It is {2 * number}.<|end|>" + "<|note|>" * (number % 3)
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
    path = tmp_path_factory.mktemp("data") / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def keys_for(model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    return recipe(model, data, output, **{**NEW, "max_steps": STEPS, **changes})


def resized(model: str, folder: Path) -> Path:
    """The same done by transformers, but for the noise that it puts on the mean; saved with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    used = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": list(TOKENS)})
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    head = base.get_output_embeddings()
    places = {id(t): t for t in (base.get_input_embeddings().weight, head.weight, head.bias) if t is not None}
    means = [tensor.detach()[:used].double().mean(0) for tensor in places.values()]
    grows = len(tokenizer) > base.config.vocab_size
    first = base.config.vocab_size if grows else used
    if grows:
        base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    head = base.get_output_embeddings()
    places = {id(t): t for t in (base.get_input_embeddings().weight, head.weight, head.bias) if t is not None}
    for tensor, mean in zip(places.values(), means, strict=True):
        stop = tensor.shape[0] if grows else len(tokenizer)
        # What transformers itself starts from is this mean, but for its noise.
        if grows:
            torch.testing.assert_close(
                tensor.detach()[first:], mean.to(tensor).expand_as(tensor[first:]), atol=1e-4, rtol=0
            )
        tensor.data[first:stop] = mean.to(tensor)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["untied", "tied", "spare", "bias"])
def test_rows_start_as_the_mean_of_the_trained_ones(
    kind: str, models: dict[str, str], notes: str, tmp_path: Path
) -> None:
    model, tokenizer = llmtune.build(keys_for(models[kind], notes, tmp_path / "run"))
    theirs = base_by_hand({"model": str(resized(models[kind], tmp_path / "theirs"))}).state_dict()
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: name + text)
    used = len(tiny_tokenizer())
    assert [tokenizer(token, add_special_tokens=False)["input_ids"] for token in TOKENS] == [
        [used],
        [used + 1],
        [used + 2],
    ]
    assert model.config.vocab_size == (used + 5 if kind == "spare" else -(-(used + 3) // 64) * 64)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size


def by_hand(keys: dict[str, Any], folder: Path) -> list[tuple[float, float]]:
    """Losses and norms of a loop written by hand on the model that transformers has resized."""
    theirs = {**keys, "model": str(resized(keys["model"], folder))}
    model, peft = base_by_hand(theirs), keys.get("peft_config")
    if peft and peft["name"] == "freeze":
        model.requires_grad_(False)
        for part in (model.model.layers[-1], model.get_input_embeddings(), model.get_output_embeddings()):
            part.requires_grad_(True)
    elif peft:
        model = adapt_by_hand(model, peft, dict(llmtune.build({**keys})[0].named_parameters()))
    return train_by_hand(theirs, model, llmtune.plan(keys))


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_five_steps_equal_a_loop_on_a_model_that_transformers_resized(
    kind: str, method: str, models: dict[str, str], notes: str, runs: Path, tmp_path: Path
) -> None:
    keys = keys_for(models[kind], notes, runs / f"{kind}, {method}", **METHODS[method])
    expected = by_hand({**keys, "output_dir": str(tmp_path / "run")}, tmp_path / "theirs")
    assert_same(numbers(llmtune.load(runs / f"{kind}, {method}")), expected)
    assert expected[-1][0] < expected[0][0]


def train_each(recipes: list[dict[str, Any]]) -> None:
    for keys in recipes:
        llmtune.train(keys)


@pytest.fixture(scope="module")
def runs(models: dict[str, str], notes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on one rank, and on two with every way of reading weights: the same eight rows a step."""
    root = tmp_path_factory.mktemp("runs")
    train_each([keys_for(models[kind], notes, root / f"{kind}, {way}", **METHODS[way]) for kind, way in CASES])
    half = {"gradient_accumulation_steps": 1}
    two = [
        keys_for(models[kind], notes, root / f"two, {init}, {kind}, {way}", **METHODS[way], **half, init_config=init)
        for kind, way, init in TWO
    ]
    in_ranks(2, root / "ranks", train_each, two)
    return root


@pytest.mark.parametrize(("kind", "method", "init"), TWO)
def test_two_ranks_learn_what_one_learns(kind: str, method: str, init: str, runs: Path) -> None:
    found = llmtune.load(runs / f"two, {init}, {kind}, {method}")
    assert_same(numbers(found), numbers(llmtune.load(runs / f"{kind}, {method}")))


def logits_of(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor(
        [tokenizer(f"{TOKENS[0]}How much is 3 and 3?{TOKENS[1]}", add_special_tokens=False)["input_ids"]]
    )
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_whole_model_is_saved_with_its_tokens(kind: str, notes: str, runs: Path) -> None:
    """transformers reads it as it is, and so does llmtune, whose recipe still names the tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs / f"{kind}, full"
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert [len(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in TOKENS] == [1, 1, 1]
    assert (
        theirs.config.vocab_size % 64 == 0 and theirs.get_input_embeddings().weight.shape[0] == theirs.config.vocab_size
    )
    ours, same = llmtune.load(folder).model()
    assert same.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(logits_of(ours, same), logits_of(theirs, tokenizer))
    assert "Tokens" not in str(llmtune.plan({**NEW, "model": str(folder / "model"), "dataset": notes}))


@pytest.mark.parametrize(("kind", "method"), [(kind, way) for kind, way in CASES if "lora" in way])
def test_an_adapter_is_read_by_peft_on_the_resized_base(
    kind: str, method: str, models: dict[str, str], runs: Path, tmp_path: Path
) -> None:
    """Whatever the base's new rows start from: the trained copies of embedding and head are in the adapter."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    folder = runs / f"{kind}, {method}"
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base = base_by_hand({"model": models[kind], **({"quant_config": {"name": "bnb"}} if method == "qlora" else {})})
    base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    theirs = PeftModel.from_pretrained(base, folder / "model")
    ours, same = llmtune.load(folder).model()
    near = 1e-3 if method == "qlora" else 1e-5  # bitsandbytes' CPU kernel rounds its products
    torch.testing.assert_close(logits_of(ours, same), logits_of(theirs, tokenizer), rtol=1e-5, atol=near)
    merged = llmtune.load(folder).export(tmp_path / "merged")
    assert stored_types(merged) == FLOAT32
    plain = base_by_hand({"model": str(merged)})
    assert plain.get_input_embeddings().weight.shape[0] == plain.config.vocab_size == base.config.vocab_size
    if method == "lora":
        torch.testing.assert_close(logits_of(plain, same), logits_of(ours, same), rtol=1e-4, atol=1e-5)


def test_an_adapter_with_new_tokens_is_continued(
    models: dict[str, str], notes: str, runs: Path, tmp_path: Path
) -> None:
    """Its trained rows come from its file; the base's start as the mean again."""
    first = runs / "untied, lora"
    peft = {"name": "lora", "adapter_name_or_path": [str(first / "model")]}
    keys = keys_for(models["untied"], notes, tmp_path / "run", peft_config=peft, learning_rate=1e-9)
    model, tokenizer = llmtune.train(keys).model()
    torch.testing.assert_close(logits_of(model, tokenizer), logits_of(*llmtune.load(first).model()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_interrupted_run_goes_on(
    method: str, models: dict[str, str], notes: str, runs: Path, tmp_path: Path
) -> None:
    keys = keys_for(models["tied"], notes, tmp_path / "run", **METHODS[method], save_steps=1)
    llmtune.train(keys)
    forget_after(tmp_path / "run", 3)
    run = llmtune.train({**keys, "resume_from_checkpoint": True})
    assert numbers(run) == numbers(llmtune.load(runs / f"tied, {method}"))
    assert run.chat("<|note|>Hello<|end|>", max_new_tokens=4) is not None
    forget_after(tmp_path / "run", 3)
    changed = {**keys, "new_special_tokens": [*TOKENS, "<|more|>"]}
    with pytest.raises(llmtune.LlmtuneError, match="new_special_tokens"):
        llmtune.train(changed)


def test_new_rows_learn_in_spare_places(models: dict[str, str], notes: str, tmp_path: Path) -> None:
    """Without resizing: other spare rows stay as they were, and PEFT needs nothing but the tokenizer."""
    from peft import PeftModel

    keys = keys_for(
        models["spare"], notes, tmp_path / "run", peft_config=SAVED, resize_vocab=False, optim_config="adamw"
    )
    used = len(tiny_tokenizer())
    assert f"<|end|> ({used + 2})" in str(llmtune.plan(keys)) and "in spare rows of" in str(llmtune.plan(keys))
    before = llmtune.build(keys)[0].get_input_embeddings().original_module.weight
    ours, tokenizer = llmtune.train(keys).model()
    after = ours.get_input_embeddings().modules_to_save["default"].weight
    moved = (after - before).abs().sum(1) > 0
    assert moved[used : used + 3].all() and not moved[used + 3 :].any()
    theirs = PeftModel.from_pretrained(base_by_hand(keys), tmp_path / "run" / "model")
    torch.testing.assert_close(logits_of(ours, tokenizer), logits_of(theirs, tokenizer), rtol=1e-5, atol=1e-5)


def test_split_products_and_shards_learn_the_same(
    models: dict[str, str], notes: str, runs: Path, tmp_path: Path
) -> None:
    spreads = {"split": {"tp_size": 2}, "kept": {"offload_params": True}}
    recipes = [
        keys_for(models["tied"], notes, tmp_path / name, dist_config={"name": "fsdp2", **block}, **share)
        for name, block in spreads.items()
        for share in [{} if "tp_size" in block else {"gradient_accumulation_steps": 1}]
    ]
    in_ranks(2, tmp_path / "ranks", train_each, recipes)
    for name in spreads:
        assert_same(numbers(llmtune.load(tmp_path / name)), numbers(llmtune.load(runs / "tied, full")))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no rows": (
        "untied", {"resize_vocab": False},
        r"resize_vocab: found false, but <\|note\|>, .* need ids up to .* 0 of them spare; set resize_vocab: true",
    ),
    "too few": ("spare", {"resize_vocab": False, "new_special_tokens": "<1>,<2>,<3>,<4>,<5>,<6>"}, "5 of them spare"),
    "frozen": ("untied", {"peft_config": LORA}, "lora leaves embed_tokens,lm_head frozen.*add .* to peft_config.mo"),
    "frozen, spare": ("spare", {"peft_config": LORA, "resize_vocab": False}, "add embed_tokens,lm_head to"),
    "half": ("untied", {"peft_config": {**LORA, "modules_to_save": "embed_tokens"}}, "lora leaves lm_head frozen"),
    "tied, half": ("tied", {"peft_config": {**LORA, "modules_to_save": "embed_tokens"}}, "lora leaves lm_head frozen"),
    "low rank": ("untied", {"peft_config": {**LORA, "target_modules": "embed_tokens,lm_head"}}, "leaves embed_tokens"),
    "freeze": ("untied", {"peft_config": "freeze"}, "add embed_tokens,lm_head to peft_config.freeze_extra_modules"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_not_there_or_would_not_learn_are_refused(
    case: str, models: dict[str, str], notes: str, tmp_path: Path
) -> None:
    kind, changes, sentence = REFUSED[case]
    with pytest.raises(llmtune.PlanError, match=sentence):
        llmtune.plan(keys_for(models[kind], notes, tmp_path / "run", **changes))


def test_the_plan_says_what_grows_and_counts_it(models: dict[str, str], notes: str, tmp_path: Path) -> None:
    keys = {**keys_for(models["untied"], notes, tmp_path / "run"), "kernel_config": None}
    grown, plain = llmtune.plan(keys), llmtune.plan({**keys, "new_special_tokens": None, "resize_vocab": False})
    used, rows = len(tiny_tokenizer()), grown.model.module.config.vocab_size
    text = str(grown)
    assert f"3 new: <|note|> ({used}), <|sum|> ({used + 1}), <|end|> ({used + 2})" in text
    assert f"rows grow from {used} to {rows}; new rows start as the mean of the first {used}" in text
    assert grown.model.parameters()[1] - plain.model.parameters()[1] == 2 * (rows - used) * 32
    ours, theirs = (plan.cost.memory.at_peak for plan in (grown, plain))
    assert ours.weights - theirs.weights == ours.gradients - theirs.gradients == 4 * 2 * (rows - used) * 32


def test_tokens_the_tokenizer_has_are_no_new_ones() -> None:
    tokenizer = tiny_tokenizer()
    used = len(tokenizer)
    assert add_tokens(tokenizer, "<|im_end|>, <a> ,<b>,<a>") == {"<a>": used, "<b>": used + 1}
    assert add_tokens(tokenizer, ("<b>",)) == {} == add_tokens(tokenizer, None)
    assert tokenizer("x<a>y")["input_ids"].count(used) == 1
    assert {"<|im_end|>", "<a>", "<b>"} <= set(tokenizer.all_special_tokens)
