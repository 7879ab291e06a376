"""Defines the commands on the encryption of a gallery: encrypt, decrypt, key new, key status, key rekey, key rotate.

Each runs one job, or calls one method of the engine. A key comes from a file, an environment variable or a command, which the settings name
(`[keys]`). It is never an argument, and never printed.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.opening import acting, configured, existing, in_turn
from biodedup.cli.options import (
    DEFAULT_GALLERY,
    ConfigOption,
    FolderOption,
    JsonOption,
    PersonOption,
    SignOption,
    WaitOption,
)
from biodedup.cli.printing import finish, progress_bar
from biodedup.config import Config
from biodedup.errors import InvalidInput
from biodedup.keys import KeyProvider, KeySource

key = typer.Typer(no_args_is_help=True, help="Make, show and rotate the key of encrypted galleries.")
app.add_typer(key, name="key", rich_help_panel=Panel.GALLERY)


def _stated(config: Config) -> KeySource:
    keys = config.keys
    if keys is None:
        raise InvalidInput("no key is configured; name its source in the settings file, such as [keys] file = ...")
    return keys


@app.command(rich_help_panel=Panel.GALLERY)
def encrypt(
    by: PersonOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encrypt a gallery under the key that the table `keys` of the settings names.

    Needs free disk space of the gallery's size. An interrupted run resumes when the same command is started again. Afterwards free blocks of the
    disk may still hold the unencrypted gallery: erase the free space, or move the gallery to a new disk.
    """
    chosen = configured(gallery, config)
    status = in_turn(gallery, wait, lambda: jobs.encrypt(gallery, _stated(chosen), chosen, by=by, sign=sign))
    finish(asdict(status), f"{gallery} is encrypted under key {status.register_key_id}", as_json)


@app.command(rich_help_panel=Panel.GALLERY)
def decrypt(
    by: PersonOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decrypt a gallery. Remove the table `keys` from the settings afterwards."""
    chosen = configured(gallery, config)
    status = in_turn(gallery, wait, lambda: jobs.decrypt(gallery, _stated(chosen), chosen, by=by, sign=sign))
    finish(asdict(status), f"{gallery} is not encrypted any more", as_json)


@key.command()
def new(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")], as_json: JsonOption = False
) -> None:
    """Make a register's key: 32 random bytes in hexadecimal, in a file with mode 0600. Keep a copy: without the key, nobody can open the gallery."""
    key_id = jobs.make_register_key(file)
    finish({"key": str(file), "key_id": key_id}, f"key {key_id} is in {file}; keep a copy in a safe place", as_json)


@key.command()
def status(gallery: FolderOption = DEFAULT_GALLERY, as_json: JsonOption = False) -> None:
    """Show whether a gallery is encrypted, and under which key. Needs no key."""
    found = jobs.key_status(gallery)
    text = (
        f"{gallery} is encrypted under key {found.register_key_id}"
        if found.encrypted
        else f"{gallery} is not encrypted"
    )
    finish(asdict(found), text, as_json)


@key.command()
def rekey(
    plain: Annotated[bool, typer.Option("--plain", help="Store embeddings without a secret transform.")] = False,
    by: PersonOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store the embeddings of an encrypted gallery with a new secret transform (renewable templates).

    An interrupted run resumes when the same command is started again. At the end the old transform is destroyed. Other processes can search
    meanwhile.
    """
    with existing(gallery, configured(gallery, config), wait) as engine, progress_bar(lines=not as_json) as progress:
        transform_id = acting(engine, by, sign).rekey(
            renewable=not plain, progress=lambda done, total: progress("rekeying", done, total)
        )
    text = (
        f"{gallery} stores embeddings with transform {transform_id}"
        if transform_id
        else f"{gallery} stores embeddings without a transform"
    )
    finish({"transform": transform_id or None}, text, as_json)


@key.command()
def rotate(
    gallery: FolderOption = DEFAULT_GALLERY,
    file: Annotated[Path | None, typer.Option("--new-file", help="The file of the new key.")] = None,
    environment: Annotated[str | None, typer.Option("--new-environment", help="The variable of the new key.")] = None,
    command: Annotated[str | None, typer.Option("--new-command", help="The command that prints the new key.")] = None,
    by: PersonOption = "",
    sign: SignOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Wrap the gallery's key with a new key, immediately. Processes that have the gallery open are not affected.

    The settings must name the present key; change them afterwards. Backups need the old key until the next backup.
    """
    after = KeyProvider(file, environment, tuple(shlex.split(command or "")))
    chosen = configured(gallery, config)
    found = jobs.rotate_key(gallery, _stated(chosen), after, chosen, by=by, sign=sign)
    finish(asdict(found), f"{gallery} is encrypted under key {found.register_key_id} from now on", as_json)
