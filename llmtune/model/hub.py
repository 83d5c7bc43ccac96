"""Fetching a model from the Hugging Face hub: safetensors and text files only, quick to notice an absent network."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmtune.contract.errors import LoadError, listed
from llmtune.model.weight_files import INDEX, index_names, no_weights

_TEXT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")


class HubUnreachable(LoadError):
    """No answer from the hub, and the model is not in its cache. Another source may help."""


def fetch(
    repo: str,
    *,
    revision: str | None,
    cache_dir: Path | str | None,
    token: str | None,
    weights: bool,
    code: bool = False,
    patience_s: float = 10.0,
) -> tuple[Path, str, str]:
    """Folder in the hub's cache, the commit it holds, and a note (empty unless the cache stood in for the hub).

    `weights` also fetches the safetensors files, `code` also Python files. Raises HubUnreachable if the hub does not
    answer within `patience_s` seconds (or `HF_HUB_OFFLINE` is set) and the cache does not hold the model, LoadError
    for a model that does not exist, is gated, or has no safetensors.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    where = {"revision": revision, "cache_dir": cache_dir, "token": token}
    try:
        info = _within(
            patience_s,
            lambda: HfApi(token=token).model_info(repo, revision=revision, timeout=patience_s),
        )
        names = _wanted([sibling.rfilename for sibling in info.siblings or ()], repo, weights=weights, code=code)
        folder = Path(snapshot_download(repo, allow_patterns=names, **where))
    except HFValidationError as error:
        raise LoadError(
            f'model: "{repo}" is neither a folder here nor a hub id; a hub id is written "owner/name"'
        ) from error
    except HfHubHTTPError as error:
        if sentence := _refusal(repo, revision, error):
            raise LoadError(sentence) from error
        return _from_cache(repo, where, weights, error)
    except LoadError:
        raise
    except Exception as error:
        # Transport errors: their classes belong to httpx, httpx2 or the system, depending on huggingface_hub's version.
        return _from_cache(repo, where, weights, error)
    return folder, folder.name, ""


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Result of `call`, or TimeoutError. A name server that does not answer blocks for 10 s and more, whatever
    timeout the request has, so the wait happens in a thread that nobody joins."""
    results: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def work() -> None:
        try:
            results.put((True, call()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=work, daemon=True, name="llmtune-hub").start()
    try:
        done, result = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if not done:
        raise result
    return result


def _wanted(names: list[str], repo: str, *, weights: bool, code: bool) -> list[str]:
    """Which files of a repository are fetched. LoadError if it has no safetensors."""
    top = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    files = [name for name in top if name == "model.safetensors" or fnmatch(name, "model-*-of-*.safetensors")]
    files = files or [name for name in top if not name.startswith(("adapter", "consolidated"))]
    if not files:
        raise LoadError(no_weights(repo, names))
    patterns = (*_TEXT, "*.py") if code else _TEXT
    texts = [name for name in names if any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)]
    return texts + files if weights else texts


def _refusal(repo: str, revision: str | None, error: Exception) -> str | None:
    """What an answer of the hub means for the user; None if the hub itself is out of order."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return (
            f"model: {repo} is gated; accept its terms on https://huggingface.co/{repo}, then run `hf auth login` "
            "or set the recipe's token"
        )
    if isinstance(error, RevisionNotFoundError):
        return f'revision: {repo} has no revision "{revision}" on the hub; name a branch, a tag or a commit of it'
    if status == 401:
        return (
            f"model: the hub has no public model {repo} (401), nor is there a folder of that name here; check the "
            "spelling, or for a private model run `hf auth login` or set the recipe's token"
        )
    if status == 403:
        return f"model: the hub refuses access to {repo} (403); the token in use may not read it"
    if status == 404:
        return f"model: the hub has no model {repo} (404), nor is there a folder of that name here; check the spelling"
    if status == 429:
        return (
            f"model: the hub answers that there were too many requests (429) for {repo}; wait, or log in with a token"
        )
    return None


def _from_cache(repo: str, where: dict[str, Any], weights: bool, error: Exception) -> tuple[Path, str, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    offline = isinstance(error, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else f"the hub could not be reached ({_first_line(error)})"
    try:
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns="config.json", **where))
    except OSError:  # huggingface_hub's LocalEntryNotFoundError is one
        folder = None
    if folder is None or (missing := _missing(folder, weights)):
        found = f"; its cache lacks {listed(missing)}" if folder else ""
        raise HubUnreachable(
            f"model: {repo} is not in the hub's cache, and {why}{found}. Connect to the network once, "
            "or give a local folder"
        ) from error
    return folder, folder.name, f"{repo} comes from the hub's cache, commit {folder.name[:12]}, as {why}."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def _missing(folder: Path, weights: bool) -> list[str]:
    """Files that a cached copy lacks; an earlier fetch may have been without weights, or cut off."""
    wanted = ["config.json"]
    if weights and (folder / INDEX).is_file():
        wanted += index_names(folder / INDEX)
    elif weights and not any(folder.glob("*.safetensors")):
        wanted.append("model.safetensors")
    return [name for name in wanted if not (folder / name).is_file()]
