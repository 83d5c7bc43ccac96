"""What a reward may say of answers, and what the core makes of all else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from llmtune.contract.errors import PluginError
from llmtune.contract.generation import Completion
from llmtune.contract.records import Plugin
from llmtune.recipe.parts import BuiltPlugin
from llmtune.training.rollouts import checked

PART = BuiltPlugin(
    point="reward_config", plugin=Plugin(name="acme", config=object, build=object, summary="Any"), package="acme 1.0",
    full_label='reward_config: "acme" of acme 1.0', config=None, built=None,
)  # fmt: skip
ANSWERS = [Completion(prompt="?", answer=text, prompt_ids=(1,), ids=(2,), cut=False, columns={}) for text in "ab"]


@pytest.mark.parametrize("scores", [[1, 0.5], (True, 0.5), np.array([1.0, 0.5]), torch.tensor([1.0, 0.5])])
def test_numbers_of_any_kind_are_taken(scores: Any) -> None:
    assert checked(PART, ANSWERS, scores) == [1.0, 0.5]


def test_nothing_to_say_is_no_number() -> None:
    one, other = checked(PART, ANSWERS, [None, -2.0])
    assert math.isnan(one) and other == -2.0


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (None, "score gave None, allowed is"),
        ([1.0, "good"], "score gave [1.0, 'good'], allowed is"),
        ([1.0], "score gave 1 numbers for 2 answers, allowed is"),
        ([1.0, math.nan], "score gave nan for the answer 'b' to the prompt that ends in '?', allowed is"),
        ([math.inf, 1.0], "score gave inf for the answer 'a' to the prompt that ends in '?', allowed is"),
        ([1e39, 1.0], "score gave 1e+39 for the answer 'a' to the prompt that ends in '?', allowed is"),
    ],
)
def test_what_is_no_number_is_told(scores: Any, words: str) -> None:
    with pytest.raises(PluginError) as error:
        checked(PART, ANSWERS, scores)
    assert str(error.value).startswith(f'reward_config: "acme" of acme 1.0: {words}')
    assert str(error.value).endswith("nothing was learnt from this step")
