"""The ledger: what fetching each clip came to, in SQLite, owned by one process and read by any.

While it is written it keeps a write-ahead log, so that a process killed at any instant
loses nothing that was recorded, and `--status` reads beside it; when it is closed it is one
plain file again, that can be read where nothing may be written. Counts are kept by triggers,
so that telling them takes no look at two million rows.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipmill.errors import TableError
from clipmill.types import NO_SPLIT, Failure

_VERSION = 2

_COLUMNS = """
    key TEXT NOT NULL,      -- empty for a file found but never wanted
    source TEXT NOT NULL,   -- of a clip fetched by itself: empty unless had
    outcome TEXT NOT NULL,  -- had, failed or skipped
    reason TEXT NOT NULL,   -- empty when had, else a code of clipmill.types.REASONS
    message TEXT NOT NULL,  -- the tool's own words
    split TEXT NOT NULL,
    bytes INTEGER,          -- of the source
    sha256 TEXT,            -- of the source's content: clipmill.audio.content_sha256
    duration_s REAL,        -- of the clip as it was decoded
    start_s REAL,           -- where the clip lies in the source; null: it is the whole of it
    end_s REAL,
    at REAL NOT NULL,       -- when, in seconds since 1970
    PRIMARY KEY (key, source)
"""

_KINDS = dict(line.split()[:2] for line in _COLUMNS.replace(",", " ").strip().splitlines()[:-1])
"""Column -> its SQLite type."""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS outcomes ({_COLUMNS}) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS set_aside ({_COLUMNS}) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS lost ON outcomes (reason, key) WHERE outcome != 'had';
CREATE TABLE IF NOT EXISTS counts (
    split TEXT, outcome TEXT, reason TEXT, clips INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (split, outcome, reason)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS count_in AFTER INSERT ON outcomes BEGIN
    INSERT INTO counts VALUES (NEW.split, NEW.outcome, NEW.reason, 1, IFNULL(NEW.bytes, 0))
    ON CONFLICT DO UPDATE SET clips = clips + 1, bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER IF NOT EXISTS count_out AFTER DELETE ON outcomes BEGIN
    UPDATE counts SET clips = clips - 1, bytes = bytes - IFNULL(OLD.bytes, 0)
    WHERE split = OLD.split AND outcome = OLD.outcome AND reason = OLD.reason;
END;
CREATE TABLE IF NOT EXISTS ticks (run REAL, at REAL, tried INTEGER, had INTEGER, PRIMARY KEY (run, at)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
"""

_ASIDE = "key != '' AND key NOT IN (SELECT key FROM wanted)"
_BACK = "key IN (SELECT key FROM wanted)"
_SCOPE = (
    f"INSERT OR REPLACE INTO set_aside SELECT * FROM outcomes WHERE {_ASIDE}",
    f"DELETE FROM outcomes WHERE {_ASIDE}",
    f"INSERT OR REPLACE INTO outcomes SELECT * FROM set_aside WHERE {_BACK}",
    f"DELETE FROM set_aside WHERE {_BACK}",
    # A clip may stand in another split now; deleted and put in again, for the counts to follow.
    "CREATE TEMP TABLE moved AS SELECT o.* FROM outcomes o JOIN wanted w ON o.key = w.key WHERE o.split != w.split",
    "DELETE FROM outcomes WHERE key IN (SELECT key FROM moved)",
    "UPDATE moved SET split = (SELECT split FROM wanted WHERE wanted.key = moved.key)",
    "INSERT INTO outcomes SELECT * FROM moved",
    "DROP TABLE moved",
)
"""From the outcomes of some clips to those of the clips in the temporary table `wanted`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What asking for one clip came to; `reason` is "" when it is had.

    `source` is relative to the media root, `bytes` its size, `sha256` of its content, and
    `start_s`/`end_s` (seconds) where in it the clip lies: None where it is the whole of it.
    `message` holds the tool's own words, on one line. `retry_after_s` is what the site asked for.
    """

    key: str
    reason: str = ""
    message: str = ""
    source: str = ""
    bytes: int | None = None
    sha256: str | None = None
    duration_s: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    retry_after_s: float | None = None

    @property
    def had(self) -> bool:
        """Whether the clip is there."""
        return not self.reason


class Ledger:
    """The outcomes of one dataset's fetch, in `ledger.sqlite`; to be read, or else by its one owner written.

    Raises:
        TableError: from every method, where the file cannot be opened, read or written.
    """

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self._path, self._write = path, write
        with self._told("opened as a ledger"):
            # Read-only for readers: datasets are shared on disks that they may not write.
            mode = "rwc" if write else "ro"
            self._base = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=30)
            version = self._base.execute("PRAGMA user_version").fetchone()[0]
            if write:
                self._prepare(version)
            else:
                self._base.execute("SELECT 1 FROM outcomes LIMIT 1")
        if version != _VERSION and not write:
            raise TableError(f"{path}: was written by another version of clipmill; fetch the dataset again")

    def _prepare(self, version: int) -> None:
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = NORMAL")
        if version not in (0, _VERSION):
            raise TableError(
                f"{self._path}: was written by a newer clipmill; use that one, or remove the file"
            )
        if version == 0:  # new, or of a version that knew only datasets listed anew each time
            self._base.execute("DROP TABLE IF EXISTS outcomes")
        self._base.executescript(_SCHEMA)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = ""
            if not self._write and self._path.with_name(f"{self._path.name}-wal").exists():
                hint = "; a fetch was killed here: `--status`, by somebody who may write there, mends it"
            raise TableError(f"{self._path}: cannot be {what}: {error}{hint}") from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        if self._write:
            with suppress(sqlite3.Error):  # somebody is reading: the log stays beside it, which does no harm
                self._base.execute("PRAGMA journal_mode = DELETE")
        self._base.close()

    # --- writing

    def replace(
        self, had: Iterable[tuple[str, str, str]], losses: Iterable[Failure], splits: dict[str, str]
    ) -> None:
        """Forget what was, and record the clips had (key, source, split) and the losses, all or nothing.

        `splits`: the split of each lost clip's key.
        """
        now = time.time()
        with self._told("written"), self._base:
            self._base.execute("DELETE FROM outcomes")
            self._insert((key, source, "had", "", "", split, *[None] * 5, now) for key, source, split in had)
            self._insert(_row_of_failure(f, splits.get(f.key, NO_SPLIT), now) for f in losses)

    def passed_over(self, losses: Iterable[Failure], lists: Iterable[str]) -> None:
        """Replace the rows without a key, which were found but never wanted, that these lists had ("LIST:line")."""
        with self._told("written"), self._base:
            theirs = "DELETE FROM outcomes WHERE key = '' AND substr(source, 1, length(?1) + 1) = ?1 || ':'"
            self._base.executemany(theirs, ((name,) for name in lists))
            self._insert(_row_of_failure(f, NO_SPLIT, time.time()) for f in losses)

    def record(self, outcome: Outcome, split: str) -> None:
        """Write down one clip's outcome, in the place of an earlier one."""
        o, verdict = outcome, "had" if outcome.had else "failed"
        row = (
            o.key, o.source if o.had else "", verdict, o.reason, o.message, split,
            o.bytes, o.sha256, o.duration_s, o.start_s, o.end_s, time.time(),
        )  # fmt: skip
        with self._told("written"), self._base:
            self._base.execute("DELETE FROM outcomes WHERE key = ?", (o.key,))
            self._insert([row])

    def forget(self, keys: Iterable[str]) -> None:
        """Take clips back as never asked for."""
        with self._told("written"), self._base:
            self._base.executemany("DELETE FROM outcomes WHERE key = ?", ((key,) for key in keys))

    def scope(self, clips: Callable[[], Iterable[tuple[str, str]]], name: str) -> None:
        """Make the outcomes those of these clips (key, split): set the others aside, and take back what was.

        `name` stands for the clips (a hash): nothing is done when it is that of the last time.
        """
        if self.state("scope") == name:
            return
        with self._told("written"), self._base:
            self._base.execute("CREATE TEMP TABLE wanted (key TEXT PRIMARY KEY, split TEXT) WITHOUT ROWID")
            self._base.executemany("INSERT OR IGNORE INTO wanted VALUES (?, ?)", clips())
            for step in _SCOPE:
                self._base.execute(step)
            self._base.execute("INSERT OR REPLACE INTO state VALUES ('scope', ?)", (name,))
            self._base.execute("DROP TABLE wanted")

    def tick(self, run: float, tried: int, had: int) -> None:
        """Note how far the run that began at `run` (seconds since 1970) has come."""
        with self._told("written"), self._base:
            self._base.execute(
                "INSERT OR REPLACE INTO ticks VALUES (?, ?, ?, ?)", (run, time.time(), tried, had)
            )

    def set_state(self, name: str, value: str) -> None:
        """Keep a short text, such as why a fetch is pausing."""
        with self._told("written"), self._base:
            self._base.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))

    def _insert(self, rows: Iterable[tuple[Any, ...]]) -> None:
        self._base.executemany(f"INSERT INTO outcomes VALUES ({', '.join('?' * 12)})", rows)

    # --- reading

    def state(self, name: str) -> str | None:
        """A text kept by `set_state`."""
        found = self._all("SELECT value FROM state WHERE name = ?", (name,))
        return found[0][0] if found else None

    def losses(self) -> list[Failure]:
        """Everything that was not had, in order of key and source."""
        query = "SELECT key, source, outcome, reason, message FROM outcomes WHERE outcome != 'had' ORDER BY key, source"
        return [Failure(key, source, "fetch", *rest) for key, source, *rest in self._all(query)]

    def lost_keys(self, reasons: Iterable[str] | None = None) -> list[str]:
        """The keys of clips that failed, for any reason or for one of these."""
        chosen = sorted(reasons or ())
        among = f" AND reason IN ({', '.join('?' * len(chosen))})" if reasons is not None else ""
        return [
            key
            for (key,) in self._all(
                f"SELECT key FROM outcomes WHERE outcome != 'had' AND key != ''{among}", chosen
            )
        ]

    def had_aside(self) -> list[str]:
        """The keys of clips that were had, and are not among those wanted now."""
        return [key for (key,) in self._all("SELECT key FROM set_aside WHERE outcome = 'had'")]

    def counts(self) -> dict[str, int]:
        """How many clips came to each outcome."""
        query = "SELECT outcome, SUM(clips) FROM counts GROUP BY outcome"
        return {"had": 0, "failed": 0, "skipped": 0} | dict(self._all(query))

    def tally(self) -> list[tuple[str, str, str, int, int]]:
        """(split, outcome, reason, clips, bytes) for each that is not zero."""
        return self._all("SELECT split, outcome, reason, clips, bytes FROM counts WHERE clips > 0")

    def table(self, *names: str, outcome: str | None = None) -> pa.Table:
        """Columns of all rows that have a key, in order of key; of one outcome, or of any."""
        which = " AND outcome = ?" if outcome else ""
        query = f"SELECT {', '.join(names)} FROM outcomes WHERE key != ''{which} ORDER BY key"
        kinds = {"REAL": pa.float64(), "INTEGER": pa.int64()}
        schema = pa.schema([(name, kinds.get(_KINDS[name], pa.string())) for name in names])
        blocks = []
        with self._told("read"), closing(self._base.execute(query, (outcome,) if outcome else ())) as rows:
            while block := rows.fetchmany(50_000):
                columns = zip(*block, strict=True)
                values = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
                blocks.append(pa.record_batch(values, schema=schema))
        return pa.Table.from_batches(blocks, schema)

    def columns(self, *names: str, outcome: str | None = None) -> dict[str, list[Any]]:
        """`table` as lists."""
        return self.table(*names, outcome=outcome).to_pydict()

    def pace(self, window_s: float = 3600.0) -> tuple[float, float] | None:
        """Clips tried and had an hour, over the last `window_s` of the last run; None where too little is known."""
        ticks = self._all(
            "SELECT at, tried, had FROM ticks WHERE run = (SELECT MAX(run) FROM ticks) ORDER BY at"
        )
        ticks = [tick for tick in ticks if ticks[-1][0] - tick[0] <= window_s]
        hours = (ticks[-1][0] - ticks[0][0]) / 3600 if ticks else 0.0
        if not hours:
            return None
        return (ticks[-1][1] - ticks[0][1]) / hours, (ticks[-1][2] - ticks[0][2]) / hours

    def _all(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        with self._told("read"), closing(self._base.execute(query, tuple(values))) as rows:
            return rows.fetchall()


def _row_of_failure(f: Failure, split: str, now: float) -> tuple[Any, ...]:
    return (f.key, f.source, f.outcome, f.reason, f.message, split, *[None] * 5, now)
