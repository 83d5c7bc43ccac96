"""Does a step wait for pictures? Against transformers' Trainer, on the same rows, model and number of worker processes.

    python benchmarks/media.py DATA.json [--workers 2] [--rows 240] [--batch 8] [--width 256] [--layers 6]
        [--repeats 3] [--threads 1] [--write RESULT.md]

DATA is a data set in OpenAI's messages with `<image>` in the texts and a column `images`, whose paths count from its
folder; its rows are repeated. Both sides train all but the tower of a LLaVA with random weights, whose size the options
say, in float32, and read the rows in their order: llmtune with `preprocessing_num_workers`, the Trainer with
`dataloader_num_workers` and a collator that opens the pictures and calls the model's processor. Each run is its own
process. Reported are medians over the repeats: the share of the time between two steps' starts that a step waits for
its batch, the longest wait, and tokens a second, without padding and all without the first step. The losses must agree,
or nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from train import cpu_name

SIDES = ("transformers' Trainer", "llmtune")
PATCH, PIXELS, CUTOFF, RATE = 16, 224, 2048, 1e-4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Waits:
    """When each step began to wait for its batch, and for how long."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.seconds: list[float] = []

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which gets the batch of a step, with a clock."""

        def get(*values: Any, **named: Any) -> Any:
            self.starts.append(time.perf_counter())
            batch = call(*values, **named)
            self.seconds.append(time.perf_counter() - self.starts[-1])
            return batch

        return get


def make_rows(options: argparse.Namespace, folder: Path) -> Path:
    """The rows, again and again, with whole paths."""
    source = Path(options.data)
    found = json.loads(source.read_text())
    for row in found:
        row["images"] = [str((source.parent / path).resolve()) for path in row["images"]]
    place = folder / "rows.json"
    place.write_text(json.dumps([found[number % len(found)] for number in range(options.rows)]))
    return place


def make_model(options: argparse.Namespace, folder: Path) -> Path:
    """A LLaVA of a SigLIP tower and a llama, and its processor."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [Path(options.data).read_text(), "user assistant system"]
    bpe.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>")
    shape = {
        "hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 64,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(image_size=PIXELS, patch_size=PATCH, vision_use_head=False, **shape),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, max_position_embeddings=CUTOFF, **shape,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(PIXELS // PATCH) ** 2,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).float().save_pretrained(folder / "model")
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": PIXELS, "width": PIXELS}), tokenizer=tokenizer,
        patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


def run_llmtune(options: argparse.Namespace, folder: Path, model: Path, rows: Path) -> dict[str, Any]:
    import llmtune
    from llmtune.data.media_loader import MediaLoader

    waits = Waits()
    MediaLoader.step = waits.timed(MediaLoader.step)  # type: ignore[method-assign]
    metrics = llmtune.train({
        "model": str(model), "dataset": str(rows), "media_dir": "/", "output_dir": str(folder / "run"),
        "per_device_train_batch_size": options.batch, "preprocessing_num_workers": options.workers,
        "image_max_pixels": None, "image_min_pixels": None, "cutoff_len": CUTOFF, "disable_shuffling": True,
        "disable_gradient_checkpointing": True, "kernel_config": None, "bf16": False, "learning_rate": RATE,
        "lr_scheduler_config": "constant", "freeze_multi_modal_projector": False, "num_train_epochs": 1,
        "optim_config": {"name": "adamw", "weight_decay": 0.0}, "logging_steps": 1, "save_steps": None,
    }).metrics  # fmt: skip
    steps = [row for row in metrics if "loss" in row]
    tokens = [steps[0]["tokens"], *(b["tokens"] - a["tokens"] for a, b in pairwise(steps))]
    return figures(waits, tokens, [row["loss"] for row in steps])


def run_trainer(options: argparse.Namespace, folder: Path, model: Path, rows: Path) -> dict[str, Any]:
    """What one writes by hand with transformers."""
    import torch
    from PIL import Image
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

    processor, waits = AutoProcessor.from_pretrained(model), Waits()
    begin = processor.tokenizer.encode("<|im_start|>assistant\n")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
        files, found = iter(row["images"]), []
        for message in row["messages"]:
            parts: list[dict[str, Any]] = []
            for number, text in enumerate(message["content"].split("<image>")):
                parts += [{"type": "image", "image": Image.open(next(files)).convert("RGB")}] if number else []
                parts += [{"type": "text", "text": text}] if text else []
            found.append({"role": message["role"], "content": parts})
        return found

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        batch = processor.apply_chat_template(
            [conversation(row) for row in chosen], tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )  # fmt: skip
        labels = torch.full_like(batch["input_ids"], -100)
        for label, ids in zip(labels, batch["input_ids"].tolist(), strict=True):
            learns = False
            for at, token in enumerate(ids):
                learns = learns or ids[at - len(begin) : at] == begin
                if learns:
                    label[at] = token
                learns = learns and token != end
        return {**batch, "labels": labels}

    class Timed(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    Timed.get_batch_samples = waits.timed(Timed.get_batch_samples)  # type: ignore[method-assign]
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    network.model.vision_tower.requires_grad_(False)
    trained = json.loads(rows.read_text())
    trainer = Timed(
        model=network, data_collator=collate, train_dataset=trained,
        args=TrainingArguments(
            output_dir=str(folder / "out"), per_device_train_batch_size=options.batch, num_train_epochs=1,
            learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, dataloader_num_workers=options.workers, remove_unused_columns=False,
            disable_tqdm=True, optim="adamw_torch",
        ),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    batches = [trained[at : at + options.batch] for at in range(0, len(trained), options.batch)]
    tokens = [int(collate(batch)["attention_mask"].sum()) for batch in batches]
    return figures(waits, tokens, losses)


def figures(waits: Waits, tokens: list[int], losses: list[float]) -> dict[str, Any]:
    """Of the steps between the first and the last, which alone have a beginning and an end."""
    steps = len(losses)
    spans = [b - a for a, b in pairwise(waits.starts[:steps])][1:]
    waited = waits.seconds[1 : steps - 1]
    return {
        "share": sum(waited) / sum(spans), "longest": max(waited), "step": statistics.median(spans),
        "speed": sum(tokens[1 : steps - 1]) / sum(spans), "losses": losses, "tokens": sum(tokens),
    }  # fmt: skip


def measure(side: str) -> dict[str, Any]:
    """The figures of a run in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--side", side], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("FIGURES "))


def one_side(options: argparse.Namespace) -> None:
    """Run `options.side` in this process and print its figures as JSON."""
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = run_llmtune if options.side == "llmtune" else run_trainer
        found = run(options, folder, make_model(options, folder), make_rows(options, folder))
    print("\nFIGURES " + json.dumps(found))


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    """Same rows and weights: the same tokens, and losses that only rounding sets apart."""
    (expected, *_), (own, *_) = (found[side] for side in SIDES)
    close = all(abs(a / b - 1) < 1e-3 for a, b in zip(own["losses"], expected["losses"], strict=True))
    if not close or own["tokens"] != expected["tokens"]:
        what = f"llmtune: losses {own['losses'][:3]} of {own['tokens']} tokens are not the Trainer's "
        raise SystemExit(f"{what}{expected['losses'][:3]} of {expected['tokens']}; nothing is reported")


def table(options: argparse.Namespace) -> str:
    """Sides take turns, so that a slow minute of the machine hits both."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(options.repeats):
        for side in SIDES:
            found[side].append(measure(side))
            print(f"turn {turn + 1}: {side}: {json.dumps({**found[side][-1], 'losses': None})}", flush=True)
    check(found)

    def middle(side: str, name: str) -> float:
        return statistics.median(run[name] for run in found[side])

    lines = [
        "| side | waits for its batch | longest wait | a step | tokens/s | against it | first loss | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        losses, times = found[side][0]["losses"], middle(side, "speed") / middle(SIDES[0], "speed")
        lines.append(
            f"| {side} | {middle(side, 'share'):.2%} | {1000 * middle(side, 'longest'):.1f} ms | "
            f"{1000 * middle(side, 'step'):.0f} ms | {middle(side, 'speed'):.0f} | {times:.2f} x | {losses[0]:.5f} | "
            f"{losses[-1]:.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_side(options)
        return
    import torch
    import transformers

    text = (
        f"# Does a step wait for pictures?\n\n{cpu_name()}, {os.cpu_count()} cores, {options.threads} threads for the "
        f"step, {options.workers} workers; torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}. The rows of {Path(options.data).name}, repeated to {options.rows}, "
        f"{options.batch} a step; LLaVA of {options.layers} layers of {options.width} in tower and language model, "
        f"{PIXELS} x {PIXELS} pixels; medians of {options.repeats} runs.\n\n{table(options)}\n\n"
        "What the columns mean stands at the top of `benchmarks/media.py`. Rerun: "
        f"`python benchmarks/media.py {Path(options.data).name} --rows {options.rows} --repeats {options.repeats}`\n"
    )
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
