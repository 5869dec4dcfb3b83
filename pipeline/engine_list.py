"""The store as a table: one row a version, verified as it is listed."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from engines import signing
from engines.bundle import Bundle, BundleError
from engines.store import Store
from pipeline import gate

COLUMNS = ("engine", "method", "size", "threshold", "created", "passed in", "signed", "active")


def engine_table(store: Store) -> Table:
    """All versions of all engines. ``passed in`` names the targets whose gate a version passed on this box's store."""
    table = Table(*COLUMNS)
    for name in store.names():
        active = store.active(name)
        for version in store.versions(name):
            mark = "active" if version == active else ""
            table.add_row(*_cells(store, name, version), mark, style="bold" if mark else "")
    return table


def _cells(store: Store, name: str, version: str) -> list[Text]:
    label = f"{name}@{version}"
    try:
        bundle = store.get(name, version)
        return [Text(cell) for cell in (label, *_facts(bundle), _passed(store, bundle), signing.check(bundle) or "no")]
    except BundleError as error:
        return [Text(label), Text("REFUSED", "red"), *map(Text, ("", "", "", "")), Text(str(error), "red")]


def _facts(bundle: Bundle) -> tuple[str, str, str, str]:
    manifest = bundle.manifest
    size = f"{manifest.input.width}x{manifest.input.height} {manifest.input.colour}"
    return manifest.training.method, size, f"{manifest.threshold.value:.4g}", manifest.created[:16]


def _passed(store: Store, bundle: Bundle) -> str:
    return ", ".join(report.kind for report in gate.kept(store, bundle) if report.passed)
