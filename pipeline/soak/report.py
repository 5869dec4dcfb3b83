"""The report of a soak: Markdown for people, JSON for programs."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.soak.run import Outcome
from pipeline.soak.supervisor import Sample
from pipeline.soak.view import VERDICTS

SHOWN: Final = 50
PERCENTILES: Final = (50, 90, 99, 99.9, 100)
SPANS: Final = {
    "latency_ms": "judged parts: arrival to verdict",
    "sent_to_read_ms": "judged parts: sent to read by a subscriber",
    "after_deadline_ms": "`UNKNOWN (deadline)`: deadline to verdict",
}
LONG_LIFE: Final = 60
"""Samples from which on a life is long enough to say whether memory grows."""
Rows = Iterable[Sequence[object]]


def write(outcome: Outcome, folder: Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.json`` into ``folder``; return their paths."""
    found = figures(outcome)
    markdown, data = folder / "report.md", folder / "report.json"
    markdown.write_text(as_markdown(found))
    data.write_text(json.dumps(found, indent=2) + "\n")
    return markdown, data


def figures(outcome: Outcome) -> dict[str, Any]:
    """All figures of a soak."""
    history, setup = outcome.history, outcome.setup
    records = [entry.fields for entry in history.final if entry.stream.startswith(VERDICTS)]
    return {
        "passed": outcome.passed,
        "violations": [violation._asdict() for violation in outcome.result.violations],
        "failures": outcome.failures,
        "declared_lost": outcome.result.excused,
        "setup": {
            "seconds": round(outcome.seconds, 1), "seed": setup.seed, "cameras": setup.cameras, "rate": setup.rate,
            "deadline_ms": setup.deadline_ms,
        },
        "frames_sent": len(history.sent) - len(history.failed),
        "parts_answered": len(records),
        "verdicts": dict(Counter(fields["verdict"] for fields in records).most_common()),
        "reasons": dict(Counter(fields["reason"] for fields in records).most_common()),
        "rejects": sum(entry.stream == "rejects" for entry in history.final),
        "late_results": sum(entry.stream == "late" for entry in history.final),
        "told_on_channel": len(history.told),
        "latency_ms": _percentiles(int(f["latency_us"]) / 1000 for f in records if f["verdict"] != "UNKNOWN"),
        "sent_to_read_ms": _percentiles(_sent_to_read(outcome)),
        "after_deadline_ms": _percentiles(
            (int(f["t_verdict_ns"]) - int(f["deadline_ns"])) / 1e6 for f in records if f["reason"] == "deadline"
        ),
        "faults": _faults(outcome),
        "line": {name: outcome.counts.get(name, 0) for name in ("started", "ready", "watchdog", "exited")},
        "lives": [_life(list(samples)) for _, samples in groupby(outcome.samples, key=lambda sample: sample.life)],
    }  # fmt: skip


def as_markdown(found: dict[str, Any]) -> str:
    """The same for people."""
    setup = found["setup"]
    title = "passed: no promise was broken" if found["passed"] else "FAILED"
    line, times = found["line"], sum(row["times"] for row in found["faults"])
    ran = (
        f"{setup['cameras']} cameras at {setup['rate']:g} frames a second, {setup['seconds']:g} s, seed"
        f" {setup['seed']}, deadline {setup['deadline_ms']:g} ms. {times} faults of {len(found['faults'])} kinds. The"
        f" line was started {line['started']} times, of these {line['watchdog']} times by the watchdog."
    )
    parts = [
        f"# Soak: {title}", ran,
        "## Violations", _violations(found),
        "## Parts", _counts(found),
        "## Latency", _latency(found),
        "## Faults", _fault_table(found),
        "## What the line held", _lives(found),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _violations(found: dict[str, Any]) -> str:
    lines = [f"- {failure}" for failure in found["failures"]]
    shown = found["violations"][:SHOWN]
    lines += [f"- `{one['kind']}` {' '.join(map(str, one['part']))}: {one['detail']}" for one in shown]
    if len(found["violations"]) > SHOWN:
        lines.append(f"- and {len(found['violations']) - SHOWN} more, in report.json")
    if found["declared_lost"]:
        lines.append(f"- {found['declared_lost']} entries are missing that the line itself declared lost")
    return "\n".join(lines) or "None."


def _counts(found: dict[str, Any]) -> str:
    names = ("frames_sent", "parts_answered", "rejects", "late_results", "told_on_channel")
    rows = [(name.replace("_", " "), found[name]) for name in names]
    rows += [(f"`{name}`", count) for name, count in [*found["verdicts"].items(), *found["reasons"].items()]]
    return _table(("what", "how many"), rows)


def _latency(found: dict[str, Any]) -> str:
    rows = []
    for name, what in SPANS.items():
        rows.append((what, *(found[name].get(f"p{p:g}", "") for p in PERCENTILES)))
    return "In milliseconds, through all faults.\n\n" + _table(("from, to", *(f"{p:g} %" for p in PERCENTILES)), rows)


def _fault_table(found: dict[str, Any]) -> str:
    columns = ("times", "seen", "recovered_s", "errors")
    rows = [[f"`{row['name']}`", *(row[name] for name in columns)] for row in found["faults"]]
    return _table(("fault", "times", "effect seen", "recovered after, s (longest)", "not injected"), rows)


def _lives(found: dict[str, Any]) -> str:
    columns = ("seconds", "rss_mib", "rss_growth_percent", "fds", "threads")
    rows = [[life["life"], *(life[name] for name in columns)] for life in found["lives"]]
    head = ("process", "seconds", "RSS at the end, MiB", "RSS growth after warm-up, %", "descriptors", "threads")
    return "Descriptors and threads: when warm, at the end (lowest to highest).\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Rows) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])


def _percentiles(values: Iterable[float]) -> dict[str, float]:
    found = np.array(list(values))
    return {f"p{p:g}": round(float(np.percentile(found, p)), 1) for p in PERCENTILES} if len(found) else {}


def _sent_to_read(outcome: Outcome) -> Iterable[float]:
    sent = {(one.camera, one.session, one.seq): one.t for one in outcome.history.sent}
    for entry in outcome.history.live:
        fields = entry.fields
        part = fields["camera"], int(fields["session"]), int(fields["seq"])
        if entry.stream.startswith(VERDICTS) and fields["verdict"] != "UNKNOWN" and part in sent:
            yield (entry.t - sent[part]) / 1e6


def _faults(outcome: Outcome) -> list[dict[str, Any]]:
    rows = []
    for name in sorted({injection.name for injection in outcome.injections}):
        those = [injection for injection in outcome.injections if injection.name == name]
        recovered = [injection.recovered_s for injection in those if injection.recovered_s is not None]
        rows.append(
            {
                "name": name,
                "times": len(those),
                "seen": sum(injection.seen for injection in those),
                "recovered_s": round(max(recovered), 1) if recovered else "",
                "errors": sum(bool(injection.error) for injection in those),
            }
        )
    return rows


def _life(samples: list[Sample]) -> dict[str, Any]:
    """What one process held; the last quarter of its life against the second one, when it was warm."""
    quarter = max(len(samples) // 4, 1)
    warm, last = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    early, late = (statistics.median(sample.rss_kib for sample in part) for part in (warm, last))
    return {
        "life": samples[0].life,
        "seconds": round((samples[-1].t - samples[0].t) / 1e9),
        "rss_mib": round(late / 1024, 1),
        "rss_growth_percent": round(100 * (late / early - 1), 2) if len(samples) >= LONG_LIFE else "",
        "fds": _course([s.fds for s in warm], [s.fds for s in last], [s.fds for s in samples]),
        "threads": _course([s.threads for s in warm], [s.threads for s in last], [s.threads for s in samples]),
    }


def _course(warm: list[int], last: list[int], whole: list[int]) -> str:
    """Typical number when warm and at the end, and the lowest and highest."""
    return f"{statistics.median_low(warm)}, {statistics.median_low(last)} ({min(whole)} to {max(whole)})"
