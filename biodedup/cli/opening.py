"""Reads the settings of a command and opens its gallery: for reading or writing, for the person of `--by`, and with a wait for other writers.

Owns the choice how a gallery is opened. Never prints a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import biodedup as bd
from biodedup.cli.options import RegisterUrl
from biodedup.cli.printing import complain, span
from biodedup.config import Config, IsolationConfig
from biodedup.errors import GalleryBusy, InvalidInput
from biodedup.gallery.files.names import LOCK_NAME
from biodedup.settings import Settings, settings_for

WAIT_STEP_S = 0.2
_Result = TypeVar("_Result")


def settings(
    gallery: Path | RegisterUrl | None,
    file: Path | None,
    *,
    threads: int | None = None,
    across_positions: bool = False,
    more: Mapping[str, Any] | None = None,
    usual: Mapping[str, Any] | None = None,
) -> Settings:
    """The effective settings of a command. file: the file of --config; more: other options by dotted names, None if not given; usual: the
    command's own defaults."""
    given = {"threads": threads, "search.across_positions": across_positions or None, **(more or {})}
    folder = None if isinstance(gallery, RegisterUrl) else gallery
    return settings_for(folder, file, given=given, usual=usual)


def configured(gallery: Path | RegisterUrl | None, file: Path | None, **options: Any) -> Config:
    """The configuration of `settings`. Captures are decoded in worker processes, because files come from untrusted sources."""
    chosen = settings(gallery, file, **options).config
    if isinstance(gallery, RegisterUrl) and chosen.cluster is None:
        raise InvalidInput(
            "the settings do not state where the register's segments are; name a settings file with [cluster] segments by --config"
        )
    return replace(chosen, isolation=chosen.isolation or IsolationConfig())


def opened(gallery: Path | RegisterUrl, config: Config) -> bd.Engine:
    """Opens a gallery or a register read-only, and without Ray's actors: only searches need them."""
    if config.cluster is not None:
        config = replace(config, cluster=replace(config.cluster, ray_address=None))
    return bd.Engine.open(gallery, config, read_only=True)


@contextmanager
def existing(gallery: Path | RegisterUrl, config: Config, wait_s: float | None = None) -> Iterator[bd.Engine]:
    """Opens an existing gallery for writing. Raises NotAGallery if there is none, so that a mistyped path does not create an empty gallery.

    wait_s: how long to wait for another writer to end; None if the command has no option `--wait`.
    """
    if isinstance(gallery, RegisterUrl):
        if config.cluster is not None:
            from biodedup.cluster.opening import require_register  # galleries in folders need no psycopg

            require_register(gallery, config.cluster)
        with bd.Engine.open(gallery, config) as engine:
            yield engine
        return
    bd.Engine.open(gallery, config, read_only=True).close()
    with in_turn(gallery, wait_s, lambda: bd.Engine.open(gallery, config)) as engine:
        yield engine


def created(gallery: Path | RegisterUrl, config: Config, wait_s: float) -> bd.Engine:
    """Opens a gallery for writing, and creates its folder if there is none. wait_s: as in `existing`; a register has many writers."""
    if isinstance(gallery, RegisterUrl):
        return bd.Engine.open(gallery, config)
    return in_turn(gallery, wait_s, lambda: bd.Engine.open(gallery, config))


def acting(engine: bd.Engine, by: str, sign: Path | None = None, purpose: str = "") -> bd.Engine:
    """The engine, acting for the person of `--by`, if the settings name identities or a purpose is given; otherwise the engine itself. sign: the
    file of `--sign`."""
    if engine.config.identities is not None:
        return engine.as_principal(by, purpose=purpose, key=sign)
    if not purpose:
        return engine
    if not by:
        raise InvalidInput("--purpose needs the name of the caller; add --by NAME")
    return engine.as_principal(bd.Principal(by, bd.ROLES), purpose=purpose)


@contextmanager
def looked_into(
    gallery: Path | RegisterUrl, config: Config, by: str, purpose: str, *, searched: bool = False
) -> Iterator[bd.Engine]:
    """Opens a gallery to read it, for the person of `--by`. Without a person it is opened read-only, and the call is recorded under
    the operating system's user. searched: the command searches, and uses Ray's actors if the settings name them."""
    if not (by or purpose):
        with bd.Engine.open(gallery, config, read_only=True) if searched else opened(gallery, config) as engine:
            yield engine
        return
    with existing(gallery, config) as engine:
        if engine.config.audited != "all":
            complain(f'note: this call is not recorded, because the settings have audit = "{engine.config.audited}"')
        yield acting(engine, by, purpose=purpose)


def in_turn(gallery: Path, wait_s: float | None, work: Callable[[], _Result], step_s: float = WAIT_STEP_S) -> _Result:
    """Calls work, which opens a gallery for writing, and calls it again while another process holds the gallery, for wait_s seconds.

    wait_s: None raises the error of work unchanged. step_s: seconds between two calls. Raises GalleryBusy with the holder and what to do.
    """
    until, announced = time.monotonic() + (wait_s or 0), False
    while True:
        try:
            return work()
        except GalleryBusy as error:
            left = until - time.monotonic()
            if left <= 0:
                if wait_s is None:
                    raise
                waited = f"after {wait_s:g} s it was still held" if wait_s else "--wait SECONDS waits for it"
                raise GalleryBusy(f"{error}; {holder(gallery)}; {waited}") from None
            if not announced:
                complain(f"{gallery} is held for writing; {holder(gallery)}; waiting up to {wait_s:g} s")
                announced = True
            time.sleep(min(left, step_s))


def holder(gallery: Path) -> str:
    """The process that holds a gallery for writing, as a clause. Its arguments are not shown, since they may hold ids."""
    try:
        number = int((gallery / LOCK_NAME).read_text("ascii"))
        about = Path(f"/proc/{number}")
        name, age = (about / "comm").read_text("utf-8").strip(), time.time() - about.stat().st_mtime
        return f"the holder is process {number}, {name}, running for {span(age)}"
    except (OSError, ValueError):  # the process has just ended, or the system has no /proc
        return "the holder is not known"
