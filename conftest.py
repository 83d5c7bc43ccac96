"""What holds for all tests, those of the plugins included: threads, processes, and the order of files."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

# Before torch is imported. Tests are many small tensors in up to four processes at once: with two threads each, on two
# cores, they wait for each other and take three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Numbers are compared to the digit, so the machine's CPU must not choose them. In the environment, for ranks and
# command lines that tests start.
os.environ["LLMTUNE_CPU_DTYPE"] = "float32"

# A run asks the disk some twenty times to write at once. What tests write has to survive no power cut.
os.fsync = lambda fd: None

_own_cache = None
if "LLMTUNE_CACHE" not in os.environ:  # the processes that test in parallel inherit it
    _own_cache = os.environ["LLMTUNE_CACHE"] = tempfile.mkdtemp(prefix="llmtune-cache-")
    # Here, as trackio reads it once, when whoever is first imports it: TRL does.
    os.environ["TRACKIO_DIR"] = os.path.join(_own_cache, "trackio")

MOST_WORKERS = 8
"""A test may start four ranks of 0.5 GB each, so more at once are a matter of memory."""

SLOW = (
    "test_matrix", "test_nodes", "test_cost", "test_docs_capabilities", "test_tensor_parallel",
    "test_media_training", "test_resume", "test_preferences_composed", "test_stranger", "test_trackers",
    "test_families", "test_testing", "test_precomputed", "test_api", "test_predict", "test_stop", "test_distribute",
    "test_torchvision", "test_media_spread", "test_context_parallel", "test_ray", "test_ppo", "test_expert_parallel",
    "test_media_rollouts_spread", "test_grpo", "test_optim_contract", "test_rm", "test_reward_models",
    "test_resume_ranks", "test_parity", "test_terminal", "test_further_models", "test_docs", "test_notebook",
    "test_stream_order", "test_page", "test_model_options", "test_lora_contract", "test_vllm", "test_audio_training",
    "test_media_families", "test_vocabulary", "test_ppo_results", "test_stream_runs", "test_benchmark", "test_claim",
    "test_media_rollouts", "test_tuners", "test_layerwise", "test_sharded", "test_precision", "test_optim",
    "test_evaluation_contract", "test_scaffold", "test_rewards_contract", "test_stream_faults", "test_generate",
    "test_bnb_contract", "test_badam", "test_media_pairs", "test_loading", "test_tuners_contract", "test_use",
    "test_kernels_contract", "test_bad_input", "test_stranger_rollouts", "test_dpo", "test_router_balance",
    "test_media_memory", "test_resume_origins", "test_kto", "test_exhausted", "test_packed_integers",
    "test_data_prepare", "test_slurm",
    "test_media_stages", "test_foreign_adapters", "test_launch", "test_source_remote", "test_serve",
    "test_media_answers", "test_guards_structure", "test_prequantised", "test_media_inputs", "test_media_predict",
    "test_data_pairs", "test_media_rollouts_rewards", "test_media_rollouts_trl", "test_guards_ranks",
    "test_serve_media", "test_media_talk", "test_lora_starts", "test_video_training", "test_media_preferences",
)  # fmt: skip
"""Files that take most of the time, the longest first: what `-m "not slow"` leaves out."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three processes for two cores where everything is tested, as tests wait for what they start for a third of their
    time; none besides this one where the command names tests."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + (cores + 1) // 2, MOST_WORKERS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Slow files are not read where none of their tests is asked for: a third of what collecting takes each process."""
    return True if config.option.markexpr == "not slow" and collection_path.stem in SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files are marked as slow, and come first, so that no process ends with one when the others are done."""
    order = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))
    for item in items:
        if item.path.stem in order:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is there once tests are found (modules, items) stays: searching it for garbage again and again took a tenth
    of all time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(20_000, 20, 50)


def pytest_unconfigure() -> None:
    """Leave nothing behind, nor in the user's own cache."""
    if _own_cache is not None:
        shutil.rmtree(_own_cache, ignore_errors=True)
