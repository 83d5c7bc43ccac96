"""The laws: each is broken by a part that is wrong in one way, and kept by sound ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtune import PluginError, plan, train
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.testing import LawError, check_plugin, in_ranks, laws, tiny_chats, tiny_recipe
from llmtune.training.schedule import WarmedSchedule

HERE = Path(__file__).parent
BROKEN = {
    ("quant_config", "forgets_a_rule"): ("accounts_for_every_tensor", "gave no rule to load them"),
    ("quant_config", "restores_the_wrong"): ("restores_what_it_converted", "error of 1.0"),
    ("quant_config", "scales_by_its_piece"): ("converts_in_pieces", "on 2 ranks is not what `convert` makes"),
    ("quant_config", "gathers_on_one_rank"): ("converts_in_pieces", "a different number of times"),
    ("quant_config", "computes_otherwise"): ("computes_with_the_restored_weights", "of the restored weights"),
    ("quant_config", "says_no_word"): ("says_that_it_quantises", "quantized_base"),
    ("peft_config", "trains_the_base"): ("trains_what_it_claims", "is an adapter and trains model.layers.1"),
    ("peft_config", "trains_what_it_does_not_use"): ("trains_what_it_claims", "idle are claimed and get no gradient"),
    ("peft_config", "moves_frozen_weights"): ("trains_what_it_claims", "changed in training without being claimed"),
    ("peft_config", "starts_at_random"): ("loads_completely", "random numbers drawn outside `ModelEdit.fresh`"),
    ("peft_config", "starts_by_rank"): ("same_on_ranks", "with 1 rank"),
    ("peft_config", "merges_nothing"): ("merges_into_a_plain_model", "does not answer like base plus adapter"),
    ("peft_config", "remembers_outside"): ("resumes_exactly", "differ after resuming"),
    ("peft_config", "opens_otherwise"): ("reopens_as_trained", "reopened model's logits differ"),
    ("peft_config", "forgets_to_save"): ("keeps_its_protocol", "is an adapter and lacks save; write it"),
    ("peft_config", "is_of_no_kind"): (
        "keeps_its_protocol",
        "has the kind 'weight', allowed is one of adapter, weights",
    ),
    ("kernel_config", "wrong_gradient"): ("trains_as_without_it", "the gradient of"),
    ("kernel_config", "wrong_answer"): ("answers_as_without_it", "logits differ"),
    ("kernel_config", "does_nothing"): ("replaces_something", "it reports: not used"),
    ("kernel_config", "mixes_documents"): ("keeps_documents_apart", "cannot keep documents apart"),
    ("stage_config", "takes_the_mean"): ("is_a_sum_over_rows", "do not take means"),
    ("stage_config", "detaches_a_part"): ("has_the_gradient_of_its_loss", "its gradient says"),
    ("stage_config", "counts_padding"): ("ignores_padding", "more tokens of padding"),
    ("stage_config", "nudges_weights"): ("changes_nothing", "model.norm.weight changed"),
    ("stage_config", "climbs"): ("learns", "the loss went from"),
    ("dist_config", "sums_gradients"): ("same_on_ranks", "grad_norm"),
    ("dist_config", "loses_ranks"): ("arranges_all_ranks", "layout(2)"),
    ("optim_config", "has_its_own_rate"): ("obeys_the_learning_rate", "move at a learning rate of 0"),
    ("optim_config", "decays_all"): ("spares_vectors_from_decay", "a vector without gradient moved"),
    ("optim_config", "hides_its_state"): ("resumes_exactly", "differ after resuming"),
    ("optim_config", "goes_uphill"): ("lowers_a_loss", "the loss went from"),
    ("optim_config", "drops_vectors"): ("takes_every_parameter", "vector"),
    ("lr_scheduler_config", "doubles"): ("stays_within_bounds", "is 2.0"),
    ("lr_scheduler_config", "starts_low"): ("takes_over_after_warmup", "the rate jumps"),
    ("lr_scheduler_config", "counts_calls"): ("is_a_pure_function", "depends on earlier calls"),
    ("lr_scheduler_config", "divides_by_zero"): ("survives_the_edges", "ZeroDivisionError"),
    ("lr_scheduler_config", "undocumented"): ("documents_its_keys", "says nothing of rate"),
    ("lr_scheduler_config", "sums_up_nothing"): ("documents_its_keys", "`summary` is empty"),
    ("lr_scheduler_config", "out_of_bounds"): ("reads_its_keys", "the default of rate is -1.0"),
    ("lr_scheduler_config", "mutable"): ("reads_its_keys", "frozen=True"),
    ("lr_scheduler_config", "draws_numbers"): ("builds_without_side_effects", "torch's random state"),
    ("lr_scheduler_config", "has_no_entry"): ("is_discovered", "no entry point of this name"),
    ("lr_scheduler_config", "heavy"): ("has_a_light_module", "torch"),
    ("logger_config", "hates_nan"): ("takes_any_number", "NaN"),
    ("logger_config", "writes_early"): ("survives_a_run_that_never_started", "acme-early.txt"),
    ("logger_config", "needs_a_start"): ("survives_a_run_that_never_started", "AttributeError"),
    ("logger_config", "leaves_home"): ("keeps_to_its_folder", "it wrote acme.txt"),
    ("logger_config", "hopes_for_the_best"): ("knows_every_end", "KeyError: 'interrupted'"),
    ("logger_config", "quotes_the_first_word"): ("takes_any_answer", "IndexError"),
    ("logger_config", "paints_once"): ("takes_a_picture_again", "FileExistsError"),
    ("logger_config", "wants_the_main_thread"): ("follows_a_run", "signal only works in main thread"),
    ("init_config", "shifts_rows"): ("fetches_what_the_files_hold", "is not what the file holds"),
    ("init_config", "rounds"): ("loads_the_checkpoint", "are not what the files hold"),
    ("engine_config", "takes_chances"): ("takes_the_likeliest_token", "is the likeliest"),
    ("engine_config", "sees_its_neighbours"): ("answers_alone_as_in_a_batch", "in a batch"),
    ("engine_config", "ignores_seeds"): ("draws_by_its_seed", "eight seeds draw the same"),
    ("engine_config", "never_ends"): ("ends_where_it_should", "with the stop token"),
    ("engine_config", "keeps_silent"): ("tells_each_token", "the watcher saw ()"),
    ("engine_config", "stays_in_eval"): ("leaves_the_model_as_it_was", "in another mode"),
    ("engine_config", "draws_by_rank"): ("answers_alike_on_ranks", "on 1 rank"),
    ("hub_config", "cannot_travel"): ("travels_without_showing_its_token", "bolted to the wall"),
    ("hub_config", "states_old_hashes"): ("lists_what_there_is", "another hash for a.txt"),
    ("hub_config", "fetches_everything"): ("fetches_what_is_asked", "sub/b.txt came along"),
    ("hub_config", "forgets_what_it_fetched"): ("keeps_what_it_fetched", "`cached` is None after all"),
    ("hub_config", "is_never_sure"): ("says_what_is_not_there", "it raised HubUnreachable"),
    ("launch_config", "forgets_the_last"): ("starts_every_rank", "rank 1 of 2 never ran"),
    ("launch_config", "writes_to_describe"): ("describes_without_starting", "`describe` left job.sh"),
    ("launch_config", "swallows_failures"): ("tells_that_a_rank_failed", "`launch` returned 0"),
    ("launch_config", "forgets_who_it_is"): ("starts_failed_ranks_again", "and again by"),
    ("reward_config", "counts_to_infinity"): ("scores_every_answer", "the answer '' got inf"),
    ("reward_config", "grades_on_a_curve"): ("scores_an_answer_alone_as_among_others", "alone and"),
    ("reward_config", "grows_tired"): ("says_the_same_again", "and then"),
    ("reward_config", "rolls_dice"): ("changes_nothing", "a global random state changed"),
    ("reward_config", "favours_large_crowds"): ("scores_alike_on_ranks", "on 1 rank and"),
    ("eval_config", "names_nothing"): ("reports_what_it_names", "reports rightness, which `metrics` does not name"),
    ("eval_config", "takes_the_mean_of_rows"): ("sums_over_rows", "their sum one by one"),
    ("eval_config", "looks_at_padding"): ("does_not_see_the_layout", "end to end and"),
    ("eval_config", "switches_to_training"): ("leaves_all_as_it_was", "modules were switched"),
    ("eval_config", "sees_its_rank"): ("measures_alike_on_ranks", "on 1 rank and"),
    ("eval_config", "remembers_answers"): ("depends_on_the_answers_alone", "the same answers are"),
    ("eval_config", "divides_by_words"): ("takes_any_text", "ZeroDivisionError"),
    ("eval_config", "measures_nothing"): ("keeps_its_protocol", "measures nothing; write `measure_batch`"),
    ("data_config", "knows_no_kind"): ("declares_its_columns", "`kind` is 'essay'"),
    ("data_config", "lies_about_its_kind"): ("converts_what_it_recognises", "become text, and made Conversation"),
    ("data_config", "fails_on_gaps"): ("refuses_with_reasons", "AttributeError"),
    ("data_config", "changes_rows"): ("leaves_rows_alone", "was changed to"),
    ("data_config", "counts_rows"): ("depends_on_the_row_alone", "is not always the same"),
}
"""What is wrong: the law that says so, and words of what it says."""


SHELF: dict[str, Any] = {"repository": "me/tiny", "files": {"a.txt": b"a", "sub/b.txt": b"b"}}
"""What a hub under test holds."""


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The broken package and the sound one they spoil, as pip leaves them: on the path, with entry points."""
    site = tmp_path_factory.mktemp("site")
    names = ["saves_the_base_too", *(name for _, name in BROKEN if name not in ("has_no_entry", "heavy"))]
    entries = {
        "acme-broken": [f"{name} = acme_broken" for name in names],
        "acme-heavy": ["heavy = acme_heavy"],
        "acme-tuning": [f"{name} = acme_tuning" for name in ("ia3", "int8_rows", "smoothed", "forum")],
    }
    for package, lines in entries.items():
        info = site / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[llmtune]", *lines]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        for folder in (site, HERE / "broken", HERE / "stranger"):
            patch.syspath_prepend(str(folder))
        yield
    for name in [name for name in sys.modules if name.startswith("acme")]:
        del sys.modules[name]  # other tests have packages of these names


@pytest.mark.parametrize(("point", "name"), list(BROKEN), ids=lambda value: value)
def test_what_is_wrong_breaks_its_law(point: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law, words = BROKEN[point, name]
    rows = [{"body": " text "}] if point == "data_config" else []
    (checked,) = (one for one in laws(point, name, rows=rows, **SHELF) if one.__name__ == law)
    place = tmp_path / law
    place.mkdir()
    for file, content in SHELF["files"].items() if point == "hub_config" else ():
        (place / "shelf" / "me" / "tiny" / file).parent.mkdir(parents=True, exist_ok=True)
        (place / "shelf" / "me" / "tiny" / file).write_bytes(content)
    monkeypatch.chdir(place)
    with pytest.raises(LawError) as error:
        checked(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{point} {name} breaks the law {law}: ")
    assert words in said
    assert f"The law: {checked.sentence}" in said


def test_every_law_is_broken_by_something() -> None:
    """But those that need a reader or another mode, and a few that ask of a run what others ask of its pieces."""
    known = {
        law.__name__ for point in EXTENSION_POINTS for law in laws(point, "x", reader=print, repository="me/tiny")
    }  # fmt: skip
    again = {
        "others_read_what_it_saves", "saves_a_plain_model", "trains_as_on_the_restored_weights", "converts_as_declared",
        "loads_the_same_on_ranks", "trains_frozen_bases_as_without_it", "returns_a_loss", "trains_a_model",
        "does_not_depend_on_micro_batches", "spreads_structure_only", "leaves_parameters_without_gradient",
        "goes_on_where_the_run_does", "cannot_stop_a_run",
    }  # fmt: skip
    assert known - {law for law, _ in BROKEN.values()} == again


@pytest.mark.parametrize(
    ("point", "name", "options"),
    [
        ("quant_config", "int8_rows", {"error": 0.02}),
        ("peft_config", "ia3", {}),
        ("peft_config", "saves_the_base_too", {}),
        ("stage_config", "smoothed", {}),
        ("data_config", "forum", {"rows": [{"post": "a", "replies": [{"text": "b", "votes": 1}]}]}),
    ],
)
def test_sound_parts_keep_every_law(point: str, name: str, options: dict, tmp_path: Path) -> None:
    check_plugin(point, name, tmp_path, **options)


@pytest.mark.parametrize(
    "keys",
    [
        {"data_config": {"name": "forum", "least_votes": 2}},
        {"dataset": [{"path": "rows.jsonl", "format": {"name": "forum", "least_votes": 2}}]},
    ],
    ids=["for all", "for one"],
)
def test_a_recipe_names_a_strangers_format(keys: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"post": f"Why {at}?", "replies": [{"text": f"So {at}.", "votes": at}]} for at in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    run = train(tiny_recipe(tmp_path, **{"dataset": "rows.jsonl", "on_bad_record": "skip", **keys}))
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    told = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in told] == ["no good reply"] * 2


def test_all_broken_laws_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(LawError) as error:
        check_plugin("lr_scheduler_config", "doubles", tmp_path)
    said = str(error.value)
    assert said.startswith("2 of 10 laws are broken")
    assert "stays_within_bounds" in said and "takes_over_after_warmup" in said


def test_a_law_is_a_test_with_a_name_and_a_sentence() -> None:
    law = laws("peft_config", "ia3")[0]
    assert law.__name__ == "is_discovered" and repr(law) == "<law is_discovered of peft_config ia3>"
    assert law.sentence.endswith(".")
    with pytest.raises(ValueError, match='no extension point "peft"'):
        laws("peft", "ia3")


def test_parameters_that_the_plugin_refuses_are_named(tmp_path: Path) -> None:
    (law,) = (law for law in laws("peft_config", "ia3", {"start": "high"}) if law.__name__ == "reads_its_keys")
    with pytest.raises(LawError, match='its parameters are refused: start: found "high"'):
        law(tmp_path)


def test_a_plugin_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(LawError, match='peft_config: no plugin "absent" is installed'):
        laws("peft_config", "absent")[0](tmp_path)


def test_a_misspelt_name_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(LawError) as error:
        check_plugin("peft_config", "ia4", tmp_path)
    said = str(error.value)
    assert said.startswith('no law of peft_config ia4 can be checked: peft_config: no plugin "ia4" is installed.')
    assert 'Did you mean "ia3"?' in said and "laws are broken" not in said


def test_a_script_without_a_main_guard_is_told(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        "from pathlib import Path\nfrom llmtune.testing import in_ranks\nimport os\n"
        f"in_ranks(2, Path({str(tmp_path)!r}) / 'ranks', os.getpid)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode != 0
    assert f'Each rank imports {script} before it begins, which has no `if __name__ == "__main__":`' in done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("forgets_to_save", "what it builds, ForgetsToSave, is an adapter and lacks save"),
        ("is_of_no_kind", "has the kind 'weight', allowed is one of adapter, weights"),
    ],
)
def test_the_plan_refuses_what_does_not_keep_its_protocol(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=f'peft_config: "{name}" of acme-broken 1.0') as error:
        plan(tiny_recipe(tmp_path, peft_config=name))
    assert words in str(error.value)


def test_a_schedule_that_raises_is_named(tmp_path: Path) -> None:
    part = plan(tiny_recipe(tmp_path, lr_scheduler_config="divides_by_zero")).parts.one("lr_scheduler_config")
    with pytest.raises(PluginError, match='lr_scheduler_config: "divides_by_zero" of acme-broken 1.0 failed'):
        WarmedSchedule(part).factor(5, 5, 5)


def test_importing_it_loads_neither_torch_nor_pytest() -> None:
    code = (
        "import sys, llmtune.testing as t; [getattr(t, name) for name in t.__all__]\n"
        "print([name for name in ('torch', 'transformers', 'pytest', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def double(number: int) -> int:
    if number < 0:
        raise ValueError("negative")
    import os

    return 2 * number + int(os.environ["RANK"])


def test_results_come_back_in_rank_order_and_errors_too(tmp_path: Path) -> None:
    assert in_ranks(2, tmp_path, double, 3) == [6, 7]
    with pytest.raises(AssertionError, match=r"rank 0 failed:[\s\S]*ValueError: negative"):
        in_ranks(1, tmp_path, double, -1)


def test_a_tiny_recipe_uses_what_is_there(tmp_path: Path) -> None:
    chats = tiny_chats(tmp_path, rows=3)
    keys = tiny_recipe(tmp_path, max_steps=1, peft_config="ia3")
    assert keys["dataset"] == str(chats) and len(chats.read_text().splitlines()) == 3
    assert keys["max_steps"] == 1 and (Path(keys["model"]) / "model.safetensors").exists()


def surroundings(name: str) -> tuple[int, str | None, bool]:
    import torch

    return os.getpid(), os.environ.get(name), torch.distributed.is_initialized()


def test_ranks_are_processes_that_share_the_environment_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_FOR_RANKS", "here")
    before = in_ranks(2, tmp_path / "ranks", surroundings, "ACME_FOR_RANKS")
    monkeypatch.delenv("ACME_FOR_RANKS")
    after = in_ranks(2, tmp_path / "ranks", surroundings, "ACME_FOR_RANKS")
    assert len({os.getpid(), *(found[0] for found in [*before, *after])}) == 5
    assert [found[1:] for found in [*before, *after]] == 2 * [("here", False)] + 2 * [(None, False)]
