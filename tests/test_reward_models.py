"""Reward models that answers are judged by: the numbers of `Run.reward` and of transformers, whatever the base, the
layout and the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import llmtune
from llmtune.contract.errors import DataError, LoadError, PlanError
from llmtune.inference.reward import rewards_of_rows
from llmtune.testing import running
from llmtune.testing.points.reward_config import Judge
from llmtune.testing.tiny import tiny_model_folder, tiny_tokenizer
from tests.spawn import in_ranks

BNB = {"name": "bnb", "quantization_bit": 4}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": "lora"},
    "qlora": {"peft_config": "lora", "quant_config": BNB},
}
LAYOUTS: dict[str, dict[str, Any]] = {"padded": {}, "flat": {"kernel_config": {"name": "auto"}}}


def trained(folder: Path, method: str, **more: Any) -> llmtune.Run:
    """A run of stage rm."""
    given = {"learning_rate": 0.01, "max_steps": 3, "output_dir": str(folder / f"rm-{method}"), **METHODS[method]}
    return llmtune.train(running.tiny_recipe(folder, kind="preference", stage_config="rm", **{**given, **more}))


def keys(folder: Path, reward: Any, **more: Any) -> dict[str, Any]:
    """A recipe whose answers a reward model judges, two at a time."""
    judge = {"name": "model", "batch_size": 2, "reward_model": str(reward)}
    if isinstance(reward, dict):
        judge = {**judge, **reward}
    given = {"stage_config": "reference_answers", "reward_config": judge, "max_steps": 2, **more}
    return running.tiny_recipe(folder, kind="prompt", **given)


def conversations(judge: Judge) -> list[list[dict[str, str]]]:
    """What the answers of a judge end."""
    asked = [json.loads(row)["prompt"] for row in Path(str(judge.plan.recipe.data.dataset)).read_text().splitlines()]
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": each.answer}]
        for question, each in zip(asked, judge.answers, strict=False)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_asked_as_it_would_answer_itself(method: str, tmp_path: Path) -> None:
    run = trained(tmp_path, method)
    for layout, more in LAYOUTS.items():
        judge = Judge(keys(tmp_path, run.output_dir, **more))
        assert judge.plan.data.batches.flat == (layout == "flat")
        expected = [run.reward(messages) for messages in conversations(judge)]
        assert len(set(expected)) == len(expected) and judge.answers[-1].cut
        assert judge.scores(judge.answers) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert len(judge.scores([])) == 0


def test_transformers_gives_the_same_numbers_of_what_is_exported(tmp_path: Path) -> None:
    exported = trained(tmp_path, "lora").export(tmp_path / "merged", infer_dtype="float32")
    judge = Judge(keys(tmp_path, exported))
    theirs, tokenizer = AutoModelForSequenceClassification.from_pretrained(exported), judge.plan.model.tokenizer
    ids = [tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in conversations(judge)]
    with torch.no_grad():
        expected = [theirs(input_ids=torch.tensor([row])).logits.item() for row in ids]
    assert judge.scores(judge.answers) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_text_that_ends_with_the_padding_token_is_read_as_transformers_does(tmp_path: Path) -> None:
    """The template writes nothing after `<|im_end|>`, which here pads, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}")
    folder = tiny_model_folder(tmp_path, initializer_range=0.2)
    tokenizer.save_pretrained(folder)
    run = trained(tmp_path, "full")
    judge = Judge(keys(tmp_path, run.output_dir))
    messages = conversations(judge)
    assert tokenizer.apply_chat_template(messages[0], tokenize=False).endswith("<|im_end|>")
    expected = [run.reward(each) for each in messages]
    assert judge.scores(judge.answers) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("case", ["adapter", "base and adapter", "on the trained base"])
def test_adapters_are_named_in_several_ways(case: str, tmp_path: Path) -> None:
    run = trained(tmp_path, "lora")
    adapter, base = run.output_dir / "model", tmp_path / "tiny-llama"
    reward = {
        "adapter": {"reward_model": str(adapter), "reward_model_type": "lora"},
        "base and adapter": {"reward_model": str(base), "reward_model_adapters": str(adapter)},
        "on the trained base": {"reward_model": str(adapter)},
    }[case]
    if case == "on the trained base":  # PEFT need not say which base it was
        about = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": None}))
    judge = Judge(keys(tmp_path, reward))
    expected = [run.reward(messages) for messages in conversations(judge)]
    assert judge.scores(judge.answers) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def found(given: dict[str, Any]) -> list[float]:
    """What steps report of their rewards."""
    return [row["rewards/model"] for row in running.train(given).metrics]


@pytest.mark.parametrize("bits", [None, 4])
def test_runs_are_alike_on_two_ranks(bits: int | None, tmp_path: Path) -> None:
    reward = {"reward_model": str(trained(tmp_path, "lora").output_dir), "reward_model_quantization_bit": bits}
    stage = {"name": "grpo", "max_new_tokens": 6, "num_generations": 2}
    given = keys(tmp_path, reward, stage_config=stage, peft_config="lora")
    expected = found({**given, "output_dir": str(tmp_path / "one")})
    for init in ("init_on_meta", "init_on_rank0"):
        more = {"init_config": init, "gradient_accumulation_steps": 1, "output_dir": str(tmp_path / init)}
        for rank in in_ranks(2, tmp_path / f"ranks-{init}", found, {**given, **more}):
            assert rank == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_plan_shows_the_reward_model_and_counts_its_weights(tmp_path: Path) -> None:
    run = trained(tmp_path, "full")
    alone = llmtune.plan(keys(tmp_path, run.output_dir, stage_config=GRPO, reward_config="rule"))
    both = llmtune.plan(keys(tmp_path, run.output_dir, stage_config=GRPO))
    (name,) = both.further
    assert f"Reward      {run.output_dir}/model, " in str(both)
    weights = 4 * both.further[name].parameters()[1]
    assert both.cost.memory.most.weights == pytest.approx(alone.cost.memory.most.weights + weights, rel=0.01)


GRPO = {"name": "grpo", "max_new_tokens": 4, "num_generations": 2}


def test_what_is_no_reward_model_is_told_before_weights_are_read(tmp_path: Path) -> None:
    def refused(reward: Any, kind: type[Exception] = PlanError) -> str:
        with pytest.raises(kind) as error:
            llmtune.plan(keys(tmp_path, reward, stage_config=GRPO))
        return str(error.value)

    speaker = tmp_path / "speaker"
    trained(speaker, "lora")
    base = speaker / "tiny-llama"
    said = refused(base)
    assert said.startswith("reward_config model: reward_model: ")
    assert "has no trained head of a sequence classifier (LlamaForCausalLM), and no adapter brings one" in said
    sft = llmtune.train(
        running.tiny_recipe(tmp_path, peft_config="lora", max_steps=1, output_dir=str(tmp_path / "sft"))
    )
    assert "has no trained head" in refused(sft.output_dir)
    assert "there is no folder" in refused(tmp_path / "none", LoadError)
    run = trained(tmp_path, "full")
    said = refused({"reward_model": str(run.output_dir), "reward_model_type": "lora"})
    assert f"reward_model_type: found lora, but {run.output_dir} is no adapter; leave the key out" in said
    adapter = speaker / "rm-lora"
    said = refused({"reward_model": str(adapter), "reward_model_adapters": str(adapter)})
    assert "reward_model_adapters: " in said and "is an adapter already" in said
    about = run.output_dir / "model" / "config.json"
    config = json.loads(about.read_text())
    about.write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}))
    assert "has a head with 2 outputs, and a reward is one number" in refused(run.output_dir)
    about.write_text(json.dumps(config))
    tiny_tokenizer(vocab_size=300).save_pretrained(run.output_dir / "model")
    assert "has another vocabulary (300 tokens) than the trained model" in refused(run.output_dir)
    (run.output_dir / "model").rename(run.output_dir / "gone")
    assert f"the run {run.output_dir} has saved no model yet" in refused(run.output_dir)


def test_a_head_that_the_files_say_they_have_must_be_there(tmp_path: Path) -> None:
    """transformers would start it from random numbers."""
    folder = tiny_model_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    other = {**config, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}}
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(LoadError, match=r"missing: score\.weight"):
        running.start(keys(tmp_path / "run", folder))


@pytest.mark.parametrize("spread", [{"tp_size": 2}, {"dp_replicate_size": 2}, {"offload_params": True}], ids=str)
def test_a_reward_model_is_spread_like_the_trained_one(spread: dict[str, Any], tmp_path: Path) -> None:
    given = keys(tmp_path, trained(tmp_path, "lora").output_dir, stage_config=GRPO, max_steps=1)
    expected = found({**given, "output_dir": str(tmp_path / "one")})
    micros = 2 if "tp_size" in spread else 1
    more = {"dist_config": {"name": "fsdp2", **spread}, "gradient_accumulation_steps": micros}
    for rank in in_ranks(2, tmp_path / "ranks", found, {**given, **more, "output_dir": str(tmp_path / "two")}):
        assert rank == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_row_that_gets_no_reward_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of those that are longer than `cutoff_len`, a part would get another reward."""
    run = trained(tmp_path, "full", cutoff_len=128, max_steps=1)
    rows = [{"prompt": "Who?" * times, "chosen": "It is I.", "rejected": "No."} for times in (1, 200, 2)]
    (tmp_path / "some.json").write_text(json.dumps(rows))
    place = str(tmp_path / "some.json")
    with pytest.raises(DataError, match=r"some.json:row 2: too long: has \d+ tokens, allowed are cutoff_len=128"):
        list(rewards_of_rows(run.output_dir, place))
    found = list(rewards_of_rows(run.output_dir, place, on_bad_record="skip"))
    assert [row["row"].rpartition(":")[2] for row in found] == ["row 1", "row 3"]
    assert "rows without a reward: too long 1" in capsys.readouterr().err
    assert len(list(rewards_of_rows(run.output_dir, place, cutoff_len=2048))) == 3
