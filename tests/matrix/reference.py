"""What each combination has to equal: one process of transformers and PEFT, trained by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import IA3Config, OFTConfig, PeftConfig, get_peft_model

import llmtune
from tests.by_hand import adapt_by_hand, base_by_hand, encoded, expand_by_hand, train_by_hand
from tests.matrix.axes import Combo
from tests.matrix.scene import Scene
from tests.matrix.stages import loss_of_stage

TUNERS: dict[str, Callable[[], PeftConfig]] = {
    "oft": lambda: OFTConfig(r=0, oft_block_size=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}
"""PEFT's own settings of the tuners; they start as the identity, so nothing is drawn."""
PROBE_IDS = torch.arange(3, 43).reshape(2, 20)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The reference's numbers."""

    numbers: list[tuple[float, float]]
    """(loss, gradient norm) of every step."""
    logits: torch.Tensor
    """Of the trained model."""
    before: torch.Tensor
    """Of the model before training."""


class References:
    """One for each (family, base, method, packing, optimizer, stage): nothing else may change a number."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._known: dict[tuple[Any, ...], Reference] = {}
        self._plans: dict[tuple[str, bool, str], Any] = {}
        self._starts: dict[str, dict[str, torch.Tensor]] = {}

    def of(self, combo: Combo) -> Reference:
        """The reference of `combo`, trained on first use."""
        key = (combo.family, combo.base, combo.method, combo.packing, combo.optimizer, combo.stage)
        if key not in self._known:
            self._known[key] = self._train(combo)
        return self._known[key]

    def _train(self, combo: Combo) -> Reference:
        keys = self.scene.recipe(combo, self.scene.root / "reference")
        model, peft = base_by_hand(keys, auto_class(self.scene, combo)), keys.get("peft_config")
        if peft and peft["name"] in ("freeze", "llama_pro"):
            if peft["name"] == "llama_pro":
                expand_by_hand(model)
            model.requires_grad_(False)
            model.get_submodule(self.scene.family(combo).layers)[-1].requires_grad_(True)
        elif peft and peft["name"] in ("oft", "peft"):
            model = get_peft_model(model, TUNERS[combo.method]())
        elif peft:
            model = adapt_by_hand(model, peft, self.starts(combo), self.scene.family(combo).targets)
        before = logits(model)
        loss_of = None
        if combo.stage != "sft":
            loss_of = loss_of_stage(combo.stage, model, encoded(keys["model"], Path(keys["dataset"]).read_text()))
        numbers = train_by_hand(keys, model, self._plan(combo, keys), loss_of)
        return Reference(numbers=numbers, logits=logits(model), before=before)

    def _plan(self, combo: Combo, keys: dict[str, Any]) -> Any:
        """For the order of rows, which is that of one process: the others must keep to it, whatever they train. Only
        other optimisers than torch's ask for more than that: what of this model trains."""
        if combo.optimizer != "adamw":
            return llmtune.plan(keys, nproc=combo.ranks)
        if (key := (combo.family, combo.packing, combo.stage)) not in self._plans:
            self._plans[key] = llmtune.plan(keys, nproc=combo.ranks)
        return self._plans[key]

    def starts(self, combo: Combo) -> dict[str, torch.Tensor]:
        """Where fresh adapters of this family start: a function of the seed and the name, so the same for all."""
        method = combo.method if combo.method == "experts" else "lora"
        key = f"{combo.family} {method}"
        if key not in self._starts:
            keys = self.scene.recipe(Combo(family=combo.family, method=method), self.scene.root / "starts")
            model, _ = llmtune.build(keys)
            self._starts[key] = {n: p.detach() for n, p in model.named_parameters() if "lora_A" in n}
        return self._starts[key]


def auto_class(scene: Scene, combo: Combo) -> Any:
    """transformers' class for the combination's model."""
    return getattr(transformers, scene.family(combo).auto)


def logits(model: Any) -> torch.Tensor:
    """Of two fixed rows. In training mode: on some CPUs bitsandbytes repacks weights in eval. There is no dropout."""
    model.train()
    with torch.no_grad():
        return model(input_ids=PROBE_IDS).logits


def reloaded_logits(scene: Scene, combo: Combo, run: Path) -> torch.Tensor:
    """Of the saved result, opened by transformers and PEFT alone."""
    keys = scene.recipe(combo, run)
    if (run / "model" / "adapter_config.json").exists():
        from peft import PeftModel

        return logits(PeftModel.from_pretrained(base_by_hand(keys, auto_class(scene, combo)), str(run / "model")))
    return logits(base_by_hand({"model": str(run / "model")}, auto_class(scene, combo)))
