"""Errors of training that a user can mend."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and what to do."""
