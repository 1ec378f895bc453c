"""How clips that are fetched one by one are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from clipmill.errors import ConfigError
from clipmill.types import REASONS

YOUTUBE = "https://www.youtube.com/watch?v={id}"
YOUTUBE_PER_HOUR = 300.0
"""What yt-dlp's wiki gives as the number of videos an hour that a guest session is allowed."""


@dataclass(frozen=True)
class SegmentOptions:
    """The choices of one fetch; none of them changes what a clip that is had holds.

    `rate` is in clips an hour over all workers (None: YouTube's 300, no limit elsewhere; 0: no
    limit). `timeout` and `pause` are in seconds. `retry`: redo the failures of these reasons
    alone. `from_dirs`: media already here, adopted first; with `offline` nothing else is.
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
            return YOUTUBE_PER_HOUR if self.url_template == YOUTUBE else None
        return self.rate or None

    def url(self, video: str) -> str:
        """The page of one video."""
        return self.url_template.replace("{id}", video)
