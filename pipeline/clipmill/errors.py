"""Every error that clipmill raises on purpose, and the exit code each becomes.

    ClipmillError          1   root: catch this to catch them all
    ├── ConfigError        2   a flag, option or argument that cannot be
    ├── TableError         1   a manifest, index or labels file that cannot be read or is malformed
    ├── FetchError         1   a dataset cannot be had at all (one lost clip is a row, not an error)
    ├── DecodeError        1   one source or clip cannot be decoded; carries a reason code
    ├── ShardError         1   shards cannot be planned, written, found or read
    ├── FeatureError       1   a feature's settings or inputs do not fit
    ├── TrainError         1   a run cannot start, go on, or be read
    └── RunError           1   worker processes were lost

One bad clip never raises out of a stage: it becomes a `clipmill.types.Failure` with
one of `clipmill.types.REASONS`. The messages say what was found, what is allowed and
which flag mends it.
"""

from __future__ import annotations


class ClipmillError(Exception):
    """Root of all errors raised on purpose; `exit_code` is what the command ends with."""

    exit_code = 1


class ConfigError(ClipmillError):
    """Wrong usage: a flag, option or argument that cannot be. Ends the command with 2."""

    exit_code = 2


class TableError(ClipmillError):
    """A manifest, index or labels file is missing, unreadable or malformed."""


class FetchError(ClipmillError):
    """A dataset cannot be had at all. One lost clip is a `Failure` row instead."""


class DecodeError(ClipmillError):
    """One source or clip cannot be decoded.

    `reason` is one of `clipmill.types.REASONS`, for the failures table.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        """Pickle both arguments, so that the error crosses process borders."""
        return type(self), (self.reason, str(self))


class ShardError(ClipmillError):
    """Shards cannot be planned, written, found or read."""


class FeatureError(ClipmillError):
    """A feature's settings or inputs do not fit."""


class TrainError(ClipmillError):
    """A run cannot start, go on, or be read."""


class RunError(ClipmillError):
    """Worker processes were lost; what was finished stays finished."""
