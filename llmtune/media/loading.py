"""A model's processor of pictures and sound, as transformers makes it from the model's files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """transformers' processor of the model in `folder`.

    Video is processed by torchvision, which has to fit the torch that is installed. Where there is none, models that
    see pictures as well as video get a processor of pictures alone. DataError where there is no processor.
    """
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoProcessor, ProcessorMixin
    from transformers.utils import is_torchvision_available

    files: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        kind: Any = None
        if not is_torchvision_available():
            kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(folder, **files)), None) or _named(folder)
        sees_video = kind is not None and "video_processor" in kind.get_attributes()
        found: Any = (without_video(kind) if sees_video else AutoProcessor).from_pretrained(folder, **files)
    except Exception as error:  # of a package that is not there, AttributeError as well as ImportError
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"model: its processor of pictures and sound cannot be made ({type(error).__name__}: {said}); most need "
            "pip install pillow, some torchvision as well"
        ) from error
    if not isinstance(found, ProcessorMixin):
        raise DataError(f"model: {folder} has no processor of pictures or sound; its rows can hold text only")
    return found


def _named(folder: Path) -> Any:
    """The class that the processor's own file names, as of a part of a model; None where it has none."""
    import transformers

    place = folder / "processor_config.json"
    name = json.loads(place.read_text("utf-8")).get("processor_class") if place.is_file() else None
    return getattr(transformers, str(name), None)


@cache
def without_video(kind: Any) -> Any:
    """The class of a processor, less the part that needs torchvision; what makes one gives None for that part."""
    from transformers import ProcessorMixin

    names = kind.get_attributes()
    place = names.index("video_processor")

    class WithoutVideo(ProcessorMixin):
        """What the processor's own class hands its parts to."""

        def __init__(self, *args: Any, **given: Any) -> None:
            parts = dict(zip(names, args, strict=False)) | given
            super().__init__(**{name: part for name, part in parts.items() if name != "video_processor"})

    class Processor(kind, WithoutVideo):
        """What transformers makes from files."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in names if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **options: Any) -> Any:
            said = {key: value for key, value in processor_dict.items() if key != "video_processor"}
            return super().from_args_and_dict([*args[:place], None, *args[place:]], said, **options)

    Processor.__name__ = kind.__name__
    return Processor
