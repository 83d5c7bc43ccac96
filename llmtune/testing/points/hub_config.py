"""Laws of hubs: they list, fetch and keep what a repository holds, and say what is not there."""

from __future__ import annotations

import pickle
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from llmtune.contract.hubs import NotOnHub, Repository
from llmtune.testing.contract import Broken, Check, Subject, names


def laws(subject: Subject) -> list[Check]:
    """All; those that ask the hub where a repository is named."""
    asked = [lists_what_there_is, fetches_what_is_asked, keeps_what_it_fetched, says_what_is_not_there]
    return [travels_without_showing_its_token, *(asked if subject.repository else [])]


def travels_without_showing_its_token(subject: Subject, folder: Path) -> None:
    """The hub can be pickled, as workers fetch, too, and its text holds no token that its block gives."""
    hub = subject.built()
    try:
        pickle.loads(pickle.dumps(hub))
    except Exception as error:
        raise Broken(f"it cannot be pickled: {error}", "Keep plain values, and open connections when asked") from error
    token = subject.parameters.get("token")
    if token and (str(token) in repr(hub) or str(token) in repr(subject.config())):
        raise Broken("its text holds the token", "Write field(repr=False) for it")


def lists_what_there_is(subject: Subject, folder: Path) -> None:
    """`files` has each file of the repository by its path, with its SHA-256 or None."""
    found = subject.built().files(_repository(subject, folder)).sha256
    if lost := set(subject.files) - set(found):
        raise Broken(f"it does not list {names(list(lost))}", "List every file, those in folders by their path")
    for name, content in subject.files.items():
        if found[name] not in (None, sha256(content).hexdigest()):
            raise Broken(f"it states another hash for {name}", "State the SHA-256 of the content, or None")


def fetches_what_is_asked(subject: Subject, folder: Path) -> None:
    """`download` gives a folder with the files that are asked for, byte for byte, and fetches no others."""
    first, *others = subject.files
    place = subject.built().download(_repository(subject, folder), [first])
    if not (place / first).is_file() or (place / first).read_bytes() != subject.files[first]:
        raise Broken(f"{first} is not in the folder as the hub holds it", "Fetch the files that are asked for")
    if more := [name for name in others if (place / name).exists()]:
        raise Broken(f"{names(more)} came along", "Fetch nothing else: repositories hold more than is needed")


def keeps_what_it_fetched(subject: Subject, folder: Path) -> None:
    """`cached` is None before anything was fetched, and the folder of `download` afterwards, within `cache_dir`."""
    repository, hub = _repository(subject, folder), subject.built()
    if hub.cached(repository) is not None:
        raise Broken("`cached` is not None before anything was fetched", "Look into `cache_dir`")
    place, found = hub.download(repository, list(subject.files)), subject.built().cached(repository)
    if found is None or any(not (found / name).is_file() for name in subject.files):
        raise Broken(f"`cached` is {found} after all was fetched to {place}", "Give the folder of `download`")
    if not found.resolve().is_relative_to(folder.resolve()):
        raise Broken(f"{found} is not within `cache_dir`", "Keep files in the repository's `cache_dir`")


def says_what_is_not_there(subject: Subject, folder: Path) -> None:
    """A repository that is not there is NotOnHub, with a sentence that names it."""
    absent = replace(_repository(subject, folder), name=f"{subject.repository}-absent")
    try:
        subject.built().files(absent)
    except NotOnHub as error:
        if absent.name not in str(error):
            raise Broken(f"the sentence does not name {absent.name}: {error}", "Name what is not there") from None
        return
    except Exception as error:
        raise Broken(f"it raised {type(error).__name__}: {error}", "Raise NotOnHub") from error
    raise Broken("nothing was raised for a repository that is not there", "Raise NotOnHub")


def _repository(subject: Subject, folder: Path) -> Repository:
    return Repository(name=subject.repository, cache_dir=folder / "cache")
