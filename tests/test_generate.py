"""Batched answers: each depends on its prompt and its seed alone, and equals what transformers says one by one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune import Answer, ContextFull, DataError, DivergedError, GenerateConfig, generate
from llmtune.distributed.fsdp2 import reshard
from llmtune.model.generate import alike_up_to
from llmtune.testing.running import build, start, tiny_recipe
from tests.spawn import in_ranks
from tests.test_parity import METHODS, recipe
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45, 46, 47], [100, 7], [12, 13, 14, 15, 16], [200, 201, 202, 203]]
GREEDY = GenerateConfig(do_sample=False, max_new_tokens=12)
WAYS = {
    "greedy": GREEDY,
    "penalised": replace(GREEDY, repetition_penalty=1.6),
    "sampled": GenerateConfig(max_new_tokens=12, temperature=1.3, top_p=0.9, top_k=100),
    "sampled and penalised": GenerateConfig(max_new_tokens=12, repetition_penalty=1.4, top_p=1.0, top_k=0),
    "beams": replace(GREEDY, num_beams=3, length_penalty=0.5, repetition_penalty=1.2),
    "sampled beams": GenerateConfig(max_new_tokens=8, num_beams=2),
    "of one length": GenerateConfig(do_sample=False, max_length=12),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    # Weights large enough for earlier tokens to decide the answer.
    return tiny_model(request.param, vocab_size=len(tokenizer), initializer_range=0.5).eval()


def answers(model: Any, tokenizer: Any, config: GenerateConfig, rows: list[int], **more: Any) -> list[Answer]:
    """To some of the prompts, of which each has its own seed."""
    return generate(model, tokenizer, [PROMPTS[row] for row in rows], config, seeds=[100 + row for row in rows], **more)


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_depends_neither_on_its_batch_nor_on_its_place(way: str, model: Any, tokenizer: Any) -> None:
    rows = list(range(len(PROMPTS)))
    alone = [answers(model, tokenizer, WAYS[way], [row])[0] for row in rows]
    assert answers(model, tokenizer, WAYS[way], rows) == alone
    assert answers(model, tokenizer, WAYS[way], rows[::-1]) == alone[::-1]
    assert len({answer.ids for answer in alone}) > 1
    if way == "of one length":
        assert [len(answer.ids) for answer in alone if answer.cut] == [
            12 - len(PROMPTS[row]) for row in rows if alone[row].cut
        ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral", "mamba", "gpt2"])
def test_several_answers_to_a_prompt_are_those_that_it_has_alone(
    family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompts are read once, where the model keeps no more than keys and values of them."""
    from llmtune.model import generate as module

    sizes = {"sliding_window": 4} if family in ("gemma3_text", "mistral") else {}
    model = tiny_model(family, vocab_size=len(tokenizer), initializer_range=0.5, **sizes).eval()
    rows = [2, 0, 0, 2, 5, 2, 0]
    kept: list[bool] = []
    prefilled = module.prefilled
    monkeypatch.setattr(module, "prefilled", lambda *given: kept.append(bool(prefilled(*given))) or prefilled(*given))
    seeds = list(range(len(rows)))
    prompts = [PROMPTS[row] for row in rows]
    for config in (GREEDY, WAYS["sampled"], WAYS["sampled and penalised"]):
        together = generate(model, tokenizer, prompts, config, seeds=seeds)
        alone = [
            generate(model, tokenizer, [prompt], config, seeds=[seed])[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        assert together == alone
    assert kept == [family != "mamba"] * 3


@pytest.mark.parametrize("way", ["greedy", "penalised", "beams", "of one length"])
@torch.no_grad()
def test_answers_are_those_of_transformers(way: str, model: Any, tokenizer: Any) -> None:
    config = WAYS[way]
    for prompt, answer in zip(PROMPTS, answers(model, tokenizer, config, list(range(len(PROMPTS)))), strict=True):
        said = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, num_beams=config.num_beams, length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
            max_new_tokens=config.max_new_tokens or config.max_length - len(prompt),
        )  # fmt: skip
        assert list(answer.ids) == said[0, len(prompt) :].tolist()
        assert answer.prompt_ids == tuple(prompt)
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True).strip()


@torch.no_grad()
def test_tokens_are_drawn_by_their_probability(model: Any, tokenizer: Any) -> None:
    """Of 6,000 draws no token is further off than five standard deviations, and none comes that is cut off."""
    draws, config = 6000, GenerateConfig(max_new_tokens=1, temperature=1.5, top_k=20, top_p=0.95)
    drawn = generate(model, tokenizer, [[5, 6, 7]] * draws, config, seeds=range(draws), stop=())
    logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.5
    chances = logits.where(logits >= logits.topk(20).values[-1], -torch.inf).softmax(0)
    order = chances.argsort(descending=True)
    kept = order[: int((chances[order].cumsum(0) < 0.95).sum()) + 1]
    chances = {int(token): float(chances[token] / chances[kept].sum()) for token in kept}
    found = Counter(answer.ids[0] for answer in drawn)
    assert set(found) <= set(chances)
    for token, chance in chances.items():
        assert abs(found[token] - draws * chance) < 5 * (draws * chance * (1 - chance)) ** 0.5 + 1


def test_seeds_decide_and_without_them_torchs_generator_does(model: Any, tokenizer: Any) -> None:
    config = WAYS["sampled"]
    assert answers(model, tokenizer, config, [0]) == answers(model, tokenizer, config, [0])
    assert len({generate(model, tokenizer, [PROMPTS[0]], config, seeds=[seed])[0].ids for seed in range(5)}) > 1
    # A longer limit goes on where a shorter one ended.
    longer = answers(model, tokenizer, replace(config, max_new_tokens=20), [0])[0].ids
    assert longer[:12] == answers(model, tokenizer, config, [0])[0].ids
    before = torch.get_rng_state()
    answers(model, tokenizer, config, [0, 1])
    answers(model, tokenizer, WAYS["sampled beams"], [0, 1])
    assert torch.equal(torch.get_rng_state(), before)
    first = generate(model, tokenizer, PROMPTS, config)
    torch.set_rng_state(before)
    assert generate(model, tokenizer, PROMPTS, config) == first


def test_each_row_stops_for_itself_and_says_whether_it_was_cut(model: Any, tokenizer: Any) -> None:
    whole = answers(model, tokenizer, GREEDY, [0, 2], stop=())
    assert [answer.cut for answer in whole] == [True, True] and [len(answer.ids) for answer in whole] == [12, 12]
    stop = [whole[0].ids[4]]
    short, other = answers(model, tokenizer, GREEDY, [0, 2], stop=stop)
    assert short.ids == whole[0].ids[: whole[0].ids.index(stop[0]) + 1] and not short.cut
    assert other.cut == (stop[0] not in whole[1].ids)


def test_a_watcher_sees_each_token_and_can_end_all(model: Any, tokenizer: Any) -> None:
    seen: list[list[int | None]] = []
    stop = [answers(model, tokenizer, GREEDY, [0], stop=())[0].ids[3]]
    made = answers(model, tokenizer, GREEDY, [0, 1, 2], stop=stop, watch=lambda tokens: bool(seen.append(list(tokens))))
    for row, answer in enumerate(made):
        assert tuple(step[row] for step in seen if step[row] is not None) == answer.ids
    ended = answers(model, tokenizer, GREEDY, [1, 2], stop=(), watch=lambda tokens: True)
    assert [(len(answer.ids), answer.cut) for answer in ended] == [(1, True), (1, True)]


def test_nothing_to_answer_too_long_a_prompt_and_a_damaged_model(model: Any, tokenizer: Any) -> None:
    assert generate(model, tokenizer, [], GREEDY) == []
    with pytest.raises(ContextFull, match="has 600 tokens"):
        generate(model, tokenizer, [[1], [5] * 600], GREEDY)
    for prompt, said in (([], "the prompt is empty"), ([1, 99999999], "99999999 is no token, there are"), ([-1], "-1")):
        with pytest.raises(DataError, match=said):
            generate(model, tokenizer, [[1], prompt], GREEDY)
    damaged = tiny_model(vocab_size=len(tokenizer))
    damaged.lm_head.weight.data[7] = torch.nan
    for config in (GREEDY, WAYS["sampled"], WAYS["beams"]):
        with pytest.raises(DivergedError, match="not finite"):
            generate(damaged, tokenizer, PROMPTS, config)


CASES: dict[str, dict[str, Any]] = {
    "full": METHODS["full"],
    "lora with kernels": {**METHODS["lora"], "kernel_config": "auto", "packing": True},
    "qlora": METHODS["qlora"],
    "tensor parallel": {**METHODS["lora"], "dist_config": {"name": "fsdp2", "tp_size": 2}},
}
ASKED = ("greedy", "sampled", "beams", "sampled beams")


def answers_of_recipes(recipes: list[dict[str, Any]]) -> list[dict[str, list[Answer]]]:
    """What the model of each recipe says to this rank's share of the prompts."""
    return [answers_of(keys) for keys in recipes]


def answers_of(keys: dict[str, Any]) -> dict[str, list[Answer]]:
    """The first rank has one prompt, the other the rest: batches of different sizes. At last it has none."""
    plan, objective = build(keys)
    model, rank, rows = plan.module, plan.ranks.batch_rank, list(range(len(PROMPTS)))
    if plan.ranks.batch_ranks > 1:
        rows = rows[1:] if rank else rows[:1]

    def said(way: str, rows: list[int]) -> list[Answer]:
        return objective(lambda: answers(model, plan.tokenizer, WAYS[way], rows))

    found = {way: said(way, rows) for way in ASKED} | {"none": said("greedy", [] if rank else rows)}
    if "peft_config" in keys and plan.ranks.size == 1:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        found["trained"] = said("greedy", rows)
        with plan.parts.one("peft_config").built.disabled(model):
            found["off"] = said("greedy", rows)
    reshard(objective)
    return found


@pytest.fixture(scope="module")
def recipes(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("recipes")
    return [recipe(tiny_llama, chats, root / case, **CASES[case]) for case in CASES]


@pytest.fixture(scope="module")
def one(recipes: list[dict[str, Any]]) -> list[dict[str, list[Answer]]]:
    return answers_of_recipes([{**keys, "dist_config": "fsdp2"} for keys in recipes])


@pytest.fixture(scope="module")
def two(recipes: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, list[Answer]]]]:
    return in_ranks(2, tmp_path_factory.mktemp("two"), answers_of_recipes, recipes)


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_says_on_two_ranks_what_it_says_on_one(case: str, one: Any, two: Any) -> None:
    number = list(CASES).index(case)
    alone, (first, second) = one[number], [rank[number] for rank in two]
    for way in ASKED:
        shared = first[way] if case == "tensor parallel" else first[way] + second[way]
        assert shared == alone[way], way
        if case == "tensor parallel":
            assert second[way] == alone[way]
    if case != "tensor parallel":
        assert first["none"] == alone["greedy"][:1] and second["none"] == []


def test_adapters_and_kernels_answer_as_they_are(one: Any) -> None:
    """An adapter that has learnt nothing answers like its base, kernels like the plain operations."""
    plain, adapted, quantised, _ = one
    for more in (adapted, quantised):
        assert more.pop("trained") != more["greedy"] and more.pop("off") == more["greedy"]
    assert adapted == plain
    assert quantised["greedy"] != plain["greedy"]


def test_modes_come_back(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=len(tokenizer))
    model.train()
    model.lm_head.eval()
    answers(model, tokenizer, GREEDY, [0])
    assert model.training and model.model.training and not model.lm_head.training


def unequal(keys: dict[str, Any]) -> list[list[tuple[int, ...]]]:
    """Answers on this rank of two where one has several to a prompt, and the other none or a prompt of one token."""
    plan, objective = start(keys)
    said = []
    for other in ([], [[9]]):
        prompts = other if plan.ranks.rank else [PROMPTS[2]] * 3
        given = partial(generate, plan.model.module, plan.model.tokenizer, prompts, WAYS["sampled"])
        found = objective(partial(given, seeds=list(range(len(prompts)))))
        reshard(objective)
        said.append([answer.ids for answer in found])
    return said


def test_ranks_read_prompts_together_whatever_each_has(tmp_path: Path) -> None:
    first, second = in_ranks(2, tmp_path / "ranks", unequal, tiny_recipe(tmp_path))
    assert first[0] == first[1] and len(set(first[0])) > 1
    assert second[0] == [] and len(second[1]) == 1


def test_positions_that_stretch_with_the_longest_row_do_not_stretch_those_beside_it(tokenizer: Any) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4,
            "original_max_position_embeddings": 32}  # fmt: skip
    model = tiny_model("phi3", vocab_size=len(tokenizer), initializer_range=0.5, rope_parameters=rope,
                       original_max_position_embeddings=32).eval()  # fmt: skip
    assert alike_up_to(model.config) == 32
    config = GenerateConfig(do_sample=False, max_new_tokens=8)
    prompts = [[5, 6, 7, 8, 9, 10], list(range(20, 60))]
    alone = [generate(model, tokenizer, [prompt], config)[0].ids for prompt in prompts]
    assert [answer.ids for answer in generate(model, tokenizer, prompts, config)] == alone
