"""Tiny stand-ins for real models and tokenizers, made on the spot: no download, a few milliseconds each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{%- if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] or '' }}"
    "{%- for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with tools, without generation marks."""

CHATML_MARKED = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{ message['content'] + '<|im_end|>' }}{%- endgeneration %}{{ '\\n' }}"
    "{%- else %}{{ message['content'] + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML whose assistant text and end-of-turn token are marked for transformers' own assistant mask."""

_TEXT = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!",
    "Who are you? I am a small assistant, here to answer questions about numbers and names.",
    'system user assistant tool\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>',
    "What is the capital of France? The capital of France is Paris. How are you today? I am well, thank you.",
]


def tiny_tokenizer(chat_template: str | None = CHATML, vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's special tokens; `<|im_end|>` ends turns, `<|endoftext|>` pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(family: str = "llama", vocab_size: int = 384, **changes: Any) -> Any:
    """Config of a random model of `family` (llama, qwen2, qwen3, mistral, gemma2, ...): 2 layers, 32 wide, 4 heads,
    2 key-value heads. `changes` replace single values."""
    from transformers import AutoConfig

    values = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(family, **(values | changes))


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 causal language model, the same for the same seed."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)


def tiny_model_folder(
    tmp_path: Path, family: str = "llama", *, tie_word_embeddings: bool = False, seed: int = 0, **changes: Any
) -> Path:
    """Save a tiny random model and tokenizer as `tmp_path/tiny-FAMILY` and return the folder."""
    folder = Path(tmp_path) / f"tiny-{family}"
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "tie_word_embeddings": tie_word_embeddings}
    tiny_model(family, seed, **(sizes | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_chats(folder: Path, rows: int = 24) -> Path:
    """Write `rows` short conversations of different lengths, some with two turns, as OpenAI messages in JSON lines."""
    made = []
    for number in range(rows):
        messages = [
            {"role": "user", "content": f"How much is {number} and {number}?" + " Please." * (number % 4)},
            {"role": "assistant", "content": f"It is {2 * number}." + " Anything else?" * (number % 3)},
        ]
        if number % 5 == 0:
            messages += [{"role": "user", "content": "No."}, {"role": "assistant", "content": "Good day then."}]
        made.append({"messages": messages})
    return _write(folder, "chats", made)


def tiny_preferences(folder: Path, rows: int = 24) -> Path:
    """Write `rows` questions with a chosen and a rejected answer, of very different lengths, as JSON lines."""
    made = []
    for number in range(rows):
        question = f"How much is {number} and {number}?" + " Please." * (number % 4)
        chosen, rejected = f"It is {2 * number}." + " Anything else?" * (number % 3), "No." + " No." * (number % 5)
        made.append({
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        })  # fmt: skip
    return _write(folder, "preferences", made)


def tiny_labelled(folder: Path, rows: int = 24) -> Path:
    """Write `rows` questions with an answer and whether it is one to give, as JSON lines."""
    made = []
    for number in range(rows):
        good = number % 3 != 1
        answer = f"It is {2 * number}." + " Anything else?" * (number % 3) if good else "No." + " No." * (number % 5)
        messages = [{"role": "user", "content": f"How much is {number} and {number}?" + " Please." * (number % 4)}]
        made.append({"messages": [*messages, {"role": "assistant", "content": answer}], "label": good})
    return _write(folder, "labelled", made)


def tiny_prompts(folder: Path, rows: int = 24) -> Path:
    """Write `rows` questions with their right answer in the column `answer`, as JSON lines."""
    made = [
        {"prompt": f"How much is {number} and {number}?" + " Please." * (number % 4), "answer": str(2 * number)}
        for number in range(rows)
    ]
    return _write(folder, "prompts", made)


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = Path(folder) / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
