"""Opens a register by its URL: `postgresql://user@host/database?gallery=register`.

Owns the form of the URL, and the construction of a front-end from its parts. Never decides and never searches.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from biodedup.cluster.catalogue import Limits, PostgresCatalogue
from biodedup.cluster.gallery import ClusterGallery
from biodedup.cluster.key import new_key, place
from biodedup.cluster.scratch import make_scratch, remove_scratch
from biodedup.config import ClusterConfig, GalleryConfig
from biodedup.errors import InvalidInput
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.indexing import IndexLimits

_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


def connect(url: str, cluster: ClusterConfig) -> PostgresCatalogue:
    """The catalogue of the gallery in a URL, not yet connected. Raises InvalidInput."""
    parts = urlsplit(url)
    options = parse_qsl(parts.query, keep_blank_values=True)
    names = [value for name, value in options if name == "gallery"]
    if len(names) != 1 or not _NAME.fullmatch(names[0]):
        raise InvalidInput(
            f"the URL of a register has gallery={names[0] if names else 'none'!r:.60}, wanted lower-case letters, digits and _; "
            "write postgresql://user@host/database?gallery=register"
        )
    rest = urlencode([(name, value) for name, value in options if name != "gallery"])
    conninfo = urlunsplit((parts.scheme, parts.netloc, parts.path, rest, ""))
    seconds = max(2, -(-cluster.deadline_ms // 1000))
    return PostgresCatalogue(conninfo, names[0], Limits(seconds, cluster.deadline_ms, cluster.transaction_ms_max))


def require_register(url: str, cluster: ClusterConfig) -> None:
    """Raises NotAGallery if the database has no such gallery."""
    with closing(connect(url, cluster)) as catalogue:
        catalogue.open("", "", create=False)


def open_register(
    url: str,
    cluster: ClusterConfig | None,
    *,
    storage: Storage,
    config: GalleryConfig,
    settings: Mapping[str, Any],
    gallery_id: str,
    read_only: bool,
    limits: IndexLimits,
) -> ClusterGallery:
    """Opens a register. Creates it if the database does not have it; a new one is encrypted if the storage has a key. Raises as
    `Engine.open`."""
    if cluster is None:
        raise InvalidInput(
            "a register in PostgreSQL needs Config(cluster=ClusterConfig(segments=...)); state where its segments are, "
            "as file:///folder or s3://bucket/folder"
        )
    catalogue, folder = connect(url, cluster), cluster.cache
    try:
        key = new_key(storage)
        new = key.content, key.chain_key
        catalogue.open(gallery_id, json.dumps(settings), create=not read_only, new=new)
        folder = folder or make_scratch("biodedup-cache-")
        storage.make_folder(folder)
        place(storage, folder, key.key_id, catalogue.key_file)
        catalogue.take_key(storage.register_chain_key(folder))
        if not read_only:
            catalogue.renew()
        holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        return ClusterGallery(
            storage=storage,
            folder=folder,
            catalogue=catalogue,
            config=config,
            limits=limits,
            cluster=cluster,
            holder=holder,
            read_only=read_only,
        )
    except BaseException:
        catalogue.close()
        if folder is not None and cluster.cache is None:
            remove_scratch(folder)
        raise
