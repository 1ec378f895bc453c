"""How clips that are fetched one by one are asked for."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from clipmill.errors import ConfigError
from clipmill.types import REASONS

YOUTUBE = "https://www.youtube.com/watch?v={id}"
YOUTUBE_PER_HOUR = 300.0
"""What yt-dlp's wiki gives as the number of videos an hour that a guest session is allowed."""

PROXIES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")


@dataclass(frozen=True)
class SegmentOptions:
    """The choices of one fetch; none of them changes what a clip that is had holds.

    `rate` is in clips an hour over all workers (None: YouTube's 300, no limit elsewhere; 0: no
    limit). `timeout` and `pause` are in seconds. `retry`: redo the failures of these reasons
    alone. `from_dirs`: media already here, adopted first; with `offline` nothing else is. `recheck`:
    look first whether the media that were had are still there. `believe_gone`: go on where not
    one of the first clips is there.
    """

    url_template: str = YOUTUBE
    jobs: int = 4
    rate: float | None = None
    cookies: Path | None = None
    cookies_from_browser: str | None = None
    proxy: tuple[str, ...] = ()
    retries: int = 2
    retry: tuple[str, ...] = ()
    timeout: float = 120.0
    pause: float = 60.0
    max_pauses: int = 6
    allow_short: float = 0.5
    keep_silent: bool = False
    from_dirs: tuple[Path, ...] = ()
    offline: bool = False
    recheck: bool = False
    believe_gone: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: naming the flag, what was found and what is allowed.
        """
        if "{id}" not in self.url_template or not re.match(r"https?://", self.url_template):
            raise ConfigError(
                f"--url-template {self.url_template!r}: expected an http(s) address with {{id}} in it, as {YOUTUBE!r}"
            )
        if self.cookies and not self.cookies.is_file():
            raise ConfigError(
                f"--cookies {self.cookies}: is no file; expected cookies.txt as browsers export it"
            )
        for name in ("rate", "timeout", "pause", "allow_short"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a finite number")
        for number, proxy in enumerate(self.proxy, 1):
            _check_proxy(number, proxy)
        unknown = sorted(set(self.retry) - set(REASONS) - {"all"})
        if unknown:
            raise ConfigError(f"--retry {unknown[0]}: no such reason; known: all, {', '.join(REASONS)}")
        if self.offline and not self.from_dirs:
            raise ConfigError("--offline adopts media from --from DIR, and none was given")
        if self.offline and self.retry:
            raise ConfigError("--offline fetches nothing, and --retry would: give one of them")

    @property
    def per_hour(self) -> float | None:
        """The budget in clips an hour; None: no limit."""
        if self.rate is None:
            host = urlsplit(self.url_template).hostname or ""
            return (
                YOUTUBE_PER_HOUR if re.search(r"(^|\.)(youtube(-nocookie)?\.com|youtu\.be)$", host) else None
            )
        return self.rate or None

    def who(self, number: int) -> str:
        """A hash of whom the site takes us for, through the proxy of that number: address, proxy and cookies."""
        cookies = (str(self.cookies), self.cookies.stat().st_mtime_ns) if self.cookies else None
        proxy = self.proxy[number] if self.proxy else None
        said = (self.url_template, proxy, cookies, self.cookies_from_browser)
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def url(self, video: str) -> str:
        """The page of one video."""
        return self.url_template.replace("{id}", video)


def _check_proxy(number: int, proxy: str) -> None:
    """Raise where a proxy is none; never says it again, for it may hold a password."""
    try:
        parts = urlsplit(proxy)
        sound = parts.scheme in PROXIES and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise ConfigError(
            f"--proxy (number {number}): is no address of a proxy; expected SCHEME://[USER:PASSWORD@]HOST:PORT with "
            f"a scheme of {', '.join(PROXIES)}, and '/', '@' and ':' in a password as %2F, %40 and %3A"
        )
