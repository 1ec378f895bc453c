"""What a failed fetch is called, from what yt-dlp and the sites really say, and what is done about it."""

from __future__ import annotations

import errno
import io
import sys
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yt_dlp.networking.common import Response
from yt_dlp.networking.exceptions import (
    HTTPError,
    IncompleteRead,
    ProxyError,
    SSLError,
    TransportError,
)
from yt_dlp.utils import (
    DownloadError,
    ExtractorError,
    GeoRestrictedError,
    UnsupportedError,
    YoutubeDLError,
)

from clipmill.errors import DecodeError
from clipmill.fetch.reasons import POLICY, classify
from clipmill.types import REASONS

HINT = (
    "Use --cookies-from-browser or --cookies for the authentication. See  "
    "https://github.com/yt-dlp/yt-dlp/wiki/FAQ#how-do-i-pass-cookies-to-yt-dlp  for how to manually pass cookies"
)

SAID = {
    "private": [
        f"Private video. Sign in if you've been granted access to this video. {HINT}",
        "This video is private",
        "This is a private video. Please sign in to verify that you may see it.",
        "Video unavailable. This video is private",
    ],
    "removed": [
        "Video unavailable. This video has been removed by the uploader",
        "This video has been removed for violating YouTube's Terms of Service",
        "This video has been removed for violating YouTube's policy on hate speech. Learn more about combating hate speech in your country.",
        "This video has been removed for violating YouTube\N{RIGHT SINGLE QUOTATION MARK}s policy on nudity or sexual content",
        "This video has been removed by the user",
        "Video unavailable. This video is no longer available",
    ],
    "account-terminated": [
        "Video unavailable. This video is no longer available because the YouTube account associated with this video has been terminated.",
        "This video is no longer available because the YouTube account associated with this video has been closed.",
        "This video is no longer available because the uploader has closed their YouTube account.",
        "This account has been terminated for violating Google's Terms of Service.",
        "This video is no longer available due to a copyright claim by X and because the account associated with this video has been terminated",
    ],
    "copyright": [
        "Video unavailable. This video is no longer available due to a copyright claim by Universal Music Group",
        "Video unavailable. This video contains content from WMG, who has blocked it in your country on copyright grounds",
        "Video unavailable. This video contains content from SME, who has blocked it on copyright grounds.",
        "Video unavailable. This video contains content from UMG. It is not available. It was blocked in your country on copyright grounds",
    ],
    "geo-blocked": [
        "Video unavailable. The uploader has not made this video available in your country",
        "This video is not available in your country",
        "This video is not available from your location due to geo restriction",
    ],
    "age-gated": [
        f"Sign in to confirm your age. This video may be inappropriate for some users. {HINT}",
        "Sign in to confirm your age",
        "This video is age-restricted and only available on YouTube",
    ],
    "members-only": [
        "Join this channel to get access to members-only content like this video, and other exclusive perks.",
        "Join this channel from your computer or Android app to get access to members-only content like this video.",
        "This video is available to this channel's members on level: Bonus Videos! (or any higher level).",
        "This video requires payment to watch",
        "This video is only available to Music Premium members",
    ],
    "bot-check": [
        f"Sign in to confirm you're not a bot. {HINT}",
        f"Sign in to confirm you\N{RIGHT SINGLE QUOTATION MARK}re not a bot. {HINT}",
        "Video unavailable. YouTube is requiring a captcha challenge before playback",
    ],
    "rate-limited": [
        "Video unavailable. This content isn't available, try again later. The current session has been rate-limited by YouTube for up to an "
        "hour. It is recommended to use `-t sleep` to add a delay between video requests to avoid exceeding the rate limit. For more "
        "information, refer to  https://github.com/yt-dlp/yt-dlp/wiki/Extractors#this-content-isnt-available-try-again-later",
        "This content isn\N{RIGHT SINGLE QUOTATION MARK}t available, try again later",
        "Unable to download API page: HTTP Error 429: Too Many Requests",
    ],
    "live": [
        "This live event will begin in 3 hours.",
        "This live event will begin in a few moments.",
        "Premieres in 2 days",
        "Premiere will begin shortly",
        "This live event has ended.",
    ],
    "unavailable": [
        "Video unavailable",
        "This video is not available",
        "This video is unavailable",
        "This video isn't available anymore",
        "This live stream recording is not available.",
    ],
    "forbidden": ["unable to download video data: HTTP Error 403: Forbidden"],
    "empty": ["The downloaded file is empty", "Did not get any data blocks"],
    "network": [
        "Unable to download webpage: [Errno 104] Connection reset by peer",
        "Failed to resolve 'www.youtube.com' ([Errno -3] Temporary failure in name resolution)",
        "ffmpeg: https://host/: Stream ends prematurely at 1000, should be 2000",
        "in.webm: Input/output error",
        "HTTP Error 503: Service Unavailable",
    ],
    "timeout": [
        "Unable to download webpage: The read operation timed out",
        "Read timed out. (read timeout=20.0)",
    ],
    "tool-error": [
        "Requested format is not available. Use --list-formats for a list of available formats",
        "Video unavailable. Playback on other websites has been disabled by the video owner",
        "The following content is not available on this app.. Watch on the latest version of YouTube.",
        "Failed to extract any player response",
        "Signature extraction failed: Some formats may be missing",
        "No supported JavaScript runtime could be found",
        "ffmpeg is not installed. Aborting due to --abort-on-error",
        "The page needs to be reloaded.",
        "This video is DRM protected",
        "No video formats found!",
    ],
}


def raised(inner: Exception) -> DownloadError:
    """As YoutubeDL.extract_info raises it."""
    try:
        raise inner
    except Exception:
        return DownloadError(f"ERROR: {inner}", sys.exc_info())


def answer(status: int, headers: dict[str, str] | None = None) -> HTTPError:
    return HTTPError(Response(io.BytesIO(), "https://host/", headers or {}, status=status))


@pytest.mark.parametrize(
    ("reason", "text"), [(reason, text) for reason, texts in SAID.items() for text in texts]
)
def test_what_a_site_says_has_one_name(reason: str, text: str) -> None:
    inner = ExtractorError(text, expected=True, video_id="dQw4w9WgXcQ", ie="youtube")
    got, message, retry_after_s = classify(raised(inner))
    assert (got, retry_after_s) == (reason, None)
    assert message == f"[youtube] dQw4w9WgXcQ: {' '.join(text.split())}"
    assert classify(inner)[0] == reason
    assert classify(YoutubeDLError("something failed"), log=f"noise\nERROR: {text}")[0] == reason


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "tool-error"), (401, "forbidden"), (402, "members-only"), (403, "forbidden"), (404, "unavailable"),
        (408, "timeout"), (410, "removed"), (429, "rate-limited"), (451, "geo-blocked"), (500, "network"),
        (502, "network"), (503, "network"), (504, "network"),
    ],
)  # fmt: skip
def test_a_status_that_says_all_there_is_has_one_name(status: int, reason: str) -> None:
    bare = answer(status)
    assert classify(bare)[0] == reason
    wrapped = ExtractorError(
        "Unable to download webpage", cause=bare, expected=True, ie="generic", video_id="k"
    )
    assert classify(raised(wrapped))[0] == reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GeoRestrictedError("Some site's own words"), "geo-blocked"),
        (UnsupportedError("https://host/private-video-copyright"), "no-audio"),
        (IncompleteRead(10, 20), "network"),
        (SSLError("EOF occurred in violation of protocol (_ssl.c:1007)"), "network"),
        (ProxyError("Unable to connect to proxy"), "network"),
        (TransportError("Connection refused", cause=ConnectionRefusedError(111, "refused")), "network"),
        (TransportError("something", cause=TimeoutError()), "timeout"),
        (
            TransportError("('Connection aborted.', RemoteDisconnected('Remote end closed connection'))"),
            "network",
        ),
        (OSError(errno.ENOEXEC, "exec format error"), "tool-error"),
        (KeyError("formats"), "tool-error"),
    ],
)
def test_an_error_without_words_is_named_by_its_kind(error: Exception, reason: str) -> None:
    assert classify(raised(error))[0] == reason


@given(st.sampled_from(sorted(REASONS)), st.text(max_size=80))
def test_what_our_own_checks_found_keeps_its_name(reason: str, words: str) -> None:
    got, message, retry_after_s = classify(DecodeError(reason, words))
    assert (got, retry_after_s) == (reason, None)
    assert message
    assert len(message.splitlines()) == 1


@given(st.text(max_size=200), st.text(max_size=200))
def test_whatever_is_said_has_a_name_with_a_policy(words: str, log: str) -> None:
    reason, message, _ = classify(raised(YoutubeDLError(words)), log)
    assert reason in POLICY
    assert len(message.splitlines()) == 1


@given(st.integers(0, 10**6))
def test_retry_after_is_heard_in_seconds_and_as_a_date(seconds: int) -> None:
    assert (
        classify(raised(ExtractorError("x", cause=answer(429, {"Retry-After": str(seconds)}))))[2] == seconds
    )
    then = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)
    assert classify(answer(503, {"Retry-After": then}))[2] == pytest.approx(seconds, abs=5)


@pytest.mark.parametrize("nonsense", ["", "soon", "-5", "Mon, 99 Foo 2026"])
def test_retry_after_that_cannot_be_read_is_no_wish(nonsense: str) -> None:
    assert classify(answer(429, {"Retry-After": nonsense})) == (
        "rate-limited",
        "HTTP Error 429: Too Many Requests",
        None,
    )


def test_an_id_or_an_address_is_not_taken_for_what_the_site_says() -> None:
    odd = ExtractorError("Requested format is not available", expected=True, ie="generic", video_id="captcha")
    assert classify(raised(odd))[0] == "tool-error"
    assert classify(YoutubeDLError("cannot use https://host/private video"))[0] != "copyright"
    assert classify(YoutubeDLError("cannot use https://host/copyright"))[0] == "tool-error"


def test_the_message_is_one_line_without_a_plea_to_report_it_or_a_password() -> None:
    inner = ExtractorError("broken\n  badly at http://me:secret@proxy:80/", ie="youtube", video_id="k")
    assert classify(raised(inner))[1] == "[youtube] k: broken badly at http://proxy:80/"


def test_every_reason_of_a_site_has_one_policy_and_every_name_given_is_known() -> None:
    codes = list(REASONS)
    of_sites = codes[codes.index("private") :]
    assert set(of_sites) <= set(POLICY) <= set(REASONS)
    assert set(POLICY.values()) == {"final", "again", "later", "fleet"}
    assert {reason for reason, policy in POLICY.items() if policy == "fleet"} == {"bot-check", "rate-limited"}
