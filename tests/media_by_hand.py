"""What transformers says to answers about pictures, from a whole forward of one row at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtune.media.loading import load_processor
from tests.tiny_audio import heard


class Asked(NamedTuple):
    """A question, with `<image>` for each of its pictures and `<audio>` for each of its sounds."""

    text: str
    images: Sequence[str] = ()
    audios: Sequence[str] = ()

    def row(self, **more: Any) -> dict[str, Any]:
        shown = {"images": [*self.images], "audios": [*self.audios]}
        return {"prompt": self.text, **{name: files for name, files in shown.items() if files}, **more}

    def turn(self, place: Path) -> dict[str, Any]:
        from PIL import Image

        images = ({"type": "image", "image": Image.open(place / name)} for name in self.images)
        audios = ({"type": "audio", "audio": heard(place / name)} for name in self.audios)
        shown = {"<image>": images, "<audio>": audios}
        pieces = [piece for piece in re.split("(<image>|<audio>)", self.text) if piece]
        parts = [next(shown[each]) if each in shown else {"type": "text", "text": each} for each in pieces]
        return {"role": "user", "content": parts}


class Plain:
    """A model of transformers and its processor."""

    def __init__(self, model: Any, folder: Path, place: Path) -> None:
        from transformers import AutoModelForImageTextToText

        load = AutoModelForImageTextToText.from_pretrained
        self.model = (load(model, dtype=torch.float32) if isinstance(model, Path) else model).eval()
        self.processor, self.place = load_processor(folder), place

    def inputs(self, turns: Sequence[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
        return dict(
            self.processor.apply_chat_template(
                [*turns], tokenize=True, return_dict=True, return_tensors="pt", **options
            )
        )

    def answer(self, asked: Asked, text: str) -> list[int]:
        """The tokens of an answer, up to its end."""
        turn = asked.turn(self.place)
        start = self.inputs([turn], add_generation_prompt=True)["input_ids"].shape[1]
        said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return self.inputs([turn, said])["input_ids"][0, start:-1].tolist()

    def logps(self, asked: Asked, answer: Sequence[int], temperature: float = 1.0) -> Tensor:
        """(tokens,) the log-probability of each token of an answer."""
        start, found = self.after(asked, answer)
        logits = found.logits[0, start - 1 : -1].float()
        return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)

    def after(self, asked: Asked, answer: Sequence[int]) -> tuple[int, Any]:
        """The tokens of a question, and what the model says to it and to these tokens of an answer."""
        inputs = self.inputs([asked.turn(self.place)], add_generation_prompt=True)
        prompt = inputs["input_ids"]
        new = torch.tensor([list(answer)])
        for name in [name for name, each in inputs.items() if each.shape[:2] == prompt.shape]:
            more = {"input_ids": new, "attention_mask": torch.ones_like(new)}.get(name, torch.zeros_like(new))
            if name == "cross_attention_mask":
                more = inputs[name][:, -1:].expand(-1, new.shape[1], -1, -1)
            inputs[name] = torch.cat([inputs[name], more], 1)
        return prompt.shape[1], self.model(**inputs, output_hidden_states=True)


def shaken(folder: Path, target: Path, by: float = 0.05) -> Path:
    """A copy of a model with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    moved = {name: each + by * torch.randn(each.shape, generator=generator) for name, each in tensors.items()}
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    return target


def decided_by_what_is_shown(folder: Path) -> Path:
    """The model, its weights made large enough for what is shown to decide the answer."""
    from transformers import AutoModelForMultimodalLM

    model: Any = AutoModelForMultimodalLM.from_pretrained(folder)
    for each in model.parameters():
        each.data.mul_(4)
    model.save_pretrained(folder)
    return folder


class AnswersByHand:
    """A model and its processor, as transformers opens them."""

    def __init__(self, folder: Path, place: Path) -> None:
        from transformers import AutoModelForMultimodalLM

        self.processor, self.place = load_processor(folder), place
        self.model: Any = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, messages: Sequence[dict[str, Any]], tokens: int = 6) -> str:
        """What the model answers to messages whose parts name files."""
        own = self.processor
        turns = []
        for message in messages:
            said = message["content"]
            parts = [{"type": "text", "text": said}] if isinstance(said, str) else [self._part(part) for part in said]
            turns.append({**message, "content": parts})
        batch = own.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        never = [*own.image_token_ids, *own.video_token_ids, *own.audio_token_ids]
        with torch.no_grad():
            said = self.model.generate(
                **batch, do_sample=False, max_new_tokens=tokens, suppress_tokens=[each for each in never if each],
                eos_token_id=own.tokenizer.eos_token_id, pad_token_id=own.tokenizer.pad_token_id,
            )  # fmt: skip
        return own.tokenizer.decode(said[0, batch["input_ids"].shape[1] :]).strip()

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        if part["type"] == "image":
            return {"type": "image", "image": Image.open(self.place / part["image"])}
        return {"type": "audio", "audio": heard(self.place / part["audio"])} if part["type"] == "audio" else part
