"""`tunesmith push`: an adapter to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import AdapterFileError, ConfigError


def push(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    private: Annotated[bool, typer.Option(help="Only you can see it.")] = False,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Default: the one you logged in with.")] = None,
) -> None:
    """Upload an adapter, its model card and its template, once it is found to be sound.

    \b
    Example:
      tunesmith push my-adapter me/my-adapter --private
    """
    from ..data.files import HUB_NAME

    if not HUB_NAME.fullmatch(repo_id):
        raise ConfigError(f'"{repo_id}" is no name on the hub; write it as owner/name')
    import shutil

    from ..checkpoint.summary import summarize
    from ..storage.hub import push_folder

    found = summarize(str(adapter))
    if found.faults:
        raise AdapterFileError(f"{adapter} is not uploaded: " + "; ".join(found.faults))

    def save(folder: str) -> None:
        for name in found.files:
            shutil.copyfile(adapter / name, Path(folder) / name)

    typer.echo(f"uploaded: {push_folder(save, repo_id, private=private, token=token)}")
