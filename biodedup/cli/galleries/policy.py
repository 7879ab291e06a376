"""Commands on the policy and the settings of a gallery: policy show, policy set, config.

The options of `policy set` are generated from the fields of `Policy`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from biodedup import jobs
from biodedup.cli.base import (
    DEFAULT_GALLERY,
    AcrossOption,
    ConfigOption,
    GalleryOption,
    JsonOption,
    Panel,
    RegisterUrl,
    SignOption,
    ThreadsOption,
    WaitOption,
    acting,
    app,
    complain,
    configured,
    existing,
    finish,
    gallery_of,
    opened,
    print_json,
    say,
    settings,
    show_table,
)
from biodedup.common.renamed import old_names
from biodedup.common.tables import differences, flat, hints, made, plain
from biodedup.config import Config, GalleryConfig, Policy
from biodedup.errors import InvalidInput
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.policies import PolicyVersion, differences_in_words, value_in_words
from biodedup.settings import DEFAULT, listed

policy = typer.Typer(no_args_is_help=True, help="Show the decision policy of a gallery, or store a new version of it.")
app.add_typer(policy, name="policy", rich_help_panel=Panel.SETTINGS)

Named = Annotated[
    Any, typer.Argument(metavar="GALLERY", parser=gallery_of, help="The gallery's folder or URL; or --gallery.")
]
ByOption = Annotated[str, typer.Option("--by", help="Who changes it.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept with the version.")]
_NONE = "none"


@policy.command()
def show(
    named: Named = None,
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the policy in force, and every version: who stored it, when, why, and what it changed."""
    folder = named or gallery
    versions = _versions(folder, configured(folder, config))  # a mistake in the settings is told here, too
    if as_json:
        print_json(_document(versions[-1]) | {"versions": [_document(version) for version in versions]})
        return
    show_table(
        [(name, value_in_words(value)) for name, value in flat(versions[-1].policy).items()], ["setting", "value"]
    )
    before: PolicyVersion | None = None
    for version in versions:
        if before is None:
            say(f"version {version.version}: made with the gallery")
        else:
            say(
                f"version {version.version}, {_moment(version.at)}, by {version.by}: {_changed(before, version)}. {version.reason}"
            )
        before = version


def set_policy(named: Path | None, *, by: str, sign: Path | None, reason: str, wait: float, gallery: Path | RegisterUrl, config: Path | None, as_json: bool, **given: Any) -> None:  # fmt: skip
    """Store a new version of the gallery's policy, which applies from then on. Settings that no option names keep their values."""
    folder = named or gallery
    wanted = {new: _parsed(new, given.pop(old)) for old, new in old_names(Policy).items() if given[old] is not None}
    wanted |= {name: _parsed(name, value) for name, value in given.items() if value is not None}
    if not wanted:
        raise InvalidInput("no option says what is to change; name one, as --fpir 1e-6")
    chosen = replace(
        configured(folder, config), policy=None
    )  # whatever the settings say, this is about the gallery's own
    with existing(folder, chosen, wait) as engine:
        before = engine.policies()[-1]
        stored = acting(engine, by, sign).set_policy(made(Policy, flat(before.policy) | wanted), by=by, reason=reason)
    changed = "nothing has changed" if stored.version == before.version else _changed(before, stored)
    finish(_document(stored), f"version {stored.version}: {changed}", as_json)


def _signature() -> inspect.Signature:
    """What `policy set` takes: an option for each field of `Policy`, so that a new field has one by itself."""
    fields = [(name, _option(name, name)) for name in hints(Policy)]
    fields += [(old, _option(old, new, hidden=True)) for old, new in old_names(Policy).items()]
    others = [
        ("sign", SignOption, None),
        ("wait", WaitOption, 0.0),
        ("gallery", GalleryOption, DEFAULT_GALLERY),
        ("config", ConfigOption, None),
        ("as_json", JsonOption, False),
    ]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("named", kind, annotation=Named, default=None),
        inspect.Parameter("by", kind, annotation=ByOption),
        inspect.Parameter("reason", kind, annotation=ReasonOption),
        *(inspect.Parameter(name, kind, annotation=annotation, default=None) for name, annotation in fields),
        *(
            inspect.Parameter(name, kind, annotation=annotation, default=default)
            for name, annotation, default in others
        ),
    ]
    return inspect.Signature(parameters)


def _option(name: str, field: str, *, hidden: bool = False) -> Any:
    hint, flag = hints(Policy)[field], f"--{name.replace('_', '-')}"
    usual = f"Default of a new gallery: {value_in_words(flat(Policy())[field])}."
    if hint is bool:
        flags = f"{flag}/--no-{flag.removeprefix('--')}"
        return Annotated[bool | None, typer.Option(flags, help=usual, hidden=hidden)]
    if hint in (int, float, str):
        return Annotated[hint | None, typer.Option(flag, help=usual, hidden=hidden)]
    if hint == float | None:
        return Annotated[str | None, typer.Option(flag, metavar=f"NUMBER|{_NONE}", help=usual, hidden=hidden)]
    several = f"Repeatable; {_NONE} for nothing. {usual}"
    return Annotated[list[str] | None, typer.Option(flag, metavar="TEXT", help=several, hidden=hidden)]


def _parsed(name: str, value: Any) -> Any:
    hint = hints(Policy)[name]
    if hint == float | None:
        try:
            return None if value == _NONE else float(value)
        except ValueError:
            raise InvalidInput(f"--{name.replace('_', '-')} is {value!r}, wanted a number or {_NONE}") from None
    return tuple(text for text in value if text != _NONE) if isinstance(value, list) else value


@app.command("config", rich_help_panel=Panel.SETTINGS)
def show_config(
    named: Named = None,
    gallery: GalleryOption = DEFAULT_GALLERY,
    across_positions: AcrossOption = False,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the settings in effect for a gallery, and where each comes from."""
    folder = named or gallery
    chosen = settings(folder, config, threads=threads, across_positions=across_positions)
    rows = listed(chosen)
    stated = chosen.config.policy
    conflict = ""
    if isinstance(folder, RegisterUrl) or jobs.is_gallery(folder):
        stored = _versions(folder, chosen.config)[-1]
        rows |= {f"policy.{n}": (v, f"gallery, version {stored.version}") for n, v in flat(stored.policy).items()}
        if stated is not None and stated != stored.policy:
            conflict = differences_in_words(differences(stored.policy, stated), "in the gallery", "in the settings")
    else:
        values = flat(stated or Policy())
        rows |= {f"policy.{n}": (v, chosen.sources.get(f"policy.{n}", DEFAULT)) for n, v in values.items()}
    if as_json:
        document = {name: {"value": plain(value), "from": source} for name, (value, source) in rows.items()}
        print_json({"gallery": str(folder), "settings": document, "policy_conflict": conflict or None})
        return
    header = ["setting", "value", "from"]
    show_table([(name, value_in_words(value), source) for name, (value, source) in rows.items()], header)
    if conflict:
        complain(
            f"commands refuse to open this gallery: {conflict}. Take [policy] out of the settings, or `biodedup policy set`"
        )


def _versions(folder: Path | RegisterUrl, config: Config) -> Sequence[PolicyVersion]:
    """Of a gallery's policy. That of a folder is read without the models, which the settings may name wrongly."""
    from biodedup.gallery.gallery import Gallery

    if isinstance(folder, RegisterUrl):
        with opened(folder, replace(config, policy=None)) as engine:
            return engine.policies()
    with closing(Gallery.open_to_read(folder, LocalStorage(config.keys), GalleryConfig())) as gallery:
        return gallery.policies


def _document(version: PolicyVersion) -> dict[str, Any]:
    policy = {name: plain(value) for name, value in flat(version.policy).items()}
    return {"version": version.version, "policy": policy, "by": version.by, "at": version.at, "reason": version.reason}


def _changed(before: PolicyVersion, after: PolicyVersion) -> str:
    changes = differences(before.policy, after.policy)
    return "; ".join(f"{name} from {value_in_words(a)} to {value_in_words(b)}" for name, (a, b) in changes.items())


def _moment(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


_set = _signature()
set_policy.__signature__ = _set  # type: ignore[attr-defined]
set_policy.__annotations__ = {parameter.name: parameter.annotation for parameter in _set.parameters.values()}
policy.command("set")(set_policy)
