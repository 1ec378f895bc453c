"""The fleet: one budget, pauses for all, every clip in the ledger; with the real yt-dlp against a local server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clipmill import tables
from clipmill.errors import FetchError
from clipmill.fetch.ledger import Ledger, Outcome
from clipmill.fetch.options import SegmentOptions
from clipmill.fetch.segments import Places, RefusedError, fetch_segments
from misbehaving import Fine, Misbehaving, Status


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    with Misbehaving() as server:
        yield server


class Fetch:
    """A fetch of `clips` two-second clips, and what came of it."""

    def __init__(self, server: Misbehaving, root: Path, clips: int, **options: Any) -> None:
        self.server, self.said, self.shown = server, [], []  # type: ignore[var-annotated]
        self.ids = [f"-clip_{n:05d}" for n in range(clips)]
        todo = tables.manifest_table(
            {
                "key": [f"{video}_1000" for video in self.ids],
                "source": [""] * clips,
                "labels": [["Dog"]] * clips,
                "start_s": [1.0] * clips,
                "end_s": [3.0] * clips,
                "group": self.ids,
                "split": ["eval"] * clips,
            }
        )
        places = Places(root / "media", root / ".parts")
        settings = SegmentOptions(**{"url_template": server.template, "pause": 0.3, **options})
        self.error: FetchError | None = None
        with Ledger(root / "ledger.sqlite", write=True) as ledger:
            try:
                fetch_segments(
                    todo,
                    ledger,
                    places,
                    settings,
                    lambda done, facts: self.shown.append(facts),
                    self.said.append,
                )
            except FetchError as error:
                self.error = error
            self.counts = ledger.counts()
            self.reasons = {f.key[:-5]: f.reason for f in ledger.losses()}
            rows = ledger.columns("source", "bytes", outcome="had")
        self.media = {path.relative_to(places.media).as_posix() for path in places.media.rglob("*.webm")}
        assert self.media == set(rows["source"])
        assert all((places.media / s).stat().st_size == b for s, b in zip(*rows.values(), strict=True))
        assert not places.parts.exists()


def test_all_that_is_there_is_had(server, tmp_path):
    fetch = Fetch(server, tmp_path, 12)
    assert fetch.counts == {"had": 12, "failed": 0, "skipped": 0}
    assert fetch.shown[-1] == "had 12, failed 0, left 0"


def test_a_loss_is_a_row_and_the_rest_goes_on(server, tmp_path):
    server.behave("-clip_00003.webm", Status(404))
    fetch = Fetch(server, tmp_path, 6, jobs=1)
    assert (fetch.counts["had"], fetch.reasons) == (5, {"-clip_00003": "unavailable"})


def test_the_budget_is_one_for_all_workers(server, tmp_path):
    began = time.time()
    fetch = Fetch(server, tmp_path, 9, jobs=4, rate=3600 * 4)
    assert fetch.counts["had"] == 9
    assert max(request.at for request in server.requests) - began > 8 * 0.25


def test_a_refusal_pauses_all_and_the_clip_that_met_it_is_asked_for_again(server, tmp_path):
    server.behave("-clip_00002.webm", Status(429, {"Retry-After": "2"}), times=1)
    fetch = Fetch(server, tmp_path, 8, jobs=1)
    assert fetch.counts == {"had": 8, "failed": 0, "skipped": 0}
    assert len(fetch.said) == 1
    assert "all workers pause for 2 s (pause 1 of 6): rate-limited" in fetch.said[0]
    refused, *later = server.asked("-clip_00002.webm")
    nothing = [r for r in server.requests if refused.at < r.at < refused.at + 1.9]
    assert later
    assert not nothing


def test_a_ban_stops_the_fetch_with_75_and_marks_nothing_as_failed(server, tmp_path):
    server.behave(None, Status(429))
    fetch = Fetch(server, tmp_path, 40, jobs=4, pause=0.05, max_pauses=2)
    assert isinstance(fetch.error, RefusedError)
    assert fetch.error.exit_code == 75
    assert "stopped after 2 pauses with no answer in between: rate-limited" in str(fetch.error)
    assert "40 are left, and are not marked as failed for this" in str(fetch.error)
    assert fetch.counts == {"had": 0, "failed": 0, "skipped": 0}
    assert len(server.requests) <= 3 * 4 * 2  # the list was not burned: three rounds of at most four workers


def test_a_clip_that_alone_is_refused_ends_as_its_own_failure(server, tmp_path):
    server.behave("-clip_00001.webm", Status(429))
    fetch = Fetch(server, tmp_path, 6, jobs=1, pause=0.05, max_pauses=2)
    assert fetch.counts["had"] == 5
    assert fetch.reasons == {"-clip_00001": "rate-limited"}
    assert fetch.error is None


def test_several_clips_that_alone_are_refused_end_as_their_own_failures(server, tmp_path):
    for n in (1, 3, 5):
        server.behave(f"-clip_{n:05d}.webm", Status(429))
    fetch = Fetch(server, tmp_path, 10, jobs=1, pause=0.05, max_pauses=3)
    assert fetch.error is None
    assert fetch.counts["had"] == 7
    assert set(fetch.reasons.values()) == {"rate-limited"}


@pytest.mark.parametrize("retries", [0, 1])
def test_many_clips_that_go_on_failing_end_as_failed_and_stay_so(server, tmp_path, retries):
    bad = {f"-clip_{n:05d}" for n in range(0, 45, 3)}
    for video in bad:
        server.behave(f"{video}.webm", Status(403))
    for _ in range(2):
        fetch = Fetch(server, tmp_path, 45, jobs=2, retries=retries, pause=0.05, max_pauses=1)
    assert fetch.error is None
    assert (fetch.counts["had"], fetch.reasons) == (30, dict.fromkeys(bad, "forbidden"))


def test_an_end_where_all_fails_is_left_once_and_believed_in_the_next_run(server, tmp_path):
    for n in range(20, 40):
        server.behave(f"-clip_{n:05d}.webm", Status(503))
    first = Fetch(server, tmp_path, 40, jobs=1, retries=0, pause=0.05, max_pauses=3)
    assert isinstance(first.error, RefusedError)
    assert first.counts == {"had": 20, "failed": 0, "skipped": 0}
    second = Fetch(server, tmp_path, 40, jobs=1, retries=0, pause=0.05, max_pauses=3)
    assert second.error is None
    assert second.counts == {"had": 20, "failed": 20, "skipped": 0}


def test_a_ban_is_a_ban_for_clips_that_were_lost_before_too(server, tmp_path):
    with Ledger(tmp_path / "ledger.sqlite", write=True) as ledger:
        for n in range(100):
            ledger.record(Outcome(f"-clip_{n:05d}_1000", "empty", "so"), "eval")
    server.behave(None, Status(403))
    fetch = Fetch(server, tmp_path, 100, jobs=2, retries=0, pause=0.05, max_pauses=2)
    assert isinstance(fetch.error, RefusedError)
    assert len(server.requests) < 2 * 60  # two for a clip; not the whole list
    assert len(fetch.reasons) == 100


def test_a_dead_network_does_not_erase_what_was_known_of_earlier_losses(server, tmp_path):
    with Ledger(tmp_path / "ledger.sqlite", write=True) as ledger:
        for n in range(20):
            ledger.record(Outcome(f"-clip_{n:05d}_1000", "forbidden", "so"), "eval")
    server.behave(None, Status(503))
    fetch = Fetch(server, tmp_path, 20, jobs=1, pause=0.05, max_pauses=1, retries=0)
    assert len(fetch.reasons) == 20


def test_of_two_proxies_a_dead_one_loses_no_clips(server, tmp_path):
    proxies = ("http://127.0.0.1:9", server.root)
    fetch = Fetch(server, tmp_path, 40, jobs=2, retries=0, pause=0.05, max_pauses=0, proxy=proxies)
    assert fetch.counts["had"] >= 40 - 12


def test_a_dead_network_burns_no_list_either(server, tmp_path):
    server.behave(None, Status(503))
    fetch = Fetch(server, tmp_path, 30, jobs=2, pause=0.05, max_pauses=1, retries=0)
    assert isinstance(fetch.error, RefusedError)
    assert "clips in a row failed (network" in str(fetch.error)
    assert fetch.counts == {"had": 0, "failed": 0, "skipped": 0}


def test_a_pause_of_a_broken_network_goes_on_where_it_was(server, tmp_path):
    for n in range(3, 15):
        server.behave(f"-clip_{n:05d}.webm", Status(503), times=1)
    fetch = Fetch(server, tmp_path, 20, jobs=1, pause=0.2, retries=0)
    assert fetch.counts == {"had": 20, "failed": 0, "skipped": 0}
    assert "12 clips in a row failed" in fetch.said[0]


def test_an_address_where_nothing_is_burns_no_list(server, tmp_path):
    server.behave(None, Status(404))
    fetch = Fetch(server, tmp_path, 60, jobs=2)
    assert isinstance(fetch.error, FetchError)
    assert fetch.error.exit_code == 1
    assert "not one of the first 24 clips is there (unavailable: " in str(fetch.error)
    assert "Is --url-template right" in str(fetch.error)
    assert fetch.counts == {"had": 0, "failed": 0, "skipped": 0}
    assert Fetch(server, tmp_path, 30, jobs=1, believe_gone=True).counts["failed"] == 30
    server.behave(None, Fine())
    assert Fetch(server, tmp_path, 60, jobs=2, retry=("all",)).counts["had"] == 60


def test_clips_that_were_lost_before_may_all_be_gone(server, tmp_path):
    with Ledger(tmp_path / "ledger.sqlite", write=True) as ledger:
        for n in range(40):
            ledger.record(Outcome(f"-clip_{n:05d}_1000", "network", "so"), "eval")
    server.behave(None, Status(404))
    fetch = Fetch(server, tmp_path, 40, jobs=2)
    assert fetch.error is None
    assert set(fetch.reasons.values()) == {"unavailable"}


def test_a_pause_holds_for_the_next_run_that_asks_alike(server, tmp_path):
    with Ledger(tmp_path / "ledger.sqlite", write=True) as ledger:
        alike, other = (SegmentOptions(url_template=url).who(0) for url in (server.template, "http://x/{id}"))
        pause = {"until": time.time() + 2.0, "why": "rate-limited: so"}
        pauses = {alike: pause, other: {"until": time.time() + 3600, "why": "so"}}
        ledger.set_state("pauses", json.dumps(pauses))
    fetch = Fetch(server, tmp_path, 3, jobs=1)
    assert fetch.said[0].startswith("still pausing, for ")
    assert min(request.at for request in server.requests) >= pause["until"] - 0.1
    assert fetch.counts["had"] == 3


def test_failures_that_another_try_heals_are_tried_again_in_the_same_run(server, tmp_path):
    server.behave("-clip_00001.webm", Status(500), times=1)
    server.behave("-clip_00002.webm", Status(500))
    fetch = Fetch(server, tmp_path, 4, jobs=1, retries=1)
    assert fetch.reasons == {"-clip_00002": "network"}
    assert fetch.counts["had"] == 3


def test_a_proxy_that_is_refused_pauses_while_the_other_goes_on(server, tmp_path):
    # Proxies of two local addresses: one refuses all, the other is a server that answers for any host.
    with Misbehaving() as banned:
        banned.behave(None, Status(429))
        fetch = Fetch(server, tmp_path, 10, jobs=1, pause=0.2, max_pauses=2, proxy=(banned.root, server.root))
    assert fetch.counts["had"] == 10
    assert any("proxy 1 pauses" in line for line in fetch.said)
