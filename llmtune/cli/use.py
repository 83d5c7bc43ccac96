"""`llmtune chat`, `predict`, `eval`, `export` and `reward`: what is done with what was trained."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from typing import Any

from llmtune.cli.arguments import add_command, add_model, add_overrides, count
from llmtune.cli.libraries import load_libraries
from llmtune.contract.errors import RecipeError
from llmtune.terminal import say


def add_commands(commands: Any) -> None:
    """Add what uses a run or a model."""
    chat = add_command(commands, "chat", _chat, "Talk to a run, a checkpoint, a model, or a base with adapters")
    add_model(chat)
    add_overrides(chat, "generation parameters (temperature=0.2), tools=FILE or recipe keys")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    for kind in ("image", "video", "audio"):
        chat.add_argument(
            f"--{kind}", metavar="FILE", action="append", default=[],
            help=f"goes with the prompt, or with the first question; <{kind}> in it says where",
        )  # fmt: skip
    chat.add_argument(
        "--compare",
        metavar="BASE",
        help="show the answers of another model beside; `base` is the run's own, with the adapter switched off",
    )
    predict = add_command(
        commands, "predict", _predict, "Answer every row of a data set, into generated_predictions.jsonl",
        "What is written already is kept when the same command is run again.",
    )  # fmt: skip
    add_model(predict)
    add_overrides(predict, "dataset=FILE, output_dir=FOLDER, generation parameters (max_new_tokens=64) or recipe keys")
    predict.add_argument("--nproc", type=count, metavar="N", help="ranks on this machine (default: one per GPU)")
    evaluate = add_command(
        commands, "eval", _eval, "Ask a model the questions of a benchmark",
        "The results are written into the folder benchmarks of the run.",
    )  # fmt: skip
    add_model(evaluate)
    add_overrides(evaluate, "task=mmlu, n_shot=5, batch_size=8, limit=100, save_dir=FOLDER or recipe keys")
    evaluate.add_argument("--nproc", type=count, metavar="N", help="ranks on this machine (default: one per GPU)")
    export = add_command(commands, "export", _export, "Write a merged model, a GGUF file or an adapter")
    export.add_argument(
        "run", metavar="RUN", help="a run's folder, a checkpoint, or a base with peft_config (or a recipe)"
    )
    add_overrides(export, "export_dir, export_format, export_gguf_type, infer_dtype, export_hub_model_id, ...")
    reward = add_command(
        commands, "reward", _reward, "Give the rewards of a trained reward model, a line of JSON for each row"
    )
    reward.add_argument("run", metavar="RUN", help="the folder of a run with stage_config rm, or a reward model's")
    add_overrides(reward, "dataset=FILE of conversations, labelled answers or preferences, recipe keys")


def _chat(options: Any) -> None:
    load_libraries()
    from llmtune.inference.chat import open_chat
    from llmtune.inference.talk import NO_TEMPLATE, Compared, chat_loop, compared, say_answer
    from llmtune.recipe.recipe import parse_overrides

    keys = parse_overrides(options.overrides)
    conversation = open_chat(options.model, **keys)
    beside: Compared | None = None
    if options.compare is not None:
        beside = compared(conversation, options.model, options.compare, keys)
    files = {"image": options.image, "video": options.video, "audio": options.audio}
    if options.prompt is None:
        chat_loop(conversation, guides=sys.stdin.isatty(), dims=dims(), beside=beside, files=files)
        return
    if conversation.completes:
        print(NO_TEMPLATE, file=sys.stderr)
    say_answer(conversation, options.prompt, beside, files)


def dims() -> bool:
    """Whether the terminal shows thoughts dimmed."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _predict(options: Any) -> int:
    if (code := _launched("predict", options)) is not None:
        return code
    load_libraries()
    from llmtune.inference.predict import predict
    from llmtune.recipe.recipe import parse_overrides

    return _said(str(predict(options.model, **parse_overrides(options.overrides))))


def _eval(options: Any) -> int:
    if (code := _launched("eval", options)) is not None:
        return code
    load_libraries()
    from llmtune.inference.evaluate import evaluate
    from llmtune.recipe.recipe import parse_overrides

    found = evaluate(options.model, **parse_overrides(options.overrides))
    lines = [
        "\n".join([*(f"{name} {value:.4g}" for name, value in metrics.items()), f"Wrote {file}"])
        for file, metrics in found.items()
    ]
    return _said("\n".join(lines))


def _launched(command: str, options: Any) -> int | None:
    """The exit code of the ranks that the command starts; None where this process is one of them, or the only one."""
    from llmtune.distributed.launch import default_ranks, launch, under_launcher
    from llmtune.distributed.stopping import die_with_parent
    from llmtune.recipe.recipe import parse_overrides

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)
    device = parse_overrides(options.overrides).get("device", "auto")
    if not under_launcher() and (ranks := options.nproc or default_ranks(device)) > 1:
        return launch([command, options.model, *options.overrides], ranks)
    return None


def _said(text: str) -> int:
    """The end of a command that several ranks carry out: the first one says the text."""
    from llmtune.distributed.ranks import leave

    if os.environ.get("RANK", "0") == "0":
        say(text)
    leave()
    return 0


def _export(options: Any) -> None:
    import json

    load_libraries()
    from llmtune.inference.export import export
    from llmtune.recipe.recipe import parse_overrides

    target = export(options.run, **parse_overrides(options.overrides))
    model = next(target.glob("*.gguf"), target)
    about, place = target / "config.json", shlex.quote(str(model))
    kinds = json.loads(about.read_text(encoding="utf-8")).get("architectures") if about.exists() else None
    judges = any("ForSequenceClassification" in kind for kind in kinds or ())
    say(f"Wrote {target}. Try: " + (f"llmtune reward {place} dataset=ROWS" if judges else f"llmtune chat {place}"))


def _reward(options: Any) -> None:
    import json

    from llmtune.recipe.recipe import parse_overrides

    given = parse_overrides(options.overrides)
    if (dataset := given.pop("dataset", None)) is None:
        raise RecipeError("dataset: not given, needed is what to score: dataset=FILE")
    load_libraries()
    from llmtune.inference.reward import rewards_of_rows

    for row in rewards_of_rows(options.run, dataset, **given):
        print(json.dumps(row))
