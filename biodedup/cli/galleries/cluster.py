"""Defines the commands that operate a register's replicas on a Ray cluster: cluster status, up, drain, upgrade."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import settings
from biodedup.cli.options import ConfigOption, JsonOption
from biodedup.cli.printing import counted, finish, progress_bar, say, show_table
from biodedup.config import ClusterConfig
from biodedup.errors import InvalidInput

cluster = typer.Typer(no_args_is_help=True, help="Operate a register's replicas on a Ray cluster.")
app.add_typer(cluster, name="cluster", rich_help_panel=Panel.GALLERY)

UrlArgument = Annotated[
    str, typer.Argument(metavar="URL", help="The register: postgresql://user@host/database?gallery=NAME")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="The Ray cluster: host:port or auto; default: from the settings."),
]
WaitOption = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait until front-ends have followed.")
]


@cluster.command()
def status(
    url: UrlArgument, ray: AddressOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Show the nodes and the replicas that search a register's segments. Changes nothing.

    MB: the size of a node's segments; MB at most: the memory that the node may use. has, lacks: segments of the register; old: segments that no
    search needs any more; queue: searches that run or wait; p50/p99: of the replica's last thousand searches, in ms.
    """
    stated = _stated(ray, config)
    with _extra():
        from biodedup.cluster.status import cluster_status
    found = cluster_status(url, stated)
    if as_json:
        finish(found.to_dict(), "", as_json)
        return
    say(f"version {found.version}, {counted(found.rows, 'row')}, {counted(found.segments, 'segment')}")
    show_table(
        [
            [n.node[:8], n.address, _state(n), n.replicas, _megabytes(n.scanned_bytes), _megabytes(n.bytes_max)]
            for n in found.nodes
        ],
        ["node", "address", "state", "replicas", "MB", "MB at most"],
    )
    show_table(
        [
            [
                *(r.group, r.node[:8], r.release, r.state, r.segments, r.lacking, r.old, r.searching + r.waiting),
                "" if r.p50_ms is None or r.p99_ms is None else f"{r.p50_ms:.3g}/{r.p99_ms:.3g}",
            ]
            for r in found.replicas
        ],
        ["group", "node", "release", "state", "has", "lacks", "old", "queue", "p50/p99"],
    )
    if found.unserved:
        say(f"no replica has {counted(len(found.unserved), 'segment')}; front-ends search such segments themselves")
    for shortage in found.shortages:
        say(shortage)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def _state(node: Any) -> str:
    if not node.is_alive:
        return "lost"
    return "drained" if node.is_drained else "alive"


@cluster.command()
def up(
    part: Annotated[
        str,
        typer.Argument(
            metavar="head|shards|front-end",
            help="The role of this machine: the head of the Ray cluster, a node that holds shards, or a machine of front-ends.",
        ),
    ],
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="HOST:PORT", help="The address of the head; default: ray_address of the settings."
        ),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option("--cpus", min=1, help="Processors for shards; default: all of this machine.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory", metavar="BYTES", min=1, help="Memory for replicas on this machine; default: as Ray finds."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start this machine's part of the Ray cluster with `ray start`. `ray stop` ends it.

    It starts nothing else: a supervisor such as systemd or Kubernetes starts and watches PostgreSQL, the segment store and front-ends.
    """
    with _extra():
        from biodedup.cluster.starting import start, start_command
    stated = settings(None, config).config.cluster
    arguments = start_command(part, ray or (None if stated is None else stated.ray_address), cpus, memory)
    text = f"ray {' '.join(arguments)}"
    lines = [text] if dry_run else [f"started: {text}"]
    if os.environ.get("RAY_AUTH_MODE") != "token":
        lines.append(
            "note: RAY_AUTH_MODE is not `token`: every program that reaches Ray's ports can run code on its nodes"
        )
    if not dry_run:
        start(arguments)
    finish({"command": ["ray", *arguments], "started": not dry_run}, lines, as_json)


@cluster.command()
def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="The beginning of the node's id, or its address.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let the node hold replicas again.")] = False,
    wait: WaitOption = 120.0,
    ray: AddressOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move all replicas away from a node, so that the node can be stopped without an incomplete search. Does not stop the node.

    Front-ends move the replicas: they first start them on other nodes. Exit code 3: a front-end still uses an actor of the node; start the same
    command again.
    """
    with _extra():
        from biodedup.cluster import operating
    stated = settings(None, config).config.cluster
    address = ray or (None if stated is None else stated.ray_address)
    if undo:
        done = operating.undrain(address, node)
        finish(done.to_dict(), f"{done.node[:12]} ({done.address}) may hold replicas again", as_json)
        return
    with progress_bar(lines=not as_json) as progress:
        done = operating.drain(address, node, wait, progress)
    about = f"{done.node[:12]} ({done.address})"
    if done.asked:
        text = f"{about} is drained, but front-ends still use {counted(done.asked, 'actor')} there; do not stop it yet"
    else:
        text = f"{about} is drained: {counted(done.ended, 'actor')} ended, the node can be stopped"
    finish(done.to_dict(), text, as_json)
    if done.asked:
        raise typer.Exit(Exit.RETRY)


@cluster.command()
def upgrade(
    url: UrlArgument,
    wait: WaitOption = 600.0,
    ray: AddressOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace the actors of other releases: start actors of this release beside them, and end the old ones when no front-end uses them.

    First install the release on all nodes; running actors are not affected. Restart the front-ends, one after the other, while the command waits.
    Exit code 3: a new actor does not serve yet, or a front-end still uses an old one; start the same command again.
    """
    with _extra():
        from biodedup.cluster import operating
    stated = _stated(ray, config)
    with progress_bar(lines=not as_json) as progress:
        done = operating.upgrade(url, stated, wait, progress, settings(None, config).config.keys)
    lines = [f"{done.serving} of {counted(done.wanted, 'replica')} serve with {done.release}"]
    if done.serving == done.wanted:
        lines.append(f"{counted(done.ended, 'actor')} of other releases ended, {done.asked} still in use by front-ends")
    finish(done.to_dict(), lines, as_json)
    if done.serving < done.wanted or done.asked:
        raise typer.Exit(Exit.RETRY)


def _stated(ray: str | None, config: Path | None) -> ClusterConfig:
    stated = settings(None, config).config.cluster
    if stated is None:
        raise InvalidInput("the settings have no [cluster] with segments and ray_address; name the file with --config")
    return stated if ray is None else replace(stated, ray_address=ray)


@contextmanager
def _extra() -> Iterator[None]:
    """Wraps the import of modules that need the extra `cluster`. Raises InvalidInput if it is not installed."""
    try:
        yield
    except ImportError as error:
        raise InvalidInput(f"a register in PostgreSQL needs {error.name}; pip install 'biodedup[cluster]'") from error
