"""Commands that look after a register's replicas on Ray: cluster status."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from biodedup.cli.base import ConfigOption, JsonOption, Panel, app, counted, finish, say, settings, show_table
from biodedup.errors import InvalidInput

cluster = typer.Typer(no_args_is_help=True, help="Look after a register's replicas on Ray.")
app.add_typer(cluster, name="cluster", rich_help_panel=Panel.GALLERY)


@cluster.callback()
def _cluster() -> None:
    """Makes `status` a command of its own, although it is the only one."""


@cluster.command()
def status(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="The register: postgresql://user@host/database?gallery=NAME"),
    ],
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="The Ray cluster: host:port or auto; default: the settings'."),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the nodes and the replicas that search a register's segments. It starts and changes nothing.

    has, lacks: segments of the register; old: segments that no search needs any more; queue: searches that run or wait.
    """
    stated = settings(None, config).config.cluster
    if stated is None:
        raise InvalidInput("the settings have no [cluster] with segments and ray_address; name the file with --config")
    found = _status(url, stated if ray is None else replace(stated, ray_address=ray))
    if as_json:
        finish(found.to_dict(), "", as_json)
        return
    say(f"version {found.version}, {counted(found.rows, 'row')}, {counted(found.segments, 'segment')}")
    show_table(
        [[n.node[:12], n.address, "alive" if n.is_alive else "lost", n.replicas] for n in found.nodes],
        ["node", "address", "state", "replicas"],
    )
    show_table(
        [
            [r.group, r.node[:12], r.release, r.state, r.segments, r.lacking, r.old, r.searching + r.waiting]
            for r in found.replicas
        ],
        ["group", "node", "release", "state", "has", "lacks", "old", "queue"],
    )
    if found.unserved:
        say(f"no replica has {counted(len(found.unserved), 'segment')}; front-ends search such segments themselves")


def _status(url: str, cluster: Any) -> Any:
    try:
        from biodedup.cluster.status import cluster_status  # other commands need neither psycopg nor Ray
    except ImportError as error:
        raise InvalidInput(f"a register in PostgreSQL needs {error.name}; pip install 'biodedup[cluster]'") from error
    return cluster_status(url, cluster)
