"""Ask for clips one by one: workers that may hang or die, one budget, pauses for all, every answer in the ledger."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from clipmill.errors import FetchError
from clipmill.fetch.governor import LONGEST_RETRY_AFTER_S, Budget, Governor
from clipmill.fetch.ledger import Ledger, Outcome
from clipmill.fetch.options import SegmentOptions
from clipmill.fetch.queue import Queue
from clipmill.fetch.reasons import POLICY
from clipmill.fetch.segment import Ask, fetch_segment
from clipmill.run import Crew, Lost

Update = Callable[[int, str], None]
Say = Callable[[str], None]

SUSPECT = frozenset({"network", "timeout", "forbidden", "tool-error"})
"""Failures that may be nobody's fault but the network's or the site's: many in a row pause the fleet."""

NOWHERE = frozenset({"unavailable", "no-audio"})
"""What a wrong address or a login page makes of every clip."""

_NOWHERE_CLIPS = 24
_TICK_EVERY_S = 30.0
_LONGEST_BACKOFF_S = 300.0
_WHEN_BANNED = (
    "Wait some hours and run the same command again; or ask as somebody with --cookies FILE or "
    "--cookies-from-browser NAME, from elsewhere with --proxy URL, or less often with --rate PER_HOUR"
)
_WHEN_BROKEN = (
    "Look whether the network is there and the site answers, and run the same command again; "
    "where it answers others, ask less often with --rate PER_HOUR, or from elsewhere with --proxy URL"
)
_TOOLS_FAIL = (
    "clip after clip fails in the tools themselves: {}; update them (pip install -U 'yt-dlp[default]') "
    "and run the same command again"
)


class RefusedError(FetchError):
    """The site refuses us; what was not asked for is left for another time. Ends the command with 75."""

    exit_code = 75


@dataclass(frozen=True)
class Places:
    """Where a dataset's media go, and (`parts`) what is not whole yet."""

    media: Path
    parts: Path


def stem_of(key: str) -> str:
    """Where a clip's media goes, relative to the media root and without extension: 256 folders share the load."""
    return f"{hashlib.sha256(key.encode()).hexdigest()[:2]}/{key}"


def fetch_segments(
    todo: pa.Table, ledger: Ledger, places: Places, options: SegmentOptions, update: Update, say: Say
) -> None:
    """Ask for every clip of `todo` (columns of `tables.MANIFEST`, `group` being the video's id) and record what came.

    Raises:
        RefusedError: the site refuses us, and went on to after the last pause.
        FetchError: the tools fail on everything.
        OSError: our own disk is full or does not let us write.
    """
    shutil.rmtree(places.parts, ignore_errors=True)  # of a run that was killed
    try:
        _Fleet(todo, ledger, places, options, update, say).run()
    finally:
        shutil.rmtree(places.parts, ignore_errors=True)


@dataclass(frozen=True)
class _Asked:
    """A clip that is being asked for: its row, since when, and from which address."""

    row: int
    at: float
    governor: Governor


class _Fleet:
    """One run: which clips wait, which are being asked for, and what each answer leads to."""

    def __init__(
        self,
        todo: pa.Table,
        ledger: Ledger,
        places: Places,
        options: SegmentOptions,
        update: Update,
        say: Say,
    ) -> None:
        self._todo, self._ledger, self._places, self._options = todo, ledger, places, options
        self._update, self._say = update, say
        self._queue = Queue(todo.num_rows)
        self._budget = Budget(options.per_hour)
        streak = max(12, 3 * options.jobs)
        self._governors = [
            Governor(options.pause, options.max_pauses, streak) for _ in options.proxy or ("",)
        ]
        # Once: the file of cookies that it looks at may go while a fetch of weeks is running.
        self._who = [options.who(number) for number in range(len(self._governors))]
        self._turn = 0
        self._asked: dict[str, _Asked] = {}
        self._tries: Counter[int] = Counter()
        self._lost_before = frozenset(ledger.lost_keys())
        # Those too that a run gave up on without marking them: twice is enough to believe it of them.
        self._failed_before = self._lost_before | set(json.loads(ledger.state("gave_up") or "[]"))
        self._epoch = 0  # answers so far
        # Of each clip that failed for what may be everybody's trouble: in which epochs, and how at last.
        self._epochs: dict[int, set[int]] = defaultdict(set)
        self._answers: dict[int, Outcome] = {}
        # Recorded as failed for such a reason, since the address that it was asked from last had an answer.
        self._doubtful: dict[int, Governor] = {}
        # The first clips, as long as not one of them was there.
        watchful = not options.believe_gone and not ledger.counts()["had"]
        self._not_there: list[int] | None = [] if watchful else None
        self._had = self._failed = 0

    def run(self) -> None:
        began, ticked = time.time(), 0.0
        self._keep_pausing()
        try:
            with Crew(fetch_segment, self._options.jobs) as crew:
                while self._queue or crew.in_flight:
                    if time.monotonic() - ticked > _TICK_EVERY_S:
                        self._ledger.tick(began, self._had + self._failed, self._had)
                        ticked = time.monotonic()
                    self._send(crew)
                    self._show()
                    for ask, answer in crew.results(self._patience_s(crew)):
                        self._take(self._asked.pop(ask.key), ask.key, answer)
                    if not crew.in_flight and all(governor.exhausted for governor in self._governors):
                        self._give_up()
                        break
            if self._epoch:  # the site talks to us: no pause outlasts that
                self._ledger.set_state("pauses", "{}")
        finally:
            self._show()
            self._ledger.tick(began, self._had + self._failed, self._had)

    def _keep_pausing(self) -> None:
        """A pause that the run before was in still holds for who asks alike: "in two hours" was meant."""
        pauses = json.loads(self._ledger.state("pauses") or "{}")
        kept = {who: pause for who, pause in pauses.items() if pause["until"] > time.time()}
        for who, governor in zip(self._who, self._governors, strict=True):
            if who in kept:
                left_s = min(kept[who]["until"] - time.time(), LONGEST_RETRY_AFTER_S)
                governor.paused_until, governor.why = time.monotonic() + left_s, kept[who]["why"]
                self._say(f"still pausing, for {left_s:.0f} s, as the last run was: {governor.why}")
        self._ledger.set_state("pauses", json.dumps({who: kept[who] for who in self._who if who in kept}))

    # --- asking

    def _send(self, crew: Crew[Ask]) -> None:
        """Ask for as many clips as workers, budget and pauses allow now."""
        while crew.free:
            now = time.monotonic()
            governor = self._open_governor(now)
            if governor is None or self._budget.wait_s(now) or (row := self._queue.pop(now)) is None:
                return
            self._budget.asks(now)
            ask = self._ask(row, governor)
            self._asked[ask.key] = _Asked(row, now, governor)
            crew.give(ask, self._options.timeout)

    def _open_governor(self, now: float) -> Governor | None:
        """The next address in turn that is not pausing."""
        for _ in self._governors:
            self._turn = (self._turn + 1) % len(self._governors)
            governor = self._governors[self._turn]
            if not governor.exhausted and not governor.wait_s(now):
                return governor
        return None

    def _ask(self, row: int, governor: Governor) -> Ask:
        clip = self._todo.slice(row, 1).to_pylist()[0]
        options = self._options
        return Ask(
            key=clip["key"],
            url=options.url(clip["group"]),
            start_s=clip["start_s"],
            end_s=clip["end_s"],
            media_root=self._places.media,
            stem=stem_of(clip["key"]),
            parts=self._places.parts / clip["key"],
            cookies=options.cookies,
            cookies_from_browser=options.cookies_from_browser,
            proxy=options.proxy[self._governors.index(governor)] if options.proxy else None,
            short_s=options.allow_short,
            keep_silent=options.keep_silent,
        )

    def _patience_s(self, crew: Crew[Ask]) -> float:
        """How long to wait for answers before there may be something else to do."""
        if not crew.free or all(governor.exhausted for governor in self._governors):
            return 1.0
        now = time.monotonic()
        pause_s = min((g.wait_s(now) for g in self._governors if not g.exhausted), default=0.0)
        return min(max(pause_s, self._budget.wait_s(now), self._queue.wait_s(now), 0.0), 1.0)

    # --- answers

    def _take(self, asked: _Asked, key: str, answer: Outcome | Lost) -> None:
        if isinstance(answer, Lost):
            hint = "; --timeout allows more" if answer.reason == "timeout" else ""
            answer = Outcome(key, answer.reason, answer.message + hint)
        policy = "final" if answer.had else POLICY.get(answer.reason, "again")
        if policy == "fleet":
            self._refused(asked, answer)
        elif policy == "again":
            self._stumbled(asked, answer)
        else:
            asked.governor.answered(asked.at)
            self._epoch += 1
            self._doubtful = {row: g for row, g in self._doubtful.items() if g is not asked.governor}
            self._record(asked.row, answer)
            self._nowhere(asked.row, answer)

    def _nowhere(self, row: int, answer: Outcome) -> None:
        """Where nothing was ever had and the first many clips are not there, it is the address that is wrong.

        Raises:
            FetchError: it is; none of them is marked as failed.
        """
        if self._not_there is None or answer.key in self._lost_before:
            return  # what was lost before may well be gone, all of it
        if answer.reason not in NOWHERE:
            self._not_there = None
            return
        self._not_there.append(row)
        if len(self._not_there) == _NOWHERE_CLIPS:
            self._forget(self._not_there)
            raise FetchError(
                f"not one of the first {_NOWHERE_CLIPS} clips is there ({answer.reason}: {answer.message}); "
                "they are not marked as failed. Is --url-template right, and does nothing stand in between, "
                "such as a login page? Where they are gone indeed, --believe-gone goes on"
            )

    def _refused(self, asked: _Asked, answer: Outcome) -> None:
        """A bot check, or 429: the fleet pauses, and the clip is asked for again when others have been."""
        now, governor = time.monotonic(), asked.governor
        news = governor.refused(f"{answer.reason}: {answer.message}", asked.at, now, answer.retry_after_s)
        self._remember(asked.row, answer)
        self._queue.put_last(asked.row)
        self._keep_pause(governor, now)
        if news:
            self._say_pause(governor, now)

    def _stumbled(self, asked: _Asked, answer: Outcome) -> None:
        """A failure that another try may heal, or that may be everybody's."""
        now, governor, row = time.monotonic(), asked.governor, asked.row
        self._remember(row, answer)
        suspect = answer.reason in SUSPECT
        if suspect:
            in_a_row = [self._answers[other] for other in (*governor.in_a_row, row)]
            known = all(one.key in self._failed_before for one in in_a_row)
            why = f"{answer.reason}: {answer.message}"
            if governor.failed(row, why, asked.at, now, steady=known):
                self._queue.put_last(row)
                self._take_back()
                if not known and {one.reason for one in in_a_row} == {"tool-error"}:
                    self._give_up_on(self._queue.asked_again)
                    raise FetchError(_TOOLS_FAIL.format(answer.message))  # waiting mends no tool
                self._keep_pause(governor, now)
                self._say_pause(governor, now)
                return
        self._tries[row] += 1
        if self._tries[row] <= self._options.retries:
            self._queue.put(row, now + min(2.0 ** self._tries[row], _LONGEST_BACKOFF_S))
            return
        if suspect and answer.key not in self._lost_before:  # what was known of those is never undone
            self._doubtful[row] = governor
        self._record(row, answer)

    def _remember(self, row: int, answer: Outcome) -> None:
        self._epochs[row].add(self._epoch)
        self._answers[row] = answer

    def _take_back(self) -> None:
        """Undo what was recorded of clips that failed while everything did: they will be asked for again."""
        self._forget(self._doubtful)
        for row in self._doubtful:
            self._tries[row] = 0
            self._queue.put_last(row)
        self._doubtful.clear()

    def _forget(self, rows: Collection[int]) -> None:
        self._ledger.forget(self._todo["key"][row].as_py() for row in rows)
        self._failed -= len(rows)

    def _give_up(self) -> None:
        """The last pause is over: what is left is everybody's trouble, unless it is just clips that fail by themselves.

        Raises:
            RefusedError: it is everybody's.
        """
        self._take_back()
        rows = self._queue.tried()
        if rows is None or not all(map(self._fails_by_itself, rows)):
            self._give_up_on(self._queue.asked_again)
            raise RefusedError(self._refusal())
        for row in rows:
            self._record(row, self._answers[row])
        self._give_up_on([])

    def _fails_by_itself(self, row: int) -> bool:
        """Whether others were answered between two failures of it; what heals is believed in its second run."""
        answer = self._answers[row]
        again = POLICY.get(answer.reason) != "fleet" and answer.key in self._failed_before
        return len(self._epochs[row]) > 1 or again

    def _give_up_on(self, rows: Iterable[int]) -> None:
        """Remember, for the next run, which clips were asked for in vain, though they are not marked as failed."""
        keys = {self._answers[row].key for row in rows}
        self._ledger.set_state("gave_up", json.dumps(sorted(keys)))

    def _record(self, row: int, answer: Outcome) -> None:
        self._ledger.record(answer, self._todo["split"][row].as_py())
        self._had += answer.had
        self._failed += not answer.had

    # --- words

    def _show(self) -> None:
        left = self._todo.num_rows - self._had - self._failed
        now = time.monotonic()
        pause_s = min(governor.wait_s(now) for governor in self._governors)
        pausing = f", pausing {pause_s:.0f} s ({self._governors[0].why[:60]})" if pause_s else ""
        self._update(
            self._had + self._failed, f"had {self._had}, failed {self._failed}, left {left}{pausing}"
        )

    def _say_pause(self, governor: Governor, now: float) -> None:
        if governor.exhausted:
            return
        number = self._governors.index(governor) + 1
        who = "all workers pause" if len(self._governors) == 1 else f"proxy {number} pauses"
        which = f"pause {governor.pauses} of {governor.max_pauses}"
        self._say(f"{who} for {governor.wait_s(now):.0f} s ({which}): {governor.why}")

    def _keep_pause(self, governor: Governor, now: float) -> None:
        """Write down until when an address is not to be asked from: the next run keeps to it."""
        pauses = json.loads(self._ledger.state("pauses") or "{}")
        until = time.time() + governor.wait_s(now)
        pauses[self._who[self._governors.index(governor)]] = {"until": until, "why": governor.why}
        self._ledger.set_state("pauses", json.dumps(pauses))

    def _refusal(self) -> str:
        left = self._todo.num_rows - self._had - self._failed
        whys = "; ".join(sorted({governor.why for governor in self._governors}))
        banned = any(POLICY.get(governor.why.partition(":")[0]) == "fleet" for governor in self._governors)
        return (
            f"stopped after {self._options.max_pauses} pauses with no answer in between: {whys}. "
            f"{self._had} clips were had in this run; {left} are left, and are not marked as failed for this. "
            f"{_WHEN_BANNED if banned else _WHEN_BROKEN}"
        )
