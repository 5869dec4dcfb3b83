"""Which errors are the user's to mend, by class name, so that no heavy module is imported to tell."""

from __future__ import annotations

from typing import Final

MENDABLE: Final = frozenset(
    {
        "BuildError",
        "BundleError",
        "CalibrationError",
        "ComparisonError",
        "ConfigError",
        "CurveError",
        "DataError",
        "DemoError",
        "ExportError",
        "InstallError",
        "LaneFault",
        "MissingExtraError",
        "ParityError",
        "PrecisionError",
        "RecordingError",
        "RedisUnreachableError",
        "SourceError",
        "StoreError",
        "TeacherError",
        "TrainingError",
        "ZMQError",
    }
)


class MissingExtraError(RuntimeError):
    """A command needs packages of an extra that is not installed."""

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'dmdd-line[{extra}]'")


def explain(error: BaseException) -> str | None:
    """The message for the user, or None for a fault of ours, which deserves its traceback."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return str(error) if names & MENDABLE or isinstance(error, OSError) else None
