"""`tunesmith push`: an adapter to the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..data.files import HUB_NAME
from ..errors import AdapterFileError, ConfigError


def push(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option(help="Make the repository private.")] = False,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Default: the one you are logged in with.")] = None,
) -> None:
    """Upload an adapter to the Hub. Its model card and template go with it; an adapter with faults is refused.

    \b
    Example:
      tunesmith push my-adapter me/my-adapter --private
    """
    if not HUB_NAME.fullmatch(repo_id):
        raise ConfigError(f'"{repo_id}" is not the name of a Hub repository; write it as owner/name')
    from ..checkpoint.summary import summarize
    from ..storage.hub import push_folder

    found = summarize(str(adapter))
    if found.faults:
        raise AdapterFileError(f"{adapter} was not uploaded: " + "; ".join(found.faults))

    def save(folder: str) -> None:
        for name in found.files:
            shutil.copyfile(adapter / name, Path(folder) / name)

    typer.echo(f"uploaded: {push_folder(save, repo_id, private=private, token=token)}")
