"""Draws the plots of an evaluation's report with matplotlib.

Owns axes, scales and colours. Never counts: all numbers come from the JSON document. matplotlib belongs to the extra `report`, and is imported
when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from biodedup.errors import InvalidInput

MATED, NONMATED, MARK = "#1f5fa8", "#b3261e", "#5d6b78"
_LINES = ("#1b2733", "#1f5fa8", "#b3261e", "#1a7f4b", "#9a6700", "#6b3fa0", "#5d6b78")


def require() -> None:
    """Raises InvalidInput if matplotlib is not installed. A job calls it first, before hours of work."""
    if find_spec("matplotlib") is None:
        raise InvalidInput(
            "a report needs matplotlib, which is not installed; pip install 'biodedup[report]', or write no report (--no-report)"
        )


def histogram(found: dict[str, Any], thresholds_db: Sequence[tuple[str, float]]) -> Any:
    """A histogram of the scores of mated and non-mated pairs, with a logarithmic scale of counts. thresholds_db: (name, threshold)."""
    figure, axes = _figure("score_db", "pairs")
    edges = np.array(found["edges_db"])
    for name, colour in (("nonmated", NONMATED), ("mated", MATED)):
        label = "mated pairs (one person)" if name == "mated" else "non-mated pairs (two people)"
        counts = np.array(found[name], float)
        axes.stairs(counts, edges, color=colour, alpha=0.25, fill=True, baseline=0.5)
        axes.stairs(counts, edges, color=colour, label=label, baseline=0.5)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    for (name, at), style in zip(thresholds_db, ("--", ":", "-.") * len(thresholds_db), strict=False):
        axes.axvline(at, color=MARK, linestyle=style, linewidth=1, label=f"threshold, {name}: {at:.1f} dB")
    axes.legend(fontsize=8, frameon=False)
    return figure


def trade_off(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    points: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    along: str,
    up: str,
) -> Any:
    """A detection error trade-off (DET) plot: one error rate against the other, with logarithmic axes.

    curves: (name, x, y); points: pairs of rates with intervals; along, up: names of the axes. A rate of zero cannot be drawn: the curve ends
    there.
    """
    figure, axes = _figure(along, up)
    lowest = [1e-2, 1e-2]
    for (name, x, y), colour in zip(curves, _LINES * (1 + len(curves) // len(_LINES)), strict=False):
        across, over = np.array(x, float), np.array(y, float)
        drawn = (across > 0) & (over > 0)
        axes.plot(across[drawn], over[drawn], color=colour, label=name, linewidth=1.4, drawstyle="steps-post")
        for side, values in enumerate((across[drawn], over[drawn])):
            lowest[side] = min(lowest[side], np.min(values, initial=1.0) / 2)
    for x_rate, y_rate in points:
        if x_rate["value"] and y_rate["value"]:
            axes.errorbar(
                x_rate["value"], y_rate["value"], xerr=_bars(x_rate), yerr=_bars(y_rate),
                fmt="o", markersize=3, color=MARK, elinewidth=0.8, capsize=2,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(lowest[0], 1)
    axes.set_ylim(lowest[1], 1)
    if not any(len(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, "no threshold has errors of both types", transform=axes.transAxes, ha="center", color=MARK)
    axes.grid(True, which="both", color="#eef1f4", linewidth=0.6)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False)
    return figure


def ranks(cmc: dict[str, Any]) -> Any:
    """A cumulative match characteristic (CMC) plot: the share of mated searches whose mate has this rank or a better one."""
    figure, axes = _figure("rank", "share of mated searches, mate at this rank or better")
    found = np.array(cmc["found"], float)
    lowest = 1.0
    for searches, label, colour in (
        (cmc["searches"], "without failures to enrol", MATED),
        (cmc["searches_with_failures"], "failures to enrol count as misses", NONMATED),
    ):
        if searches:
            axes.plot(cmc["rank"], found / searches, marker="o", markersize=3, color=colour, label=label)
            lowest = min(lowest, float(found[0]) / searches)
    axes.set_ylim(max(0.0, lowest - 0.05), 1.005)
    axes.grid(True, color="#eef1f4", linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _bars(rate: dict[str, Any]) -> Any:
    low, high = rate["interval"]
    low = min(max(low, 0.5 / rate["trials"]), rate["value"])  # a logarithmic axis has no zero
    return [[rate["value"] - low], [high - rate["value"]]]


def _figure(along: str, up: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # pyplot would have global state and may need a display

    figure = Figure(figsize=(6.2, 4.2))
    axes = figure.subplots()
    axes.set_xlabel(along)
    axes.set_ylabel(up)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
