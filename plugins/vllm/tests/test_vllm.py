"""`engine_config: vllm` against a stand-in of `vllm serve`, whose answers are those of transformers and PEFT."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest
import torch
from llmtune_vllm import VllmConfig, build
from llmtune_vllm.server import VllmLost, VllmServer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import llmtune
from llmtune import AnswerRequest, GenerateConfig, PlanError, ServedModel
from llmtune.testing import Law, in_ranks, laws, running, tiny_model, tiny_tokenizer

STAND_IN = Path(__file__).parent / "stand_in_vllm.py"
GREEDY = GenerateConfig(do_sample=False, max_new_tokens=6)
PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43], [100, 7]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An executable `vllm`."""
    file = tmp_path_factory.mktemp("bin") / "vllm"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    file.chmod(0o755)
    return str(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, `model`, and an adapter for it, `adapter`."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), initializer_range=0.5).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def running_server(files: Path) -> Iterator[str]:
    """The address of a server that somebody else has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(files / "model"), "--host", "127.0.0.1", "--port", str(port), "--enable-lora"]
    words += ["--max-lora-rank", "8", "--max-loras", "4"]
    env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": "theirs"}
    process = subprocess.Popen([sys.executable, str(STAND_IN), *words], env=env)
    try:
        until_healthy(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def until_healthy(url: str, process: Any) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError("the stand-in has ended")


def gone(pids: list[int], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def served(files: Path, **more: Any) -> ServedModel:
    return ServedModel(name="model", folder=str(files / "model"), load=lambda: pytest.fail("weights were read"), **more)


def greedy(model: Any, prompt: list[int], tokens: int = 6) -> tuple[int, ...]:
    """transformers' own answer."""
    said = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens, eos_token_id=[2], pad_token_id=0
    )
    return tuple(said[0, len(prompt) :].tolist())


@pytest.mark.parametrize("law", laws("engine_config", "vllm", ranks=False), ids=str)
def test_contract(law: Law, files: Path, running_server: str, tmp_path: Path) -> None:
    given = {"vllm_server_base_url": running_server, "vllm_api_key": "theirs"}
    (tmp_path / law.__name__).mkdir()
    (tmp_path / law.__name__ / "model").symlink_to(files / "model")
    replace(law, subject=replace(law.subject, parameters=given))(tmp_path)


def test_answers_of_base_and_adapter_are_those_of_transformers_and_peft(files: Path, running_server: str) -> None:
    """The tokens, through the tokenizer of the run; and the block in which the base answers."""
    base = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), files / "adapter").eval()
    engine = build(VllmConfig(vllm_server_base_url=f"{running_server}/v1", vllm_api_key="theirs"))
    engine.open(served(files, adapter=str(files / "adapter")))
    try:
        said = engine.generate(base, tiny_tokenizer(), PROMPTS, GREEDY, stop=[2])
        with engine.without_adapter():
            plain = engine.generate(base, tiny_tokenizer(), PROMPTS, GREEDY, stop=[2])
        with pytest.raises(llmtune.ContextFull, match="vLLM has room for 128"):
            engine.generate(base, tiny_tokenizer(), [[5] * 128], GREEDY)
        with pytest.raises(PlanError, match=r"num_beams: found 2, .* set 1"):
            engine.generate(base, tiny_tokenizer(), PROMPTS, replace(GREEDY, num_beams=2))
    finally:
        engine.close()
    assert [one.ids for one in said] == [greedy(adapted, prompt) for prompt in PROMPTS]
    assert [one.ids for one in plain] == [greedy(base, prompt) for prompt in PROMPTS]
    assert [one.ids for one in said] != [one.ids for one in plain]


def test_requests_that_come_one_by_one_name_base_and_adapter(files: Path, running_server: str) -> None:
    """Streamed tokens are transformers' own, with their log-probabilities; one that nobody waits for is left."""
    base = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), files / "adapter").eval()
    engine = build(VllmConfig(vllm_server_base_url=running_server, vllm_api_key="theirs"))
    serving = engine.serve([replace(served(files), name="base"), served(files, adapter=str(files / "adapter"))])
    came: dict[str, Any] = {name: SimpleQueue() for name in ("base", "model", "long", "weighed")}
    asked = AnswerRequest(
        model="base", prompt_ids=(5, 6, 7), config=GREEDY, room=6, seed=1, stop=frozenset([2]), top_logprobs=2
    )
    try:
        leave = serving.submit(replace(asked, room=400, stop=frozenset()), came["long"].put)
        for name in ("base", "model"):
            serving.submit(replace(asked, model=name), came[name].put)
        weighed = replace(asked, presence_penalty=2.0, frequency_penalty=1.5, logit_bias={9: 100.0, 8: 99.0})
        serving.submit(weighed, came["weighed"].put)
        names = ("base", "model", "weighed")
        said = {name: list(iter(lambda name=name: came[name].get(timeout=60), None)) for name in names}
        leave()
    finally:
        serving.close()
    assert tuple(token.id for token in said["base"]) == greedy(base, [5, 6, 7])
    assert tuple(token.id for token in said["model"]) == greedy(adapted, [5, 6, 7])
    with torch.no_grad():
        logs = base(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    first, likeliest = said["base"][0], logs.topk(2)
    assert first.logprob == pytest.approx(logs[first.id].item(), abs=1e-5)
    assert [token for token, _ in first.top] == likeliest.indices.tolist()
    assert [log for _, log in first.top] == pytest.approx(likeliest.values.tolist(), abs=1e-5)
    assert came["long"].qsize() < 400
    assert {token.id for token in said["weighed"]} == {8, 9}


def on_rank(url: str, keys: dict[str, Any], model: str) -> list[Any]:
    plan, _ = running.build(keys)
    engine = build(VllmConfig(vllm_server_base_url=url, vllm_api_key="theirs"))
    engine.open(ServedModel(name="model", folder=model, load=lambda: None))
    own = PROMPTS[:1] if plan.ranks.first else PROMPTS
    config = GenerateConfig(max_new_tokens=6, temperature=1.5, top_p=1.0)
    try:
        return engine.generate(plan.module, plan.tokenizer, own, config, seeds=range(len(own)), stop=[2])
    finally:
        engine.close()


def test_one_rank_asks_for_all(files: Path, running_server: str, tmp_path: Path) -> None:
    keys = running.tiny_recipe(tmp_path)
    first, second = in_ranks(2, tmp_path / "two", on_rank, running_server, keys, str(files / "model"))
    assert first == second[:1] and [list(one.prompt_ids) for one in second] == PROMPTS
    assert len({one.ids for one in second}) == len(PROMPTS)


def test_chat_and_predictions_need_no_weights_here(files: Path, running_server: str, tmp_path: Path) -> None:
    """Both answer as with `engine_config: transformers`, and the adapter is switched off in a block."""
    engine = {"name": "vllm", "vllm_server_base_url": running_server, "vllm_api_key": "theirs"}
    drawn: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "device": "cpu"}
    chats = [llmtune.open_chat(files / "adapter", engine_config=e, **drawn) for e in (engine, "transformers")]
    assert next(chats[0].model.parameters()).device.type == "meta"
    theirs, ours = (["".join(chat.stream("Who are you?")).strip(), chat.ask("Why?")] for chat in chats)
    assert theirs == ours
    for chat in chats:
        assert chat.base is not None
        chat.clear()
        chat.around = chat.base
    assert chats[0].ask("Who are you?") == chats[1].ask("Who are you?") != ours[0]
    data = tmp_path / "questions.jsonl"
    data.write_text('{"instruction": "Who are you?", "output": "x"}\n{"instruction": "Why?", "output": "y"}\n')
    found = [
        llmtune.predict(files / "adapter", dataset=str(data), output_dir=tmp_path / name, engine_config=e, **drawn).rows
        for name, e in (("theirs", engine), ("ours", "transformers"))
    ]
    assert found[0] == found[1] and len(found[0]) == 2
    with pytest.raises(PlanError, match=r"quant_config .* stores it in fewer bits than its files; quant_config=null"):
        llmtune.open_chat(files / "model", engine_config=engine, quant_config={"name": "bnb"}, **drawn)


def test_roll_outs_come_from_the_adapter_as_it_is(
    files: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step greedy answers through the server are those of the model in memory, whose adapter has learnt, and
    those that are drawn come with the model's log-probabilities, so that there is nothing to correct."""
    from llmtune_vllm.engine import VllmEngine

    usual, greedy_answers = VllmEngine.generate, []

    def compared(self: Any, model: Any, tokenizer: Any, prompts: Any, config: Any, **more: Any) -> Any:
        plain = replace(config, do_sample=False)
        said = usual(self, model, tokenizer, prompts, plain, **more)
        assert said == llmtune.generate(model, tokenizer, prompts, plain, **more)
        greedy_answers.append([one.ids for one in said])
        return usual(self, model, tokenizer, prompts, config, **more)

    monkeypatch.setattr(VllmEngine, "generate", compared)
    told = tmp_path / "told.json"
    monkeypatch.setenv("STAND_IN_TOLD", str(told))
    monkeypatch.setenv("RANK", "0")
    recipe = running.tiny_recipe(
        tmp_path, kind="prompt", model=str(files / "model"), reward_config="reference", max_steps=2,
        stage_config={"name": "grpo", "num_generations": 2, "max_new_tokens": 4, "temperature": 1.5}, learning_rate=0.1,
        peft_config={"name": "lora", "r": 4, "lora_dropout": 0.0, "target_modules": "all"},
        per_device_train_batch_size=2, disable_shuffling=True,
        engine_config={
            "name": "vllm", "vllm_command": command, "vllm_max_lora_rank": 8, "vllm_enforce_eager": True,
            "vllm_config": {"tensor_parallel_size": 1}, "vllm_devices": "7",
        },
    )  # fmt: skip
    trained = running.train(recipe)
    for row in trained.metrics:
        assert row["sampling/logp_difference"] < 1e-4 and row["sampling/ratio"] == pytest.approx(1, abs=1e-4)
    assert any("lora_B" in name and tensor.any() for name, tensor in trained.tensors.items())
    assert len(greedy_answers) >= 2 and greedy_answers[0] != greedy_answers[-1]
    words = json.loads(told.read_text())
    assert gone(words["pids"])
    assert words["env"].keys() >= {"VLLM_API_KEY"} and words["env"]["CUDA_VISIBLE_DEVICES"] == "7"
    assert "RANK" not in words["env"]
    joined = " ".join(words["words"])
    for part in (
        f"serve {files / 'model'} --served-model-name base --dtype float32 --max-model-len 512",
        "--gpu-memory-utilization 0.9 --generation-config vllm --enforce-eager --enable-lora --max-lora-rank 8",
        "--logprobs-mode processed_logprobs --tensor-parallel-size 1 --host 127.0.0.1 --port",
    ):
        assert part in joined


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_config": None}, "all of its weights train"),
        ({"peft_config": {"name": "lora", "use_dora": True}}, "two matrices of LoRA"),
        ({"peft_config": {"name": "lora", "r": 64}}, "vllm_max_lora_rank: found 32, but peft_config trains rank 64"),
        ({"peft_config": "lora", "engine_config": {"name": "vllm", "vllm_command": "no-vllm"}}, "pip install vllm"),
        (
            {"peft_config": "lora", "engine_config": {"name": "vllm", "vllm_config": {"port": 1}}},
            "vllm_config: port is set by llmtune",
        ),
    ],
)
def test_what_vllm_cannot_roll_out_is_told_before(
    changes: dict[str, Any], told: str, command: str, tmp_path: Path
) -> None:
    engine = {"name": "vllm", "vllm_command": command}
    stage = {"name": "grpo", "num_generations": 2}
    given = {"reward_config": "reference", "stage_config": stage, "engine_config": engine, **changes}
    with pytest.raises(llmtune.LlmtuneError, match=told):
        running.plan(running.tiny_recipe(tmp_path, kind="prompt", **given))


def test_ppo_rolls_out_beside_its_value_head(command: str, tmp_path: Path) -> None:
    given = {"reward_config": "reference", "stage_config": "ppo", "peft_config": "lora"}
    engine = {"name": "vllm", "vllm_command": command}
    assert running.plan(running.tiny_recipe(tmp_path, kind="prompt", engine_config=engine, **given)).steps


def test_a_server_that_tells_other_probabilities_than_it_draws_with_rolls_nothing_out(
    files: Path, running_server: str
) -> None:
    engine = build(VllmConfig(vllm_server_base_url=running_server, vllm_api_key="theirs"))
    with pytest.raises(PlanError, match="before temperature.*start it with --logprobs-mode processed_logprobs"):
        engine.open(served(files), write=lambda folder: None)


def start(command: str, files: Path, **keys: Any) -> VllmServer:
    return VllmServer(VllmConfig(vllm_command=command, **keys), str(files / "model"), "float32")


def test_a_server_that_does_not_start_is_told_with_its_log(
    files: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told.json"
    monkeypatch.setenv("STAND_IN_TOLD", str(told))
    for fault, keys, sentence in (
        ("ends", {}, r"(?s)ended before it was ready.*\n  ValueError: Free memory on device"),
        ("never", {"vllm_server_timeout": 1.0}, r"(?s)not ready after 1 s \(vllm_server_timeout\).*Loading weights"),
    ):
        monkeypatch.setenv("STAND_IN_FAULT", fault)
        with pytest.raises(PlanError, match=sentence):
            start(command, files, **keys)
        assert gone(json.loads(told.read_text())["pids"])
    with pytest.raises(PlanError, match=r"pip install vllm.*vllm_command: ~/vllm-env/bin/vllm"):
        start("no-such-vllm", files)
    with pytest.raises(PlanError, match=r"vllm_server_base_url: nothing answers at http://127.0.0.1:9/health"):
        VllmServer(VllmConfig(vllm_server_base_url="http://127.0.0.1:9"), str(files / "model"), "auto")
    with pytest.raises(ValueError, match="found 127.0.0.1:9, allowed is an address that begins with http://"):
        VllmConfig(vllm_server_base_url="127.0.0.1:9")


KILLED = """
import os, signal, sys
from llmtune_vllm import VllmConfig
from llmtune_vllm.server import VllmServer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
server = VllmServer(VllmConfig(vllm_command=sys.argv[1]), sys.argv[2], "float32")
print("ready", flush=True)
if sys.argv[3] == "exit":
    sys.exit()
signal.pause()
"""


@pytest.mark.parametrize("how", ["KILL", "TERM", "INT", "exit"])
def test_the_server_and_its_children_end_however_its_owner_ends(
    how: str, files: Path, command: str, tmp_path: Path
) -> None:
    told = tmp_path / "told.json"
    env = {**os.environ, "STAND_IN_TOLD": str(told), "STAND_IN_FAULT": "refuses"}
    words = [sys.executable, "-c", KILLED, command, str(files / "model"), how]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
        pids = json.loads(told.read_text())["pids"]
        assert len(pids) == 2 and (how == "exit" or all(alive(pid) for pid in pids))
        if how != "exit":
            owner.send_signal(getattr(signal, f"SIG{how}"))
    assert gone(pids)


@pytest.mark.parametrize(
    ("fault", "keys", "told"),
    [
        ("refuses", {}, r"vLLM refused /v1/completions \(400\): no"),
        ("slow", {"vllm_answer_timeout": 0.5}, r"answered none of 4 prompts in 0.5 s; raise vllm_answer_timeout"),
        ("dies", {}, r"(?s)does not answer: it has ended.*RuntimeError: CUDA error: out of luck"),
    ],
)
def test_a_server_that_does_not_answer_is_told(
    fault: str, keys: Any, told: str, files: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    engine = build(VllmConfig(vllm_command=command, **keys))
    engine.open(served(files))
    base = tiny_model(vocab_size=len(tiny_tokenizer()))
    try:
        with pytest.raises(VllmLost, match=told):
            engine.generate(base, tiny_tokenizer(), PROMPTS, GREEDY)
    finally:
        engine.close()


def test_another_model_a_wrong_key_and_adapters_it_would_misread_are_refused(
    files: Path, running_server: str, tmp_path: Path
) -> None:
    engine = build(VllmConfig(vllm_server_base_url=running_server, vllm_api_key="theirs"))
    with pytest.raises(PlanError, match=rf"has {files / 'model'}, wanted is {tmp_path}; start it with `vllm serve"):
        engine.open(replace(served(files), folder=str(tmp_path)))
    with pytest.raises(VllmLost, match="401.*set engine_config.vllm_api_key"):
        build(VllmConfig(vllm_server_base_url=running_server)).open(served(files))
    config = json.loads((files / "adapter" / "adapter_config.json").read_text())
    for change, told in (
        ({"use_dora": True}, "has use_dora"),
        ({"alpha_pattern": {"q_proj": 2}}, "has alpha_pattern"),
        ({"bias": "all"}, "no biases"),
        ({"peft_type": "OFT"}, "holds OFT"),
        ({"r": 64}, "vllm_max_lora_rank: found 32, but .* has rank 64"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(PlanError, match=told):
            engine.open(served(files, adapter=str(tmp_path)))
    with pytest.raises(PlanError, match="none was opened"):
        engine.generate(None, None, PROMPTS, GREEDY)
