"""What a failed fetch is called, and what to do about it.

yt-dlp hands a site's own words on as text, so that is what `_SAID` looks through: in order,
for many messages begin alike ("Video unavailable. ..." says nearly everything) and the
more telling part decides. What the site did not say, the types of the errors do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from clipmill.errors import DecodeError
from clipmill.fetch.governor import seconds_to_wait

POLICY = {
    # The clip's own: asking again is a waste of the budget.
    "private": "final",
    "removed": "final",
    "account-terminated": "final",
    "copyright": "final",
    "geo-blocked": "final",
    "age-gated": "final",
    "members-only": "final",
    "unavailable": "final",
    "no-audio": "final",
    "too-short": "final",
    "silent": "final",
    # It may be had in a moment, or another day.
    "live": "later",
    "forbidden": "again",
    "network": "again",
    "timeout": "again",
    "empty": "again",
    "corrupt": "again",
    "tool-error": "again",
    # Not about the clip at all: everyone must stop asking for a while.
    "bot-check": "fleet",
    "rate-limited": "fleet",
}
"""Reason code -> final: not asked again unless told to. again: in this run and the next ones.
later: in a later run alone. fleet: all workers pause, then it is asked again."""

_SAID = [
    (reason, re.compile(pattern))
    for reason, pattern in (
        ("bot-check", r"not a bot\b|captcha|unusual traffic"),
        ("rate-limited", r"rate-limited by|isn't available, try again later|too many requests"),
        ("age-gated", r"confirm your age|inappropriate for some users|age-restricted|age restricted"),
        (
            "account-terminated",
            r"account associated with this video has been|account has been terminated"
            r"|(uploader|owner) has closed their youtube account|user has been suspended",
        ),
        ("copyright", r"copyright|who has blocked it|blocked it (in|from)"),
        (
            "geo-blocked",
            r"(available|blocked|playable) in your (country|region|location)|geo.?restrict"
            r"|available from your location|unavailable in your|not available in your",
        ),
        ("private", r"private video|video is private|made this video private"),
        (
            "members-only",
            r"members-only|member-only|members on level|channel's members|join this channel"
            r"|requires (payment|purchase|a rental|a subscription)|premium members|only available to .*members",
        ),
        (
            "removed",
            r"removed by the (uploader|user)|been removed|been deleted|violat(es|ing) |no longer available",
        ),
        ("live", r"live event (will begin|has ended)|premieres? (in|will begin)|will begin (in|shortly)"),
        ("live", r"processing this video|not currently live|is offline"),
        # The site turns away the client that yt-dlp posed as, and not the video.
        ("tool-error", r"playback on other websites|not available on this app|page needs to be reloaded"),
        ("tool-error", r"requested format is not available|no video formats found|player response"),
        ("tool-error", r"signature|nsig|n challenge|javascript runtime|ffmpeg (is )?not (found|installed)"),
        ("unavailable", r"(video|content) (is )?(unavailable|not available)|(video|content) isn't available"),
        ("unavailable", r"video (does not|doesn't) exist|recording is not available"),
        ("empty", r"downloaded file is empty|did not get any data blocks|no data received"),
    )
]

_STATUS = {
    401: "forbidden",
    402: "members-only",
    403: "forbidden",
    404: "unavailable",
    408: "timeout",
    410: "removed",
    429: "rate-limited",
    451: "geo-blocked",
}

_TIMED_OUT = re.compile(r"timed out|\btimeout\b")
_BROKEN_OFF = re.compile(
    r"stream ends prematurely|connection (was )?(reset|aborted|refused|broken)|remote end closed|broken pipe"
    r"|input/output error|incomplete ?read|more expected|getaddrinfo|name resolution|failed to resolve"
    r"|name or service not known|network is unreachable|no route to host|ssl:|\btls\b|certificate verify"
)


def classify(error: BaseException, log: str = "") -> tuple[str, str, float | None]:
    """What a failure is called: one of `clipmill.types.REASONS`, the raw message, and Retry-After in seconds.

    Args:
        error: what was raised; the errors behind it are looked at too.
        log: what the tools said besides, for where the error itself tells nothing.
    """
    chain = list(_behind(error))
    message = _one_line(chain[0])
    answers = [cause for cause in chain if getattr(cause, "status", None) and hasattr(cause, "response")]
    stated = answers[0].response.headers.get("Retry-After") if answers else None
    retry_after_s = None if stated is None else seconds_to_wait(stated)
    return _reason(chain, answers, log) or "tool-error", message, retry_after_s


def _reason(chain: list[BaseException], answers: list[BaseException], log: str) -> str | None:
    for cause in chain:
        if isinstance(cause, DecodeError):
            return cause.reason
    names = _kinds(chain)
    text = " ".join(map(_words, map(str, chain)))
    if "GeoRestrictedError" in names:
        return "copyright" if _said(text) == "copyright" else "geo-blocked"
    status = answers[0].status if answers else _status_in(text)  # type: ignore[attr-defined]
    by_type = "no-audio" if "UnsupportedError" in names else None
    return _said(text) or by_type or _of_status(status) or _of_network(text, chain) or _of_log(log)


def _said(text: str) -> str | None:
    return next((reason for reason, pattern in _SAID if pattern.search(text)), None)


def _of_status(status: int | None) -> str | None:
    return None if status is None else "network" if status >= 500 else _STATUS.get(status)


def _of_network(text: str, chain: list[BaseException]) -> str | None:
    # urllib3 counts a refused connection among its own timeouts: Python's TimeoutError and the words alone tell.
    if any(isinstance(cause, TimeoutError) for cause in chain) or _TIMED_OUT.search(text):
        return "timeout"
    known = any(isinstance(cause, ConnectionError) for cause in chain) or "TransportError" in _kinds(chain)
    return "network" if known or _BROKEN_OFF.search(text) else None


def _kinds(chain: list[BaseException]) -> set[str]:
    """The names of the errors' classes: to compare with yt-dlp's own would import it."""
    return {kind.__name__ for cause in chain for kind in type(cause).__mro__}


def _of_log(log: str) -> str | None:
    text = _words(log)
    return _said(text) or _of_status(_status_in(text)) or _of_network(text, [])


def _status_in(text: str) -> int | None:
    found = re.search(r"http error (\d{3})|server returned (\d)xx|server returned (\d{3})", text)
    return int(found[1] or found[3] or found[2] + "00") if found else None


def _behind(error: BaseException) -> Iterator[BaseException]:
    """The error and those behind it, each once: yt-dlp keeps them in `exc_info` and `cause`."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        kept = (getattr(one, "exc_info", None) or (None, None))[1]
        others = (kept, getattr(one, "cause", None), one.__cause__, one.__context__)
        waiting.extend(other for other in others if isinstance(other, BaseException))


def _words(text: str) -> str:
    """Text to look through: lower case, plain apostrophes, without addresses and ids, which could say anything."""
    text = re.sub(
        r"https?://\S+|\[[\w:+]+\] \S+: ", " ", text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    return " ".join(text.lower().split())


def _one_line(error: BaseException) -> str:
    """The raw message on one line, without yt-dlp's plea to report it, and without a proxy's password."""
    text = " ".join(str(error).split()) or type(error).__name__
    # What caused it has been said before that; or it has not, and stays.
    text = re.sub(r"^ERROR: |; please report this issue on .*| \(caused by TransportError\(.*\)\)$", "", text)
    return re.sub(r"(?<=://)[^/\s@]+@", "", text)
