"""A finished subject in a repository of a model hub, sent in one commit: all of it is there, or nothing new."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dbtrain.errors import ConfigError, DataError, first_line
from dbtrain.results.card import HUB_ID
from dbtrain.results.record import RECORD, finished_record
from dbtrain.results.upload import result_files

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


def push(folder: Path, repo: str, public: bool = False) -> str:
    """The address of the commit that holds a finished subject. Files that are there already are not sent again.

    repo: USER/NAME; a repository that does not exist is made, private unless `public`. Endpoint and token are those of
    huggingface_hub: HF_ENDPOINT, HF_TOKEN or a login. Raises DataError where the hub refuses or does not answer, and
    where a file is not there as it was sent.
    """
    if not HUB_ID.fullmatch(repo):
        raise ConfigError(f"--to: {repo!r} is no repository of a hub; write USER/NAME")
    names = [*result_files(folder, finished_record(folder)), RECORD]
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    adds = [CommitOperationAdd(name, str(folder / name)) for name in names]
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.create_commit(repo, adds, commit_message=f"{folder.name}, trained with dbtrain")
        there = {info.path: info for info in api.get_paths_info(repo, names, revision=commit.oid)}
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        do = LOGIN if status in (401, 403, 404) else "run the same command again later"
        raise DataError(f"{repo}: {api.endpoint} refuses ({first_line(error)}); {do}") from None
    except OfflineModeIsEnabled as error:
        raise DataError(f"{repo}: {first_line(error)}; unset HF_HUB_OFFLINE") from None
    except Exception as error:  # the library's own, and those of the library that it speaks HTTP with
        raise DataError(f"{repo}: {api.endpoint}: {first_line(error)}; run the same command again") from error
    for name in names:
        lfs = getattr(there.get(name), "lfs", None)
        got = lfs.sha256 if lfs else getattr(there.get(name), "blob_id", None)
        if got != (_sha256 if lfs else _git_id)((folder / name).read_bytes()):
            raise DataError(f"{repo}: {name} is not there as it was sent (got {got}); run the same command again")
    return str(commit.commit_url)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
