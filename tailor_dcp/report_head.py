"""The head of a report's page: the run in words."""

from __future__ import annotations

from collections.abc import Sequence

from tailor_dcp.amounts import counted, moment, percent, size
from tailor_dcp.report import Report, SaveView
from tailor_dcp.report_charts import text
from tailor_dcp.units import WEIGHT

_NOTES = 12
"""Notes, and policies; a hostile run could have any number."""


def head(report: Report, name: str) -> str:
    """Return what the page begins with: the run, its policies, what they saved."""
    saves, newest = report.saves, report.saves[-1]
    steps = [save.step for save in saves if save.step is not None]
    span = f", steps {min(steps):,} to {max(steps):,}" if len(set(steps)) > 1 else ""
    series = f", series <code>{text(report.series)}</code>" if report.series else ""
    spared = max(0, report.full - report.written)
    cards = (
        _card(
            "Written by all saves",
            size(report.written),
            f"{percent(report.written, report.full)} of the {size(report.full)} that full saves take",
        ),
        _card("Saved against full", size(spared), f"{percent(spared, report.full)} of the bytes were not written"),
        _card(
            "Disk in use",
            size(report.disk),
            f"{counted(len(saves), 'full checkpoint')} would take {size(report.full)}",
        ),
        _card(f"Resuming from {newest.name}", *_behind(newest)),
    )
    return (
        f'<header>\n<h1>{text(name)}</h1>\n<p class="path">{text(report.run)}</p>\n'
        f"<p>{counted(len(saves), 'checkpoint')}{span}{series}, saved from {moment(saves[0].time)} to "
        f'{moment(newest.time)}.</p>\n{_policies(report)}\n<dl class="cards">{"".join(cards)}</dl>\n</header>'
    )


def _card(what: str, big: str, soft: str) -> str:
    return f'<div><dt>{text(what)}</dt><dd class="big">{text(big)}</dd><dd class="soft">{text(soft)}</dd></div>'


def _behind(save: SaveView) -> tuple[str, str]:
    """Say in a word and in a sentence what resuming from a checkpoint loses."""
    if not save.behind:
        return "not known", "its record names no steps"
    stale = {kind: most for kind, (_, most) in save.behind.items() if most}
    if not stale:
        return "all fresh", "every unit has the values of this step"
    by_age: dict[int, list[str]] = {}
    for kind, most in stale.items():
        by_age.setdefault(most, []).append(kind)
    told = [f"{shown(kinds)} up to {counted(most, 'step')} behind" for most, kinds in sorted(by_age.items())]
    fresh = [kind for kind in save.behind if kind not in stale]
    big = "weights fresh" if WEIGHT in fresh else f"{counted(max(stale.values()), 'step')} behind"
    return big, "; ".join([*told, *([f"{shown(fresh)} fresh"] if fresh and WEIGHT not in fresh else [])])


def shown(kinds: Sequence[str]) -> str:
    """Return what kinds are called."""
    return ", ".join("weights" if kind == WEIGHT else kind for kind in kinds)


def _policies(report: Report) -> str:
    told = []
    for view in report.policies[:_NOTES]:
        words = text(view.words[:600])
        named = f" <code>{text(view.policy[:300])}</code>" if view.policy is not None else ""
        if len(report.policies) == 1:
            return f"<p><strong>Policy:</strong> {words}.{named}</p>"
        where = view.first if view.saves == 1 else f"{view.first} to {view.last}"
        told.append(f"<li>{text(where)}: {words}.{named}</li>")
    more = f"<li>and {len(report.policies) - _NOTES} more changes</li>" if len(report.policies) > _NOTES else ""
    return f"<p><strong>Policies,</strong> as they changed over the run:</p><ul>{''.join(told)}{more}</ul>"


def notes(report: Report) -> str:
    """Return what somebody should look at; nothing where all is well."""
    told = [
        f"{later} was saved after {earlier}, which has the higher number: the run went back. The charts show "
        f"checkpoints in the order in which they were saved."
        for later, earlier in report.backwards
    ]
    told += [f"{other.name} ({size(other.bytes)}): {other.why}." for other in report.others]
    told += [f"{name} cannot be read and is not counted: {why}" for name, why in report.unreadable]
    for save in report.saves:
        if save.missing:
            told.append(f"{save.name} cannot be loaded: {_some(save.missing)} missing or cut off.")
        if save.outside:
            told.append(f"{save.name} names {_some(save.outside)} outside of the run, which were not looked at.")
    if not told:
        return ""
    more = f"<li>and {counted(len(told) - _NOTES, 'more note')}</li>" if len(told) > _NOTES else ""
    items = "".join(f"<li>{text(note[:500])}</li>" for note in told[:_NOTES])
    return f'<section class="warn">\n<h2>Worth knowing</h2>\n<ul>{items}{more}</ul>\n</section>'


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{counted(len(names), 'file')} such as {names[0]}"
