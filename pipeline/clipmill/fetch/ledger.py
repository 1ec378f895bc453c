"""The ledger: what fetching each clip came to, in SQLite, owned by one process."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from clipmill.errors import TableError
from clipmill.types import Failure

_TABLE = """
CREATE TABLE IF NOT EXISTS outcomes (
    key TEXT NOT NULL,      -- empty for a file found but never wanted
    source TEXT NOT NULL,
    outcome TEXT NOT NULL,  -- had, failed or skipped
    reason TEXT NOT NULL,   -- empty when had, else a code of clipmill.types.REASONS
    message TEXT NOT NULL,
    PRIMARY KEY (key, source)
) WITHOUT ROWID
"""


class Ledger:
    """The outcomes of one dataset's fetch, in `ledger.sqlite`; to be read, or else by its one owner written."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self._path = path
        try:
            # Read-only for readers: datasets are shared on disks that they may not write.
            mode = "rwc" if write else "ro"
            self._base = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True)
            self._base.execute(_TABLE if write else "SELECT 1 FROM outcomes LIMIT 1")
        except sqlite3.Error as error:
            raise TableError(f"{path}: cannot be opened as a ledger: {error}") from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()

    def replace(self, had: Iterable[tuple[str, str]], losses: Iterable[Failure]) -> None:
        """Forget what was, and record the clips had (key, source) and the losses, all or nothing."""
        try:
            with self._base:
                self._base.execute("DELETE FROM outcomes")
                rows = ((key, source, "had", "", "") for key, source in had)
                self._base.executemany("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?)", rows)
                lost = ((f.key, f.source, f.outcome, f.reason, f.message) for f in losses)
                self._base.executemany("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?)", lost)
        except sqlite3.Error as error:
            raise TableError(f"{self._path}: cannot be written: {error}") from error

    def losses(self) -> list[Failure]:
        """Everything that was not had, in order of key and source."""
        query = "SELECT key, source, outcome, reason, message FROM outcomes WHERE outcome != 'had' ORDER BY key, source"
        with closing(self._base.execute(query)) as rows:
            return [Failure(key, source, "fetch", *rest) for key, source, *rest in rows]

    def counts(self) -> dict[str, int]:
        """How many clips came to each outcome."""
        with closing(self._base.execute("SELECT outcome, COUNT(*) FROM outcomes GROUP BY outcome")) as rows:
            return {"had": 0, "failed": 0, "skipped": 0} | dict(rows.fetchall())
