"""The ledger: recorded is recorded, counts are right, and readers need not be able to write."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.errors import TableError
from clipmill.fetch.ledger import Ledger, Outcome
from clipmill.types import Failure


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def had(key: str) -> Outcome:
    return Outcome(key, source=f"{key}.webm", bytes=10, sha256="ab", duration_s=10.0)


def test_what_is_recorded_is_read_again(path):
    with Ledger(path, write=True) as ledger:
        ledger.record(had("a"), "eval")
        ledger.record(Outcome("b", "private", "Private video"), "eval")
    with Ledger(path) as ledger:
        assert ledger.counts() == {"had": 1, "failed": 1, "skipped": 0}
        assert ledger.losses() == [Failure("b", "", "fetch", "failed", "private", "Private video")]
        assert ledger.columns("key", "source", "bytes", outcome="had") == {
            "key": ["a"], "source": ["a.webm"], "bytes": [10],
        }  # fmt: skip


def test_a_later_outcome_takes_the_place_of_an_earlier_one(path):
    with Ledger(path, write=True) as ledger:
        ledger.record(Outcome("a", "network", "reset"), "eval")
        ledger.record(had("a"), "eval")
        assert ledger.counts() == {"had": 1, "failed": 0, "skipped": 0}
        ledger.forget(["a"])
        assert ledger.counts() == {"had": 0, "failed": 0, "skipped": 0}


KEYS = st.sampled_from("abcdef")
STEPS = st.one_of(
    st.tuples(st.just("had"), KEYS),
    st.tuples(st.sampled_from(["network", "private"]), KEYS),
    st.tuples(st.just("forget"), KEYS),
    st.tuples(st.just("scope"), st.sets(KEYS)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_the_counts_are_those_of_the_rows_whatever_happens(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    wanted, rows = set("abcdef"), {}
    with Ledger(path, write=True) as ledger:
        for what, which in steps:
            if what == "scope":
                wanted = which
                ledger.scope(
                    lambda which=which: [(key, "eval") for key in sorted(which)], repr(sorted(which))
                )
            elif which in wanted and what == "forget":
                ledger.forget([which])
                rows.pop(which, None)
            elif which in wanted:
                ledger.record(had(which) if what == "had" else Outcome(which, what), "eval")
                rows[which] = what
        seen = {key: what for key, what in rows.items() if key in wanted}
        assert dict(zip(*ledger.columns("key", "reason").values(), strict=True)) == {
            key: "" if what == "had" else what for key, what in seen.items()
        }
        assert {reason: clips for _, _, reason, clips, _ in ledger.tally()} == {
            "" if what == "had" else what: n for what, n in Counter(seen.values()).items()
        }
        assert sorted(ledger.lost_keys()) == sorted(key for key, what in seen.items() if what != "had")


def test_clips_set_aside_come_back_with_their_outcomes(path):
    with Ledger(path, write=True) as ledger:
        ledger.scope(lambda: [("a", "eval"), ("b", "eval")], "both")
        ledger.record(had("a"), "eval")
        ledger.record(had("b"), "eval")
        ledger.scope(lambda: [("b", "eval")], "one")
        assert ledger.columns("key")["key"] == ["b"]
        ledger.scope(lambda: [("a", "eval"), ("b", "eval")], "both")
        assert ledger.columns("key")["key"] == ["a", "b"]


def test_a_clip_that_moves_to_another_split_is_counted_there(path):
    with Ledger(path, write=True) as ledger:
        ledger.scope(lambda: [("a", "eval"), ("b", "eval")], "before")
        ledger.record(had("a"), "eval")
        ledger.record(Outcome("b", "private", "so"), "eval")
        ledger.scope(lambda: [("a", "train"), ("b", "eval")], "after")
        assert sorted(ledger.tally()) == [("eval", "failed", "private", 1, 0), ("train", "had", "", 1, 10)]


def test_rows_passed_over_are_replaced_list_by_list(path):
    def rows(*sources: str) -> list[Failure]:
        return [Failure("", source, "fetch", "skipped", "bad-row", "so") for source in sources]

    with Ledger(path, write=True) as ledger:
        ledger.passed_over(rows("a.csv:3", "a.csv:9"), ["a.csv"])
        ledger.passed_over(rows("ba.csv:3"), ["ba.csv"])
        ledger.passed_over(rows("a.csv:4"), ["a.csv"])
        assert [loss.source for loss in ledger.losses()] == ["a.csv:4", "ba.csv:3"]


def test_what_was_recorded_survives_sigkill_and_is_read_beside_the_writer(path):
    script = (
        "import os, signal, sys; from pathlib import Path; from clipmill.fetch.ledger import Ledger, Outcome\n"
        f"ledger = Ledger(Path({str(path)!r}), write=True)\n"
        "for n in range(100): ledger.record(Outcome(f'k{n:03d}', source='x'), 'eval')\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        with Ledger(path) as ledger:
            assert ledger.counts()["had"] == 100
        os.kill(writer.pid, signal.SIGKILL)
    with Ledger(path) as ledger:
        assert ledger.counts()["had"] == 100


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere, so nothing is read-only to it")
def test_a_closed_ledger_is_read_where_nothing_may_be_written(path):
    with Ledger(path, write=True) as ledger:
        ledger.record(had("a"), "eval")
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with Ledger(path) as ledger:
            assert ledger.counts()["had"] == 1
    finally:
        path.parent.chmod(0o755)


def test_a_closed_ledger_is_one_plain_file(path):
    with Ledger(path, write=True) as ledger:
        ledger.record(had("a"), "eval")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert (
        path.read_bytes()[18:20] == b"\x01\x01"
    )  # SQLite's mark of a rollback journal, not of a write-ahead log


def test_a_file_that_is_no_ledger_is_refused_by_name(path):
    path.write_bytes(b"not a database, whatever its name says" * 100)
    for write in (False, True):
        with pytest.raises(TableError, match=r"ledger\.sqlite: cannot be opened as a ledger"):
            Ledger(path, write=write)


def test_a_ledger_of_another_version_is_refused(path):
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE outcomes (key)")
        base.execute("PRAGMA user_version = 99")
    with pytest.raises(TableError, match="another version"):
        Ledger(path)
    with pytest.raises(TableError, match="newer clipmill"):
        Ledger(path, write=True)


def test_the_pace_is_that_of_the_last_hour_of_the_last_run(path, monkeypatch):
    with Ledger(path, write=True) as ledger:
        assert ledger.pace() is None
        with ledger._base:
            for run, at, tried, had_so_far in (
                (1.0, 0, 0, 0), (1.0, 100, 900, 900), (2.0, 10_000, 0, 0), (2.0, 13_000, 100, 50), (2.0, 16_600, 400, 200),
            ):  # fmt: skip
                ledger._base.execute("INSERT INTO ticks VALUES (?, ?, ?, ?)", (run, at, tried, had_so_far))
        assert ledger.pace() == (300.0, 150.0)
