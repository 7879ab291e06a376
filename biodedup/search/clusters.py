"""Groups subjects into clusters of one person each, given links between pairs of subjects.

Owns the connected components of the links, the weakest link of each, and the choice of the links that are kept. Never scores.

1. n records of one person give n(n - 1)/2 links. Of a cluster with more than `LINKS_MAX` links only a maximum spanning forest and the
   strongest and weakest links are kept, so that memory grows with n. The number of the other links is reported.
2. There is a forest for each class of links (extrapolated or not, of a trusted kind or not). So the kept links give the same clusters as all
   links, also at a higher threshold and for a part of the classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from biodedup.match.judgement import TRUSTED_KINDS
from biodedup.values import Cluster, Link

LINKS_MAX = 1_000
"""A cluster with at most this many links keeps all of them. 45 subjects that are all linked have 990."""
EXTREMES = 100
"""Number of strongest links, and of weakest links, that a larger cluster keeps beside the forest."""
_THINNED_AT = 1 << 14


def kept_links(
    ends: NDArray[np.int64], score_db: NDArray[np.float64], classes: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(whether each link is kept, bool (n,); its component, int64 (n,)). ends: int64 (n, 2), each pair once in a class. Links of equal
    strength count in the given order."""
    _, index = np.unique(ends, return_inverse=True)
    index = index.reshape(-1, 2)
    nodes = int(index.max(initial=-1)) + 1
    component = connected_components(_graph(index, np.ones(len(index)), nodes), directed=False)[1][index[:, 0]]
    large = np.bincount(component, minlength=1)[component] > LINKS_MAX
    keep = ~large
    order = np.lexsort((-score_db, component))
    order = order[large[order]]
    start = np.flatnonzero(np.diff(component[order], prepend=-1))
    length = np.diff(np.append(start, len(order)))
    rank = np.arange(len(order)) - np.repeat(start, length)
    keep[order[(rank < EXTREMES) | (rank >= np.repeat(length, length) - EXTREMES)]] = True
    for link_class in np.unique(classes[large]).tolist():
        links = np.flatnonzero(large & (classes == link_class))
        links = links[np.argsort(-score_db[links], kind="stable")]
        keep[links[_forest(index[links], nodes)[1]]] = True
    return keep, component.astype(np.int64)


def _graph(ends: NDArray[np.int64], weights: NDArray[np.float64], nodes: int) -> csr_array:
    return coo_array((weights, (ends[:, 0], ends[:, 1])), shape=(nodes, nodes)).tocsr()


def _forest(ends: NDArray[np.int64], nodes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(a node of each link, the links) of a maximum spanning forest. ends: nodes of the links, strongest first, each pair once."""
    # weights are ranks by descending score: their minimum spanning forest is the maximum spanning forest by score
    tree = minimum_spanning_tree(_graph(ends, np.arange(1.0, len(ends) + 1), nodes))
    return tree.nonzero()[0], tree.data.astype(np.int64) - 1


class Links:
    """Collects the links of a join, each pair once. Links of large clusters are thinned from time to time."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        self._left_out = Counter[str]()
        self._thinned_at = _THINNED_AT

    def add(self, links: Iterable[Link], left_out: Mapping[str, int] | None = None) -> None:
        """Adds links. If a pair was found from both sides, the later link counts. left_out: subject_id -> the number of links of its cluster
        that are left out."""
        self._links.update((_names(link), link) for link in links)
        self._left_out.update(left_out or {})
        if len(self._links) >= self._thinned_at:
            self._links = {_names(link): link for link in self.kept()}
            self._thinned_at = max(2 * len(self._links), _THINNED_AT)

    def kept(self) -> list[Link]:
        """The kept links, strongest first."""
        ordered = sorted(self._links.values(), key=lambda link: (-link.score_db, link.subject_ids))
        if len(ordered) <= LINKS_MAX:
            return ordered
        index = _index(ordered)
        ends = np.array([[index[name] for name in link.subject_ids] for link in ordered], np.int64)
        scores = np.array([link.score_db for link in ordered])
        classes = np.array([link.extrapolated + 2 * (link.kind in TRUSTED_KINDS) for link in ordered], np.int64)
        keep, component = kept_links(ends, scores, classes)
        links = [link for link, kept in zip(ordered, keep.tolist(), strict=True) if kept]
        dropped = np.bincount(component[~keep])
        first: dict[int, str] = {}
        for number, link in zip(component[keep].tolist(), links, strict=True):
            first.setdefault(number, link.subject_ids[0])
        self._left_out.update({first[i]: int(dropped[i]) for i in np.flatnonzero(dropped).tolist()})
        self._links = {_names(link): link for link in links}
        return links

    @property
    def left_out(self) -> dict[str, int]:
        """A subject of a cluster -> the number of the cluster's links that are left out."""
        return dict(self._left_out)

    def clusters(self) -> list[Cluster]:
        """As `clusters_of`."""
        return clusters_of(self.kept(), self._left_out)


def clusters_of(links: Iterable[Link], left_out: Mapping[str, int] | None = None) -> list[Cluster]:
    """Connected components of the links, the largest first, then by subject_id; links strongest first.

    weakest_db is the weakest link of the cluster's maximum spanning tree: without it the cluster would fall apart. left_out: subject_id ->
    the number of links of its cluster that are left out.
    """
    unique = {_names(link): link for link in links}  # a pair may be found from both sides
    ordered = sorted(unique.values(), key=lambda link: (-link.score_db, link.subject_ids))
    if not ordered:
        return []
    index = _index(ordered)
    ends = np.array([[index[name] for name in link.subject_ids] for link in ordered])
    count, labels = connected_components(_graph(ends, np.ones(len(ends)), len(index)), directed=False)
    nodes, tree = _forest(ends, len(index))
    bottleneck = np.zeros(count, np.int64)
    np.maximum.at(bottleneck, labels[nodes], tree)
    members: list[list[str]] = [[] for _ in range(count)]
    for name, label in zip(index, labels, strict=True):
        members[label].append(name)
    inside: list[list[Link]] = [[] for _ in range(count)]
    for link, label in zip(ordered, labels[ends[:, 0]], strict=True):
        inside[label].append(link)
    missing = Counter[int]()
    for name, number in (left_out or {}).items():
        if name in index:
            missing[int(labels[index[name]])] += number
    clusters = [
        Cluster(tuple(members[i]), tuple(inside[i]), ordered[bottleneck[i]].score_db, missing[i]) for i in range(count)
    ]
    return sorted(clusters, key=lambda cluster: (-len(cluster.subject_ids), cluster.subject_ids))


def _names(link: Link) -> tuple[str, str]:
    a, b = link.subject_ids
    return (a, b) if a < b else (b, a)


def _index(links: Sequence[Link]) -> dict[str, int]:
    """subject_id -> its number, in the order of all subject_ids."""
    names = sorted({name for link in links for name in link.subject_ids})
    return {name: i for i, name in enumerate(names)}
