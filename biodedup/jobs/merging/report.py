"""Writes the results of a merge of registers: the tables, the summary and the HTML page.

Owns the columns of the tables, which `docs/reference/schemas.md` describes, and the content of the page. Never decides which records belong to
one person.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from biodedup.config import LabelConfig
from biodedup.jobs.merging.model import Findings, Group
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.output import write_table
from biodedup.jobs.shared.page import write_page

_SHOWN = 200  # the page lists at most so many clusters, pairs and ids; the tables have all
_MATRIX_MAX = 30  # the page shows a matrix of at most so many districts


def beside(out: Path, ending: str) -> Path:
    """The name of another file of the same result."""
    return out.with_name(f"{out.stem}.{ending}")


def write_results(out: Path, findings: Findings, labels: LabelConfig) -> dict[str, Any]:
    """Writes `out` and four files beside it. Returns the summary. Raises StorageUnavailable."""
    summary = _summary(findings) | {"pairs_left_out": findings.left_out}
    write_table(_members_table(findings.groups, findings.settings.rule, labels), out)
    write_table(_pairs_table(findings, labels), beside(out, "pairs.parquet"))
    write_table(_shared_table(findings), beside(out, "collisions.parquet"))
    write_json(summary, beside(out, "summary.json"))
    _write_page(findings, summary, beside(out, "html"))
    return summary


def _summary(findings: Findings) -> dict[str, Any]:
    settings, groups, district_of = findings.settings, findings.groups, findings.district_of
    total = sum(register.snapshot.live_count for register in findings.registers)
    across = sum(district_of[link.subject_ids[0]] != district_of[link.subject_ids[1]] for link in findings.strong)
    verdicts = Counter(checked.verdict for checked in findings.checked if checked.verdict)
    applied = [group for group in groups if group.applies]
    return {
        "districts": [register.key for register in findings.registers],
        "subjects": total,
        "threshold_db": round(settings.threshold_db, 4),
        "listed_from_db": round(settings.joined_db, 4),
        "rule": settings.rule,
        "prefer": list(settings.prefer),
        "min_db": settings.min_db,
        "pairs": len(findings.strong),
        "pairs_between_districts": across,
        "pairs_extrapolated": sum(link.extrapolated for link in findings.strong),
        "pairs_expected_by_chance": round(total * (total - 1) / 2 * 10 ** (-settings.threshold_db / 10), 3),
        "pairs_for_review": len(findings.for_review),
        "clusters": len(groups),
        "clusters_of_more_than_two": sum(len(group.members) > 2 for group in groups),
        "subjects_in_clusters": sum(len(group.members) for group in groups),
        "clusters_to_apply": len(applied),
        "clusters_to_adjudicate": len(groups) - len(applied),
        "templates_to_survivors": sum(len(record.gives) for group in applied for record in group.absorbed),
        "subjects_after_apply": total - sum(len(group.members) - 1 for group in applied),
        "ids_in_several_districts": sum(checked.against is None for checked in findings.checked),
        "of_the_same_person": verdicts["same_person"],
        "of_another_person": verdicts["another_person"],
        "not_comparable": verdicts["not_comparable"],
    }


def _members_table(groups: Sequence[Group], rule: str, labels: LabelConfig) -> Any:
    rows = [(group, member) for group in groups for member in group.members]

    def column(kind: Any, value: Any) -> Any:
        return pa.array([value(group, member) for group, member in rows], kind)

    return pa.table(
        {
            "cluster": column(pa.int64(), lambda group, member: group.number),
            "decision": column(pa.string(), lambda group, member: "apply" if group.applies else "adjudicate"),
            "label": column(pa.string(), lambda group, member: labels.of("duplicate" if group.applies else "review")),
            "subject_id": column(pa.string(), lambda group, member: member.subject_id),
            "district": column(pa.string(), lambda group, member: member.district),
            "original_id": column(pa.string(), lambda group, member: member.original_id),
            "survivor": column(pa.bool_(), lambda group, member: member is group.survivor),
            "rule": column(pa.string(), lambda group, member: rule),
            "gives": column(pa.list_(pa.string()), lambda group, member: group.gives[member.subject_id]),
            "captures": column(pa.int64(), lambda group, member: member.captures),
            "enrolled_order": column(pa.int64(), lambda group, member: member.order),
            "encounter_id": column(pa.string(), lambda group, member: member.encounter_id or None),
            "enrolled_at": column(pa.float64(), lambda group, member: member.enrolled_at),
            "quality": column(pa.float64(), lambda group, member: member.quality),
            "links": column(pa.int64(), lambda group, member: group.links_of[member.subject_id]),
            "to_survivor_db": column(pa.float64(), lambda group, member: group.to_survivor_db.get(member.subject_id)),
            "strongest_db": column(pa.float64(), lambda group, member: group.strongest_db),
            "weakest_db": column(pa.float64(), lambda group, member: group.weakest_db),
        }
    )


_EVIDENCE = pa.struct(
    [
        ("column_a", pa.string()),
        ("column_b", pa.string()),
        ("score_db", pa.float64()),
        ("similarity", pa.float64()),
        ("minutiae", pa.float64()),
    ]
)


def _pairs_table(findings: Findings, labels: LabelConfig) -> Any:
    links, district_of = findings.links, findings.district_of
    cluster_of = {link.subject_ids: group.number for group in findings.groups for link in group.links}
    strength = ["duplicate"] * len(findings.strong) + ["review"] * len(findings.for_review)
    evidence = [
        [
            {
                "column_a": part.column,
                "column_b": part.candidate_column,
                "score_db": part.score_db,
                "similarity": part.similarity,
                "minutiae": part.minutiae,
            }
            for part in link.evidence
        ]
        for link in links
    ]
    return pa.table(
        {
            "cluster": pa.array([cluster_of.get(link.subject_ids) for link in links], pa.int64()),
            "subject_id_a": pa.array([link.subject_ids[0] for link in links], pa.string()),
            "subject_id_b": pa.array([link.subject_ids[1] for link in links], pa.string()),
            "district_a": pa.array([district_of[link.subject_ids[0]] for link in links], pa.string()),
            "district_b": pa.array([district_of[link.subject_ids[1]] for link in links], pa.string()),
            "score_db": pa.array([link.score_db for link in links], pa.float64()),
            "extrapolated": pa.array([link.extrapolated for link in links], pa.bool_()),
            "strength": pa.array(strength, pa.string()),
            "label": pa.array(map(labels.of, strength), pa.string()),
            "evidence": pa.array(evidence, pa.list_(_EVIDENCE)),
        }
    )


def _shared_table(findings: Findings) -> Any:
    registers, checked = findings.registers, findings.checked
    cluster_of = {member.subject_id: group.number for group in findings.groups for member in group.members}
    against = [None if entry.against is None else registers[entry.against].name for entry in checked]
    return pa.table(
        {
            "original_id": pa.array([entry.shared.subject_id for entry in checked], pa.string()),
            "district": pa.array([registers[entry.shared.owner].name for entry in checked], pa.string()),
            "subject_id": pa.array([entry.shared.merged_id for entry in checked], pa.string()),
            "compared_with": pa.array(against, pa.string()),
            "score_db": pa.array([entry.score_db for entry in checked], pa.float64()),
            "verdict": pa.array([entry.verdict for entry in checked], pa.string()),
            "cluster": pa.array([cluster_of.get(entry.shared.merged_id) for entry in checked], pa.int64()),
        }
    )


def _write_page(findings: Findings, summary: Mapping[str, Any], path: Path) -> None:
    registers, groups, district_of = findings.registers, findings.groups, findings.district_of
    names = [register.name for register in registers]
    between = Counter(tuple(sorted((district_of[a], district_of[b]), key=names.index)) for link in findings.strong for a, b in [link.subject_ids])  # fmt: skip
    larger = [group for group in groups if len(group.members) > 2]
    twos = sorted((group for group in groups if len(group.members) == 2), key=lambda group: group.weakest_db)
    same, others = (
        [checked for checked in findings.checked if checked.verdict == verdict]
        for verdict in ("same_person", "another_person")
    )
    write_page(
        path,
        "merge.html",
        summary=summary,
        names=names,
        registers=registers,
        between=between,
        with_matrix=len(names) <= _MATRIX_MAX,
        busiest=between.most_common(_SHOWN),
        larger=larger[:_SHOWN],
        weakest=twos[: _SHOWN // 2],
        strongest=twos[: _SHOWN // 2 - 1 : -1][: _SHOWN // 2] if len(twos) > _SHOWN // 2 else [],
        review=findings.for_review[:_SHOWN],
        district_of=district_of,
        same=same[:_SHOWN],
        others=others[:_SHOWN],
        shown=_SHOWN,
    )
