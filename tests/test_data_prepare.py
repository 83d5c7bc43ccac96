"""The whole data path: what comes out, what is reported, and what a user is told when it cannot work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtune.contract.errors import DataError
from llmtune.contract.schema import decode, json_schema
from llmtune.data import DataConfig, TokenSamples, prepare
from tests.tiny import CHATML, CHATML_MARKED, tiny_tokenizer


def alpaca(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"instruction": f"Say {n}", "input": "", "output": "word " * (n % 5 + 1)} | extra for n in range(count)]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def prepared(tmp_path: Path, rows: list, own_template: str | None = CHATML, seed: int = 0, **keys: Any) -> Any:
    write(tmp_path / "rows.jsonl", rows)
    return prepare(DataConfig(dataset="rows.jsonl", **keys), tiny_tokenizer(own_template), seed=seed, base_dir=tmp_path)


def fails(tmp_path: Path, rows: list, message: str, own_template: str | None = CHATML, **keys: Any) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, rows, own_template, **keys)


def test_samples_are_the_renderings_in_order_and_the_report_counts_them(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    found = prepared(tmp_path, alpaca(7))
    assert len(found.train) == 7 and found.evaluation is None
    for number, row in enumerate(alpaca(7)):
        messages = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        ids, mask = found.train.sample(number)
        assert ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
        assert tokenizer.decode(ids[mask]) == row["output"] + "<|im_end|>"
        assert found.train.origin(number) == f"{tmp_path}/rows.jsonl:{number + 1}"
    tokens, trained = int(found.train.lengths.sum()), int(found.train.supervised.sum())
    assert (found.report.train.tokens, found.report.train.supervised_tokens) == (tokens, trained)
    text = str(found.report)
    assert "rows.jsonl: detected: alpaca (instruction and output), 7 rows" in text
    assert f"train: 7 samples, {tokens} tokens, {trained} trained on" in text
    assert "turns end with <|im_end|>" in text and found.report.end_of_turn == ("<|im_end|>",)


def test_several_data_sets_in_several_formats(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write(tmp_path / "a.jsonl", alpaca(3))
    write(tmp_path / "b.jsonl", [chat] * 2)
    both = DataConfig(dataset=("a.jsonl", {"path": "b.jsonl", "format": "openai"}))
    found = prepare(both, tiny_tokenizer(), seed=0, base_dir=tmp_path)
    assert len(found.train) == 5 and found.report.rows == 5
    assert "b.jsonl: openai, as named, 2 rows" in str(found.report)
    joined = prepare(DataConfig(dataset="a.jsonl, b.jsonl"), tiny_tokenizer(), seed=0, base_dir=tmp_path)
    assert joined.train.ids.tolist() == found.train.ids.tolist()


def test_the_shipped_set_is_usable() -> None:
    found = prepare(DataConfig(dataset="llmtune:quickstart"), tiny_tokenizer(), seed=0)
    assert len(found.train) >= 50 and not found.report.dropped.total()


def test_validation_rows_are_held_out_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def texts(samples: TokenSamples) -> set[int]:
        return set(samples.rows.tolist())

    one, again, other = (prepared(tmp_path, alpaca(40), seed=seed, val_size=0.25) for seed in (1, 1, 2))
    assert len(one.evaluation) == 10 and len(one.train) == 30
    assert texts(one.evaluation) == texts(again.evaluation) != texts(other.evaluation)
    assert texts(one.train) | texts(one.evaluation) == set(range(40)) and not texts(one.train) & texts(one.evaluation)
    assert len(prepared(tmp_path, alpaca(40), val_size=3).evaluation) == 3
    fails(tmp_path, alpaca(4), "val_size: found 4, allowed is less than the 4 rows", val_size=4)


def test_samples_of_one_conversation_stay_on_one_side(tmp_path: Path) -> None:
    rewriting = CHATML.replace("{{ message['content'] or '' }}", "{{ message['content'] }}{{ '!' if loop.last }}")
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    found = prepared(tmp_path, [{"messages": turns}] * 8, rewriting, val_size=0.5)
    assert len(found.train) == len(found.evaluation) == 8 and found.report.losses.split_rows == 8
    assert not set(found.train.rows.tolist()) & set(found.evaluation.rows.tolist())


def test_eval_dataset_is_read_apart(tmp_path: Path) -> None:
    write(tmp_path / "eval.jsonl", alpaca(4))
    found = prepared(tmp_path, alpaca(6), eval_dataset="eval.jsonl", max_samples=5)
    assert (len(found.train), len(found.evaluation)) == (5, 4)


def test_cutoff_is_reported_and_samples_without_targets_go(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b" * 40}] * 199 + [{"instruction": "long " * 60, "output": "b"}]
    found = prepared(tmp_path, rows, cutoff_len=40)
    assert len(found.train) == 199 and found.train.lengths.max() == 40
    lost = found.report.losses
    assert (lost.truncated, lost.no_target) == (200, 1) and lost.tokens_cut > 200
    assert "cutoff_len 40: 200 samples cut" in str(found.report)
    assert f"1 samples without a trained token, first {tmp_path}/rows.jsonl:200" in str(found.report)
    assert found.report.dropped["no trained token"] == 1


def test_too_many_samples_without_targets_stop_the_run(tmp_path: Path) -> None:
    rows = [*alpaca(5), {"instruction": "long " * 60, "output": "b"}]
    fails(tmp_path, rows, r"1 of 6 samples have no token to train on \(first: .*:6\).*Raise cutoff_len", cutoff_len=60)
    assert len(prepared(tmp_path, rows, cutoff_len=60, on_bad_record="skip").train) == 5
    fails(tmp_path, rows, "6 of 6 samples have no token", cutoff_len=2, on_bad_record="skip")
    unmarked = CHATML_MARKED.replace("'assistant' %}", "'model' %}")
    fails(tmp_path, alpaca(5), "check that the template marks the assistant's turns", unmarked)


def test_bad_rows_are_counted_by_reason_and_the_first_shown(tmp_path: Path) -> None:
    rows = [
        *alpaca(3),
        {"instruction": "x", "outptu": "y"},
        {"instruction": "x", "output": None},
        *alpaca(8, output=""),
        7,
    ]
    fails(
        tmp_path,
        rows,
        r"(?s)cannot use 11 of 14 rows \(empty answer 8, misspelt column 1, null content 1, not an object 1\)"
        r'.*rows\.jsonl:4: misspelt column: alpaca has no column "outptu"\. Did you mean "output"'
        r".*rows\.jsonl:5: null content.*and 6 more.*on_bad_record: skip",
    )
    fails(tmp_path, rows, r"more than max_bad_records=0\.001 lets .*skip` leave out \(10\)", on_bad_record="skip")
    found = prepared(tmp_path, rows, on_bad_record="skip", max_bad_records=11)
    assert len(found.train) == 3 and found.report.dropped["empty answer"] == 8
    assert "skipped from rows.jsonl: 11 of 14 rows" in str(found.report)


def test_unreadable_lines_are_counted_with_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", alpaca(3))
    path.write_bytes(path.read_bytes() + b'{"instruction": "\xff"}\n{"instruction": "a", "out')
    config = DataConfig(dataset="rows.jsonl")
    with pytest.raises(
        DataError, match=r"(?s)2 of 5 rows \(unreadable 2\).*jsonl:4:18: byte 0xff.*jsonl:5:22: the last line"
    ):
        prepare(config, tiny_tokenizer(), seed=0, base_dir=tmp_path)
    path.write_bytes(b"\x00\x01\n\x02\n")
    with pytest.raises(DataError, match=r"2 of 2 rows \(unreadable 2\)"):
        prepare(config, tiny_tokenizer(), seed=0, base_dir=tmp_path)


def test_empty_files_and_filtered_ones(tmp_path: Path) -> None:
    fails(tmp_path, [], "0 records")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match=r"a\.json: 0 records"):
        prepare(DataConfig(dataset="a.json"), tiny_tokenizer(), seed=0, base_dir=tmp_path)
    fails(tmp_path, alpaca(2, output=""), r"2 of 2 rows \(empty answer 2\)", on_bad_record="skip")
    with pytest.raises(DataError, match=r"dataset: not given.*llmtune:quickstart"):
        prepare(DataConfig(), tiny_tokenizer(), seed=0)


def test_template_is_chosen_by_name_or_file_and_stays_with_the_tokenizer(tmp_path: Path) -> None:
    fails(tmp_path, alpaca(2), "no chat template, as base models do; name one, such as `template: chatml`", None)
    fails(
        tmp_path,
        alpaca(2),
        r'no template "chatlm"\. Did you mean "chatml"\? Known: alpaca, baichuan2',
        template="chatlm",
    )
    fails(tmp_path, alpaca(2), "cannot be read", template="no.jinja")
    (tmp_path / "mine.jinja").write_text(CHATML_MARKED)
    write(tmp_path / "rows.jsonl", alpaca(2))
    for name, expected in (("mine.jinja", CHATML_MARKED), ("alpaca", "### Response:")):
        tokenizer = tiny_tokenizer(None)
        config = DataConfig(dataset="rows.jsonl", template=name)
        train = prepare(config, tokenizer, seed=0, base_dir=tmp_path).train
        assert expected in tokenizer.chat_template
        assert tokenizer.decode(train.ids[train.mask]) == "word <|im_end|>word word <|im_end|>"


def test_shipped_chatml_renders_tools(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "Add"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "One"},
        ],
        "tools": [{"name": "add", "parameters": {}}],
    }
    write(tmp_path / "rows.jsonl", [row])
    tokenizer = tiny_tokenizer(None)
    config = DataConfig(dataset="rows.jsonl", template="chatml")
    train = prepare(config, tokenizer, seed=0, base_dir=tmp_path).train
    expected = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>One<|im_end|>'
    assert tokenizer.decode(train.ids[train.mask]) == expected


def test_a_template_without_end_of_turn_is_refused(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    fails(tmp_path, alpaca(2), r"trains no end-of-turn token.*eos is '<\|im_end\|>'.*template: alpaca", plain)
    # Marks that stop before the end-of-turn token: the model would never learn to stop.
    early = CHATML_MARKED.replace(
        " + '<|im_end|>' }}{%- endgeneration %}{{ '", " }}{%- endgeneration %}{{ ' <|im_end|>"
    )
    assert early != CHATML_MARKED
    fails(tmp_path, alpaca(2), "trains no end-of-turn token.*inside the template's generation block", early)
    # ChatML's markers are only letters to a tokenizer that does not know them.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")
    write(tmp_path / "rows.jsonl", alpaca(2))
    with pytest.raises(DataError, match="trains no end-of-turn token"):
        prepare(DataConfig(dataset="rows.jsonl", template="chatml"), base, seed=0, base_dir=tmp_path)
    found = prepare(DataConfig(dataset="rows.jsonl", template="alpaca"), base, seed=0, base_dir=tmp_path)
    assert found.report.end_of_turn == ("</s>",)


def test_a_template_with_a_typo_is_refused(tmp_path: Path) -> None:
    typo = CHATML.replace("message['content']", "message['contnet']")
    fails(tmp_path, alpaca(3), r"(?s)text not rendered 3.*text of message 1 \(user\) is not in the rendering", typo)


def test_first_tokens_are_never_targets(tmp_path: Path) -> None:
    found = prepared(tmp_path, alpaca(4), train_on_prompt=True)
    starts = found.train.starts[:-1]
    assert not found.train.mask[starts].any() and int(found.train.mask.sum()) == len(found.train.ids) - 4


def test_token_samples_keep_their_place() -> None:
    pairs = [(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in (3, 1, 4)]
    samples = TokenSamples.from_lists(pairs, [5, 6, 6])
    assert len(samples) == 3 and samples.lengths.tolist() == [3, 1, 4] and samples.supervised.tolist() == [2, 0, 3]
    assert samples.ids.dtype == np.int32 and samples.mask.dtype == np.bool_
    some = samples.select([2, 0])
    assert some.sample(0)[0].tolist() == [0, 1, 2, 3] and some.rows.tolist() == [6, 5]
    assert len(TokenSamples.from_lists([], [])) == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cutoff_len": 0}, "cutoff_len: found 0, allowed is a whole number >= 1"),
        ({"max_samples": 0}, "max_samples: found 0, allowed is 1 or more"),
        ({"val_size": 1.5}, r"val_size: found 1\.5, allowed is a share below 1 or a whole number"),
        ({"val_size": 0.1, "eval_dataset": "b.json"}, "eval_dataset is given"),
        ({"template_kwargs": {"tokenize": True}}, "template_kwargs: found tokenize"),
        ({"train_on_prompt": True, "mask_history": True}, "mask_history: found True"),
        ({"dataset": [{"pth": "a.json"}]}, r'dataset\[0\]\.pth: no such key\. Did you mean "path"'),
        ({"dataset": [{"path": "a.json", "format": "csv"}]}, None),
        ({"dataset": ["a.json", "b.json"], "max_samples": -1, "val_size": 10}, None),
    ],
)
def test_keys_are_checked(keys: dict, message: str | None) -> None:
    config, problems = decode(DataConfig, keys)
    if message is None:
        assert config is not None and not problems
    else:
        import re

        assert re.search(message, "\n".join(f"{problem.key}: {problem.message}" for problem in problems))


def test_a_format_that_is_not_known_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", alpaca(1))
    config = DataConfig(dataset={"path": "rows.jsonl", "format": "alpca"})
    with pytest.raises(DataError, match=r'no format "alpca"\. Did you mean "alpaca"'):
        prepare(config, tiny_tokenizer(), seed=0, base_dir=tmp_path)


def test_keys_have_documentation_and_a_schema() -> None:
    properties = json_schema(DataConfig)["properties"]
    assert all(part.get("description") for part in properties.values())
    assert properties["cutoff_len"]["minimum"] == 1


def test_data_keys_are_read_without_torch() -> None:
    code = "import sys; from llmtune.data import DataConfig, Order; print({'torch', 'transformers'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "set()"


def test_tokenised_data_trains_without_the_files_it_came_from(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", alpaca(20))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"few": {"file_name": "rows.jsonl", "num_samples": 5}}))
    keys = {"dataset": "few", "tokenized_path": "made"}
    made = prepare(DataConfig(**keys), tiny_tokenizer(), seed=3, base_dir=tmp_path)
    for name in ("rows.jsonl", "dataset_info.json"):
        (tmp_path / name).unlink()
    again = prepare(DataConfig(**keys), tiny_tokenizer(), seed=3, base_dir=tmp_path)
    assert len(again.train) == 5 and again.digest == made.digest
    alone = prepare(DataConfig(tokenized_path="made"), tiny_tokenizer(), seed=3, base_dir=tmp_path)
    assert alone.digest == made.digest
    with pytest.raises(DataError, match=r"tokenized_path: .* tokenised otherwise \(other cutoff_len\)"):
        prepare(DataConfig(**keys, cutoff_len=7), tiny_tokenizer(), seed=3, base_dir=tmp_path)


def test_who_only_looks_leaves_the_chosen_folder_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", alpaca(20))
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.txt").write_text("mine")
    config = DataConfig(dataset="rows.jsonl", tokenized_path=".")
    for writes in (False, True):
        with pytest.raises(DataError, match="dataset holds mine.txt, which llmtune did not write"):
            prepare(config, tiny_tokenizer(), seed=0, base_dir=tmp_path, writes=writes)
    config = DataConfig(dataset="rows.jsonl", tokenized_path="kept")
    looked = prepare(config, tiny_tokenizer(), seed=0, base_dir=tmp_path, writes=False)
    assert not (tmp_path / "kept").exists()
    made = prepare(config, tiny_tokenizer(), seed=0, base_dir=tmp_path)
    assert (tmp_path / "kept" / "dataset" / "ids.bin").exists() and made.digest == looked.digest


FORMAT = """
from dataclasses import dataclass
from llmtune import Plugin, hookimpl
from shouting.words import told

@dataclass(frozen=True, kw_only=True)
class Config:
    "Rows of one column."

class Shouting:
    kind, columns, required = "text", ("word",), ("word",)
    def recognise(self, row):
        return "word" if "word" in row else None
    def convert(self, row):
        from llmtune import Text
        return Text(text=told(row["word"]))

@hookimpl
def data_config():
    return [Plugin(name="shouting", config=Config, build=lambda config: Shouting())]
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "shouting"
version = "1.0"
[project.entry-points.llmtune]
shouting = "shouting"
"""
READ = """
import json, site, sys
site.addsitedir(sys.argv[1])
from pathlib import Path
from llmtune.data import DataConfig, prepare
from llmtune.recipe.parts import formats_of
from llmtune.recipe.registry import Registry
from tests.tiny import tiny_tokenizer
tokenizer, found = tiny_tokenizer(), []
for keys in json.loads(sys.argv[2]):
    config = DataConfig(dataset={"path": "words.jsonl", "format": "shouting"}, **keys)
    samples = prepare(config, tokenizer, seed=0, base_dir=Path(sys.argv[1]), formats=formats_of(None, Registry())).train
    found.append(tokenizer.decode(samples.sample(0)[0]))
print(json.dumps(found))
"""


def test_a_format_that_is_changed_where_it_is_developed_makes_other_tokens(tmp_path: Path) -> None:
    package = tmp_path / "source" / "shouting"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FORMAT)
    (tmp_path / "source" / "pyproject.toml").write_text(PROJECT)
    write(tmp_path / "words.jsonl", [{"word": "word"}] * 3)
    root = Path(__file__).parents[1]
    words = package / "words.py"
    words.write_text("def told(word):\n    return word * 2\n")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path)]
    subprocess.run([*pip, "-e", str(tmp_path / "source")], check=True)

    def read(**keys: Any) -> list[str]:
        command = [sys.executable, "-c", READ, str(tmp_path), json.dumps([keys, {}])]
        return json.loads(subprocess.check_output(command, cwd=root, text=True))

    first = read()
    assert first[0].startswith("wordword") and first == read()
    words.write_text("def told(word):\n    return word * 3\n")
    for keys in ({}, {"overwrite_cache": True}):
        assert all(text.startswith("wordwordword") for text in read(**keys))
    words.write_text("def told(word):\n    return word * 2\n")
    assert read() == first
