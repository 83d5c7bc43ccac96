"""What is wrong with data, and the sentence that says so. `docs/data.md` lists both; each line is made to happen."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmtune
from llmtune.contract.errors import DataError
from tests.runs import recipe
from tests.tiny import CHATML, tiny_tokenizer

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAGE = Path(__file__).parent.parent / "docs" / "data.md"


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def called(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    asked, answered = GOOD["messages"]
    return {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}, answered]}


MENDED = lines(GOOD, GOOD)
LONG = chat(("user", "why " * 200), ("assistant", "so"))

BAD_ROWS: dict[str, bytes] = {
    "a line is not JSON": lines(GOOD) + b"{'messages': []}\n" + lines(GOOD),
    "the last line is cut off": lines(GOOD) + lines(GOOD)[:-20],
    "a byte is not UTF-8": lines(GOOD) + '{"messages": "caf\u00e9"}\n'.encode("latin-1"),
    "the file is UTF-16": json.dumps(GOOD).encode("utf-16"),
    "the file is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "the file is empty": b"",
    "a column is misspelt in some rows": lines(GOOD, {"mesages": GOOD["messages"]}),
    "messages is text": lines(GOOD, {"messages": "hi"}),
    "no format fits": lines({"prompt_text": "a", "reply": "b"}),
    "a role is unknown": lines(GOOD, chat(("usr", "a"), ("assistant", "b"))),
    "roles are out of order": lines(GOOD, chat(("tool", "a"), ("assistant", "b"))),
    "nobody answers": lines(GOOD, chat(("user", "a"))),
    "an answer is empty": lines(GOOD, chat(("user", "a"), ("assistant", ""))),
    "content is null": lines(GOOD, chat(("user", None), ("assistant", "b"))),
    "arguments of a tool call are not JSON": lines(GOOD, called("{a: 1}")),
    "a message has a part of another type": lines(GOOD, chat(("user", [{"type": "file"}]), ("assistant", "b"))),
}
"""Files that stop a run."""

OTHER_KEYS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a row has a picture, and the model reads text only": (lines(GOOD, {**GOOD, "images": ["a.jpg"]}), {}),
    "the file is not there": (MENDED, {"dataset": "./chat.jsonl"}),
    "more rows are bad than may be skipped": (
        lines(GOOD, *[{"messages": "hi"}] * 3), {"on_bad_record": "skip", "max_bad_records": 2}
    ),
    "a sample has no trained token left": (lines(GOOD, LONG), {"cutoff_len": 64}),
    "a sample is longer than allowed": (lines(GOOD, LONG), {"cutoff_len": 64, "cutoff_policy": "error"}),
    "no sample is short enough": (lines(LONG), {"cutoff_len": 64, "cutoff_policy": "drop"}),
}  # fmt: skip
"""Files that stop a run with certain keys, or a certain model."""

TEMPLATES: dict[str, str | None] = {
    "the model has no chat template": None,
    "the template leaves text out": CHATML.replace("message['content']", "message['contnet']"),
    "the template ends no turn": "{% for each in messages %}{{ each['role'] }}: {{ each['content'] }}\n{% endfor %}",
}
"""Templates that stop a run."""


def told() -> dict[str, str]:
    """The page's table: what happens, and what llmtune says."""
    section = PAGE.read_text("utf-8").partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return {fault: said for fault, said in rows if said.startswith("`")}


def check(fault: str, message: str) -> None:
    """`...` in the page's sentence stands for anything."""
    said = told()[fault].strip("`")
    pattern = ".*".join(re.escape(part.strip()) for part in said.split("..."))
    assert re.search(pattern, message, re.DOTALL), f"{message}\n is not what docs/data.md says: {said}"


@pytest.fixture
def keys(tiny_llama: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def made(content: bytes, **changes: Any) -> dict[str, Any]:
        (tmp_path / "chats.jsonl").write_bytes(content)
        return {**recipe(tiny_llama, str(tmp_path / "chats.jsonl"), tmp_path / "run"), **changes}

    return made


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_file_stops_a_run_and_a_check(fault: str, keys: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        llmtune.preview(keys(BAD_ROWS[fault]))
    check(fault, str(caught.value))
    try:
        said = str(llmtune.check_data(tmp_path / "chats.jsonl"))
    except DataError as error:
        said = str(error)
    check(fault, said)


@pytest.mark.parametrize("fault", OTHER_KEYS)
def test_keys_make_it_a_fault(fault: str, keys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, changes = OTHER_KEYS[fault]
    with pytest.raises(DataError) as caught:
        llmtune.preview(keys(content, **changes))
    check(fault, str(caught.value))


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_template_stops_a_run(fault: str, keys: Any, folder: Path) -> None:
    template = TEMPLATES[fault]
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError) as caught:
        llmtune.preview(keys(MENDED, model=str(folder)))
    check(fault, str(caught.value))


def test_the_page_and_the_tests_name_the_same_faults() -> None:
    assert set(told()) == {*BAD_ROWS, *OTHER_KEYS, *TEMPLATES}


def tokens(keys: dict[str, Any]) -> list[tuple[list[int], list[bool]]]:
    shown = llmtune.preview(keys, n=99)
    return [(each.ids.tolist(), each.mask.tolist()) for sample in shown.samples for each in sample.sequences]


@pytest.mark.parametrize(
    "name",
    ["a byte order mark", "blank lines", "carriage returns", "one array", "no line end at the end", "gzip", "zstd"],
)
def test_harmless_variants_of_a_file_give_the_same_tokens(name: str, keys: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    wanted = tokens(keys(MENDED))
    assert len(wanted) == 2
    content = {
        "a byte order mark": b"\xef\xbb\xbf" + MENDED,
        "blank lines": MENDED.replace(b"\n", b"\n\n \n"),
        "carriage returns": MENDED.replace(b"\n", b"\r\n"),
        "one array": json.dumps([GOOD, GOOD], indent=1).encode(),
        "no line end at the end": MENDED.rstrip(),
        "gzip": gzip.compress(MENDED),
        "zstd": pyarrow.compress(MENDED, codec="zstd", asbytes=True),
    }[name]
    ending = {"gzip": ".gz", "zstd": ".zst"}.get(name, "")
    made = keys(MENDED)
    (tmp_path / f"other.jsonl{ending}").write_bytes(content)
    assert tokens(made | {"dataset": str(tmp_path / f"other.jsonl{ending}")}) == wanted


def test_not_a_number_is_no_fault_where_nobody_reads_it(keys: Any) -> None:
    assert tokens(keys(b'{"score": NaN, ' + lines(GOOD)[1:])) == tokens(keys(lines(GOOD)))


def test_arguments_as_text_and_as_object_are_the_same_tokens(keys: Any) -> None:
    assert tokens(keys(lines(called('{"a": 1}')))) == tokens(keys(lines(called({"a": 1}))))


def test_a_template_without_marks_trains_the_answers_and_their_ends(keys: Any) -> None:
    ((ids, mask),) = tokens(keys(lines(GOOD)))
    assert tiny_tokenizer().decode(np.array(ids)[mask]) == "hello<|im_end|>"


def test_padding_with_the_end_token_leaves_it_trained(keys: Any, folder: Path) -> None:
    wanted = tokens(keys(lines(GOOD)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|im_end|>"}))
    assert tokens(keys(lines(GOOD), model=str(folder))) == wanted


def test_a_few_samples_without_a_trained_token_are_left_out_and_told(keys: Any) -> None:
    data = keys(lines(*[GOOD] * 200, LONG), cutoff_len=64)
    assert len(tokens(data)) == 99 and llmtune.stats(data).trained.samples == 200
    assert any(note.startswith("1 samples are left out") for note in llmtune.stats(data).notes)


def test_a_batch_without_a_trained_token_weighs_nothing() -> None:
    from llmtune.data.batches import collate

    batch = collate([(np.arange(4), np.zeros(4, bool))], flat=False, pad_id=0)
    assert batch.weight == 0 and len(batch.targets) == 0


def test_plan_and_preview_write_nothing_where_the_recipe_keeps_tokens(tiny_llama: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": f"q{n}", "output": "a"}) + "\n" for n in range(4))
    )
    keys = recipe(tiny_llama, str(tmp_path / "rows.jsonl"), tmp_path / "run", tokenized_path=str(tmp_path / "kept"))
    llmtune.plan(keys)
    llmtune.preview(keys)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    llmtune.train(keys)
    assert (tmp_path / "kept" / "dataset" / "ids.bin").exists()
