"""Groups subjects into clusters of one person each, given links between pairs of subjects.

Owns the connected components of the links, and how strongly each holds together. Never scores.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from biodedup.values import Cluster, Link


def clusters_of(links: Iterable[Link]) -> list[Cluster]:
    """Connected components of the links, largest first, then by subject_id; links strongest first.

    weakest_db is the weakest link of the maximum spanning tree of the cluster: without it the cluster falls apart.
    """
    unique = {tuple(sorted(link.subject_ids)): link for link in links}  # a pair may have been found from both sides
    ordered = sorted(unique.values(), key=lambda link: (-link.score_db, link.subject_ids))
    if not ordered:
        return []
    names = sorted({name for link in ordered for name in link.subject_ids})
    index = {name: i for i, name in enumerate(names)}
    ends = np.array([[index[name] for name in link.subject_ids] for link in ordered])
    # The weights are ranks by descending score, so a minimum spanning tree over them is a maximum one over scores.
    weights = np.arange(1, len(ordered) + 1)
    graph = coo_array((weights, (ends[:, 0], ends[:, 1])), shape=(len(names), len(names))).tocsr()
    count, labels = connected_components(graph, directed=False)
    tree = minimum_spanning_tree(graph)
    bottleneck = np.zeros(count, np.int64)
    np.maximum.at(bottleneck, labels[tree.nonzero()[0]], tree.data.astype(np.int64))
    members: list[list[str]] = [[] for _ in range(count)]
    for name, label in zip(names, labels, strict=True):
        members[label].append(name)
    inside: list[list[Link]] = [[] for _ in range(count)]
    for link, label in zip(ordered, labels[ends[:, 0]], strict=True):
        inside[label].append(link)
    clusters = [Cluster(tuple(members[i]), tuple(inside[i]), ordered[bottleneck[i] - 1].score_db) for i in range(count)]
    return sorted(clusters, key=lambda cluster: (-len(cluster.subject_ids), cluster.subject_ids))
