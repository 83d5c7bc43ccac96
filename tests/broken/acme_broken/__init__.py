"""Parts that are wrong in one way each, named for it; most are a part of acme_tuning or the plainest one, spoilt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from llmtune import Ge, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class Empty:
    """No keys."""


@dataclass(frozen=True, kw_only=True)
class Undocumented:
    """Says nothing of its key."""

    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OutOfBounds:
    """Its default is not allowed."""

    rate: Annotated[float, Ge(0)] = -1.0
    """A number."""


@dataclass(kw_only=True)
class Mutable:
    """Can be changed."""

    rate: float = 1.0
    """A number."""


POINTS = {
    "quant_config": (
        "forgets_a_rule", "restores_the_wrong", "scales_by_its_piece", "gathers_on_one_rank", "computes_otherwise",
        "says_no_word",
    ),
    "peft_config": (
        "trains_the_base", "trains_what_it_does_not_use", "moves_frozen_weights", "starts_at_random", "starts_by_rank",
        "merges_nothing", "remembers_outside", "opens_otherwise", "forgets_to_save", "saves_the_base_too",
        "is_of_no_kind",
    ),
    "kernel_config": ("wrong_gradient", "wrong_answer", "does_nothing", "mixes_documents"),
    "stage_config": ("takes_the_mean", "detaches_a_part", "counts_padding", "nudges_weights", "climbs"),
    "dist_config": ("sums_gradients", "loses_ranks"),
    "optim_config": ("has_its_own_rate", "decays_all", "hides_its_state", "goes_uphill", "drops_vectors"),
    "lr_scheduler_config": ("doubles", "counts_calls", "divides_by_zero", "starts_low", *(
        "undocumented", "out_of_bounds", "mutable", "draws_numbers", "sums_up_nothing", "has_no_entry",
    )),
    "logger_config": (
        "hates_nan", "writes_early", "needs_a_start", "leaves_home", "hopes_for_the_best", "quotes_the_first_word",
        "paints_once", "wants_the_main_thread",
    ),
    "init_config": ("shifts_rows", "rounds"),
    "engine_config": (
        "takes_chances", "sees_its_neighbours", "ignores_seeds", "never_ends", "keeps_silent", "stays_in_eval",
        "draws_by_rank",
    ),
    "hub_config": (
        "cannot_travel", "states_old_hashes", "fetches_everything", "forgets_what_it_fetched", "is_never_sure",
    ),
    "launch_config": ("forgets_the_last", "writes_to_describe", "swallows_failures", "forgets_who_it_is"),
    "reward_config": (
        "counts_to_infinity", "grades_on_a_curve", "grows_tired", "rolls_dice", "favours_large_crowds",
    ),
    "eval_config": (
        "names_nothing", "takes_the_mean_of_rows", "looks_at_padding", "switches_to_training", "sees_its_rank",
        "remembers_answers", "divides_by_words", "measures_nothing",
    ),
    "data_config": ("knows_no_kind", "lies_about_its_kind", "fails_on_gaps", "changes_rows", "counts_rows"),
}  # fmt: skip
CONFIGS = {"undocumented": Undocumented, "out_of_bounds": OutOfBounds, "mutable": Mutable}


def _builder(name: str) -> Callable[[Any], Any]:
    def build(config: Any) -> Any:
        import torch

        from acme_broken import edits, engines, evaluators, formats, hubs, launchers, others, rewards

        if name == "draws_numbers":
            torch.rand(1)
        made = "".join(word.title() for word in name.split("_"))
        modules = (edits, engines, evaluators, formats, hubs, launchers, others, rewards)
        return getattr(next(module for module in modules if hasattr(module, made)), made)()

    return build


def _plugins(point: str) -> list[Plugin]:
    gives = frozenset({"quantized_base"}) if point == "quant_config" else frozenset()
    made = [
        Plugin(name=name, config=CONFIGS.get(name, Empty), build=_builder(name), summary="Broken", gives=gives)
        for name in POINTS[point]
    ]
    spoilt = {"says_no_word": {"gives": frozenset()}, "sums_up_nothing": {"summary": ""}}
    return [dataclasses.replace(plugin, **spoilt.get(plugin.name, {})) for plugin in made]


@hookimpl
def init_config() -> list[Plugin]:
    return _plugins("init_config")


@hookimpl
def quant_config() -> list[Plugin]:
    return _plugins("quant_config")


@hookimpl
def peft_config() -> list[Plugin]:
    return _plugins("peft_config")


@hookimpl
def kernel_config() -> list[Plugin]:
    return _plugins("kernel_config")


@hookimpl
def stage_config() -> list[Plugin]:
    return _plugins("stage_config")


@hookimpl
def dist_config() -> list[Plugin]:
    return _plugins("dist_config")


@hookimpl
def optim_config() -> list[Plugin]:
    return _plugins("optim_config")


@hookimpl
def lr_scheduler_config() -> list[Plugin]:
    return _plugins("lr_scheduler_config")


@hookimpl
def logger_config() -> list[Plugin]:
    return _plugins("logger_config")


@hookimpl
def data_config() -> list[Plugin]:
    return _plugins("data_config")


@hookimpl
def engine_config() -> list[Plugin]:
    return _plugins("engine_config")


@hookimpl
def hub_config() -> list[Plugin]:
    return _plugins("hub_config")


@hookimpl
def launch_config() -> list[Plugin]:
    return _plugins("launch_config")


@hookimpl
def reward_config() -> list[Plugin]:
    return _plugins("reward_config")


@hookimpl
def eval_config() -> list[Plugin]:
    return _plugins("eval_config")
