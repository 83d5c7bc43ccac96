"""Exports on their way to the hub: what could not be sent is sent by the same command again, without a new merge."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from llmtune.contract.errors import LlmtuneError, PlanError
from llmtune.folders import write_durably
from llmtune.inference.reopen import saved_at
from llmtune.model.huggingface import HuggingFace
from llmtune.recipe.parts import hub_of
from llmtune.recipe.recipe import Recipe


class UploadError(LlmtuneError):
    """An export that is written, and could not be sent."""


@dataclass(frozen=True)
class Upload:
    """An export for a repository of the hub."""

    folder: Path
    repository: str
    token: str | None
    asked: str
    """What was exported, by which the same command is known again."""

    @classmethod
    def of(cls, path: str | Path, recipe: Recipe, target: Path, overrides: Mapping[str, Any]) -> Upload | None:
        """That of an export of `path` to `target`; None where it is not to be sent. Raises PlanError for a hub that is
        not sent to, and for what no repository can be called."""
        if not (repository := recipe.export.export_hub_model_id):
            return None
        if not isinstance(hub := hub_of(recipe), HuggingFace):
            raise PlanError(
                f"export_hub_model_id: llmtune uploads to Hugging Face alone, and hub_config is {hub.title}; remove "
                f"the key and upload {target} with that hub's own command, or set hub_config: huggingface"
            )
        try:
            validate_repo_id(repository)
        except HFValidationError:
            raise PlanError(f'export_hub_model_id: found "{repository}", allowed is a name like owner/name') from None
        saved = saved_at(path)
        written = (saved.checkpoint or saved.run / "run.json").stat().st_mtime_ns if saved else None
        keys = {key: value for key, value in overrides.items() if key != "token"}
        asked = json.dumps([str(Path(path).resolve()), written, keys], sort_keys=True, default=str)
        return cls(target, repository, recipe.model.token, asked)

    @property
    def _record(self) -> Path:
        folder = self.folder.absolute()
        return folder.with_name(f".{folder.name}.not-uploaded")

    @property
    def waits(self) -> bool:
        """Whether the same export is written already, and was not sent."""
        record = self._record
        return self.folder.is_dir() and record.is_file() and record.read_text(encoding="utf-8") == self.asked

    def send(self) -> None:
        """Send the folder as one commit. Raises UploadError where that cannot be done, which says how it can be."""
        write_durably(self._record, self.asked)
        try:
            hub = HfApi(token=self.token)
            hub.create_repo(self.repository, exist_ok=True)
            hub.upload_folder(
                repo_id=self.repository, folder_path=self.folder, commit_message="Upload by llmtune export"
            )
        except Exception as error:  # transport errors belong to httpx, httpx2 or the system
            by_hand = f"hf upload {shlex.quote(self.repository)} {shlex.quote(str(self.folder))} ."
            raise UploadError(
                f"export_hub_model_id: {self.folder} is written, but not uploaded to {self.repository}: "
                f"{_reason(error)}; run the same command again, which then only uploads, or: {by_hand}"
            ) from error
        self._record.unlink()


def _reason(error: Exception) -> str:
    """What kept an upload, as half a sentence."""
    if isinstance(error, HfHubHTTPError) and (status := error.response.status_code) in (401, 403):
        return f"the hub refuses it ({status}); run `hf auth login`, or set token=..., with one that may write there"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    said = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
    return f"the hub refuses it ({said})" if isinstance(error, HfHubHTTPError) else f"no way to the hub ({said})"
