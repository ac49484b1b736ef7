"""The Hugging Face Hub: fetching single files of an adapter, uploading a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError


def fetch(repo: str, filename: str, **kwargs: Any) -> Path | None:
    """The local path of one file of a Hub repository; None if the repository has no such file.

    Raises:
        AdapterFileError: there is no such repository, or the Hub cannot be reached and nothing is cached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename, **kwargs))
    except LocalEntryNotFoundError as error:
        raise AdapterFileError(
            f'"{repo}" is not a local folder, the Hub cannot be reached and its cache does not hold {filename}; '
            "check the path, or the network and HF_HUB_OFFLINE"
        ) from error
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise AdapterFileError(f'"{repo}" is neither a local folder nor a repository on the Hub (or it is private)') from error
    except OSError as error:
        raise AdapterFileError(f'"{repo}" is not a local folder, and the Hub cannot be reached: {error}') from error


def push_folder(
    save: Callable[[str], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
) -> str:
    """Write a folder with `save` and upload it as one commit; returns the commit's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    return str(commit.commit_url)
