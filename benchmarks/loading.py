"""How much memory, reading and time does it take to load a model onto several ranks?

    python benchmarks/loading.py [--ranks 4] [--gigabytes 2.2] [--folder DIR] [--repeats 3] [--write RESULT.md]

Makes a checkpoint of random bfloat16 weights in the shape of a small Llama, in several safetensors files, and loads it
with each way of loading, once as it is (bfloat16 with a LoRA adapter) and once quantised to nf4. Ranks are gloo
processes on this machine, with one thread each. The peer is plain reading: as many processes, each of which reads its
share of the same files into memory and keeps it. For every rank: peak resident memory while loading beyond what the
process holds before (the kernel's VmHWM, reset after imports, planning and the process group), the shard it ends up
with, and bytes that it asked of the kernel (rchar of /proc/self/io). Times are medians, of the slowest rank, from the
planned structure to the loaded model; the page cache is dropped before each run where the user may do that (root).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.testing import in_ranks, tiny_chats, tiny_tokenizer

WAYS = ("init_on_meta", "init_on_rank0", "init_on_default")
MB = 1e6
ALLOWED_MB, ALLOWED_READ, ALLOWED_TIME = 300, 1.1, 1.5


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A Llama of 2048 wide layers, as many as it takes, four layers a file."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    width, inner, vocabulary = 2048, 5632, 32000
    layer_bytes = 2 * (4 * width * width + 3 * width * inner)
    layers = max(4, round((gigabytes * 1e9 - 4 * vocabulary * width) / layer_bytes))
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer().save_pretrained(folder)
    shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width)}
    shapes |= {"self_attn.v_proj": (width, width), "self_attn.o_proj": (width, width)}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    where: dict[str, str] = {}
    total = 0
    files = [range(start, min(start + 4, layers)) for start in range(0, layers, 4)]
    for number, own in enumerate([None, *files]):
        tensors: dict[str, torch.Tensor] = {}
        if own is None:
            tensors = {f"{name}.weight": torch.randn(vocabulary, width).bfloat16() for name in ("lm_head",)}
            tensors["model.embed_tokens.weight"] = torch.randn(vocabulary, width).bfloat16()
            tensors["model.norm.weight"] = torch.ones(width).bfloat16()
        for layer in own or ():
            prefix = f"model.layers.{layer}"
            tensors |= {f"{prefix}.{n}.weight": (torch.randn(s) * 0.02).bfloat16() for n, s in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(width).bfloat16()
        name = f"model-{number + 1:05}-of-{len(files) + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * 2 for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tiny_chats(folder)


def recipe(folder: Path, way: str, nf4: bool) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "model": str(folder), "dataset": str(folder / "chats.jsonl"), "device": "cpu", "pure_bf16": True,
        "output_dir": str(folder / "run"), "init_config": way, "peft_config": {"name": "lora", "r": 8},
    }  # fmt: skip
    return keys | ({"quant_config": {"name": "bnb", "double_quantization": False}} if nf4 else {})


def load(keys: dict[str, Any]) -> dict[str, float]:
    """On each rank: load once; figures in bytes and seconds."""
    import torch.distributed as dist

    from llmtune.distributed.placement import local
    from llmtune.distributed.ranks import join, ranks_from_environment
    from llmtune.planning.make import make_plan
    from llmtune.recipe.recipe import load_recipe
    from llmtune.recipe.registry import Registry
    from llmtune.training.building import build_objective

    ranks, device = ranks_from_environment(), __import__("torch").device("cpu")
    plan = make_plan(load_recipe(keys), Registry(), ranks, device)
    join(ranks, device)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    idle, read = status("VmRSS"), kernel_reads()
    started = time.perf_counter()
    build_objective(plan.model)
    seconds = time.perf_counter() - started
    tensors = {id(tensor): local(tensor) for tensor in [*plan.model.module.parameters(), *plan.model.module.buffers()]}
    return {
        "peak": status("VmHWM") - idle, "read": kernel_reads() - read, "seconds": seconds,
        "shard": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    }  # fmt: skip


def read_and_quantise(folder: Path) -> dict[str, float]:
    """The same, each share handed to bitsandbytes."""
    return read_plainly(folder, quantise=True)


def read_plainly(folder: Path, quantise: bool = False) -> dict[str, float]:
    """On each rank: this rank's share of every file, kept in memory."""
    import torch
    import torch.distributed as dist
    from bitsandbytes.functional import quantize_4bit

    from llmtune.distributed.ranks import join, ranks_from_environment

    ranks = ranks_from_environment()
    join(ranks, torch.device("cpu"))
    kept = []
    dist.barrier()
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            file.seek(size * ranks.rank // ranks.size)
            left = size * (ranks.rank + 1) // ranks.size - file.tell()
            kept.append(bytearray(left))
            view = memoryview(kept[-1])
            while view:
                view = view[file.readinto(view) or len(view) :]  # type: ignore[attr-defined]
        # The first file holds embeddings and output head, which stay as they are.
        if quantise and not path.name.startswith("model-00001"):
            weights = torch.frombuffer(kept.pop(), dtype=torch.bfloat16, count=left // 128 * 64)
            for part in weights.split(2**23):
                quantize_4bit(part, blocksize=64, quant_type="nf4")
    return {"seconds": time.perf_counter() - started}


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def kernel_reads() -> int:
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def repeated(work: Callable[..., Any], argument: Any, options: argparse.Namespace) -> list[list[dict[str, float]]]:
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.repeats):
            forget_files()
            found.append(in_ranks(options.ranks, Path(scratch), work, argument))
    return found


def forget_files() -> bool:
    """Empty the page cache. Whether that was allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def slowest(found: list[list[dict[str, float]]]) -> float:
    return statistics.median(max(rank["seconds"] for rank in run) for run in found)


def table(folder: Path, options: argparse.Namespace) -> str:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    largest = 32000 * 2048 * 2
    peers = {
        False: slowest(repeated(read_plainly, folder, options)),
        True: slowest(repeated(read_and_quantise, folder, options)),
    }
    rows = [
        f"Checkpoint {size / MB:,.0f} MB in {len(list(folder.glob('*.safetensors')))} files, largest tensor "
        f"{largest / MB:,.0f} MB; {options.ranks} ranks on {os.cpu_count()} cores of {platform.machine()}; "
        f"files {'on disk' if forget_files() else 'in the page cache'}. Plain reading takes {peers[False]:.2f} s, with "
        f"bitsandbytes' quantising of what was read {peers[True]:.2f} s.",
        "",
        "| base | init_config | shard, MB | peak beyond idle, MB (largest rank) | peak - shard - largest tensor, MB | "
        "bytes read / checkpoint | of it by ranks other than the first | seconds "
        "| / plain reading (nf4: and quantising) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for nf4 in (False, True):
        for way in WAYS:
            found = repeated(load, recipe(folder, way, nf4), options)
            last = found[-1]
            worst = max(last, key=lambda rank: rank["peak"] - rank["shard"])
            read = [rank["read"] / size for rank in last]
            seconds = slowest(found)
            over = worst["peak"] - worst["shard"] - largest
            rows.append(
                f"| {'nf4' if nf4 else 'bfloat16'} | `{way}` | {worst['shard'] / MB:,.0f} | {worst['peak'] / MB:,.0f} "
                f"| {over / MB:,.0f} | {sum(read):.2f} | {sum(read[1:]):.2f} | {seconds:.2f} "
                f"| {seconds / peers[nf4]:.1f} |"
            )
    rows += [
        "",
        f"Aims for `init_on_meta`: at most {ALLOWED_MB} MB beyond shard and largest tensor, {ALLOWED_READ} times the "
        f"checkpoint read, {ALLOWED_TIME} times the time of plain reading.",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here; made if it is not there")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "model"
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_checkpoint(folder, options.gigabytes)
        text = table(folder, options)
    print(text)
    if options.write:
        options.write.write_text(f"# Loading\n`python benchmarks/loading.py --ranks {options.ranks}`\n\n{text}\n")


if __name__ == "__main__":
    main()
