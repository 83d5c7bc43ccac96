"""Whatever the way weights arrive, it is the model of the folder: its buffers, its code, its types, nothing missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtune
from llmtune.contract.errors import LoadError
from tests.guards import plan_here
from tests.runs import recipe
from tests.spawn import in_ranks
from tests.tiny import tiny_model_folder

WAYS = ("init_on_meta", "init_on_rank0", "init_on_default")
ON_QUERIES = {"name": "lora", "r": 4, "target_modules": "q_proj"}
BIAS = "e_score_correction_bias"
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


def built(keys: dict[str, Any]) -> dict[str, torch.Tensor] | str:
    """Every parameter and buffer of the recipe's model, whole; or what was wrong with the weights."""
    from llmtune.distributed.placement import full
    from llmtune.model.edits import named_tensors
    from llmtune.training.building import build_objective

    plan = plan_here(keys)
    try:
        build_objective(plan.model)
    except LoadError as error:
        return str(error)
    return {name: full(tensor) for name, tensor in named_tensors(plan.model.module).items()}


def all_built(recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: built(keys) for name, keys in recipes.items()}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose router has a bias that no gradient moves: a persistent buffer of the checkpoint."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("routed"), "glm4_moe", **EXPERTS)
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith(BIAS))
    weights[name] = torch.tensor([7.0009765625, -1.0, 0.25, 3.1415927])  # the first is no bfloat16
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without one of its weights."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("cut"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def recipes(routed: Path, cut: Path, tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for way in WAYS:
        common = {"init_config": way}
        found |= {
            f"routed-{way}": recipe(str(routed), chats, root / "r", **common, peft_config=None),
            f"bf16-{way}": recipe(str(routed), chats, root / "b", **common, bf16=True, peft_config=ON_QUERIES),
            f"cut-{way}": recipe(str(cut), chats, root / "c", **common),
            f"cut_nf4-{way}": recipe(str(cut), chats, root / "n", **common, quant_config="bnb"),
        }
    return found


@pytest.fixture(scope="module")
def two(recipes: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(2, tmp_path_factory.mktemp("two"), all_built, recipes)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_buffers_of_the_checkpoint_and_computed_ones_arrive(
    way: str, ranks: int, recipes: Any, two: list[dict[str, Any]], routed: Path
) -> None:
    """Router biases are read, rotary frequencies computed; neither is memory nobody wrote to."""
    from transformers import AutoModelForCausalLM

    from llmtune.model.edits import named_tensors

    expected = named_tensors(AutoModelForCausalLM.from_pretrained(routed, dtype=torch.float32))
    assert any(name.endswith(BIAS) for name in expected) and any(name.endswith("inv_freq") for name in expected)
    for found in two if ranks == 2 else [all_built({f"routed-{way}": recipes[f"routed-{way}"]})]:
        tensors = found[f"routed-{way}"]
        assert isinstance(tensors, dict), tensors
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor.detach()), name


@pytest.mark.parametrize("way", WAYS)
def test_what_a_model_keeps_in_float32_stays_so(way: str, two: list[dict[str, Any]], routed: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmtune.model.edits import named_tensors

    expected = named_tensors(AutoModelForCausalLM.from_pretrained(routed, dtype=torch.bfloat16))
    for found in two:
        tensors = found[f"bf16-{way}"]
        assert isinstance(tensors, dict), tensors
        for name, tensor in expected.items():
            here = tensors.get(name, tensors.get(name.replace("q_proj.", "q_proj.base_layer.")))
            assert here.dtype == tensor.dtype, name
            assert torch.equal(here, tensor.detach()), name


def test_what_is_saved_has_the_type_it_says(routed: Path, chats: str, tmp_path: Path) -> None:
    """Trained in mixed precision: weights in bfloat16, the router's bias exactly as it was."""
    keys = recipe(str(routed), chats, tmp_path / "run", bf16=True, peft_config=None, max_steps=1, learning_rate=1e-3)
    folder = llmtune.train(keys).output_dir / "model"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = (load_file(path / "model.safetensors") for path in (routed, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in after if name.endswith(BIAS))
    for name, tensor in after.items():
        assert tensor.dtype == (torch.float32 if name.endswith(BIAS) else torch.bfloat16), name


@pytest.mark.parametrize("base", ["cut", "cut_nf4"])
@pytest.mark.parametrize("way", WAYS)
def test_a_missing_weight_stops_every_rank(way: str, base: str, recipes: Any, two: list[dict[str, Any]]) -> None:
    for found in (*two, all_built({f"{base}-{way}": recipes[f"{base}-{way}"]})):
        said = found[f"{base}-{way}"]
        assert isinstance(said, str) and "missing: model.layers.1.mlp.up_proj.weight" in said


@pytest.mark.parametrize("way", WAYS)
def test_a_new_classification_head_is_initialised(way: str, tiny_llama: str) -> None:
    """No checkpoint of a language model holds one: it is small, random, and a function of the seed."""
    keys = {"model": tiny_llama, "device": "cpu", "model_class": "cls", "init_config": way}
    heads = [llmtune.build({**keys, "seed": seed})[0].score.weight.detach() for seed in (1, 1, 2)]
    assert heads[0].isfinite().all() and 0.01 < heads[0].std() < 0.03
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_with_a_new_head_the_rest_has_to_be_there(cut: Path) -> None:
    with pytest.raises(LoadError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        llmtune.build({"model": str(cut), "device": "cpu", "model_class": "cls"})


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **keywords):
        result = super().forward(*arguments, **keywords)
        result.logits = result.logits * 2
        return result
"""


@pytest.fixture
def own_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose folder brings its own class and its own generation settings."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.77, "eos_token_id": [2, 0], "max_new_tokens": 17}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_way_builds_the_folders_own_model(way: str, own_code: Path, chats: str, tmp_path: Path) -> None:
    """Its code (once trusted), its type, its generation settings: in memory, and in what is saved."""
    from transformers import AutoModelForCausalLM

    trusted = {"trust_remote_code": True, "init_config": way}
    path = tmp_path / "recipe.json"
    keys = recipe(str(own_code), chats, tmp_path / "run", **trusted, peft_config=None, max_steps=1, bf16=True)
    path.write_text(json.dumps(keys))
    run = llmtune.train(path)
    saved = AutoModelForCausalLM.from_pretrained(run.output_dir / "model", trust_remote_code=True, dtype="auto")
    assert type(saved).__name__ == "OwnModel" and saved.dtype == torch.bfloat16
    generation = json.loads((run.output_dir / "model" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["eos_token_id"]) == (0.77, [2, 0])
    model, _ = llmtune.build({"model": str(own_code), "device": "cpu"}, **trusted)
    expected = AutoModelForCausalLM.from_pretrained(own_code, trust_remote_code=True)
    ids = torch.arange(8)[None]
    assert type(model).__name__ == "OwnModel" and torch.equal(model.eval()(ids).logits, expected(ids).logits)
    assert model.generation_config.temperature == 0.77
