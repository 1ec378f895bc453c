"""How long a file says it is, without decoding it."""

from __future__ import annotations

from pathlib import Path

import soundfile

from clipmill.audio.decode import _ABSURD, _silenced_stderr


def stated_s(path: Path) -> float | None:
    """Seconds of sound in a file: by its header, or by its packets' times where that says nothing.

    None where nothing opens it: decoding will say why. A header can lie, so that whoever
    takes the sound must still see that it comes.
    """
    try:
        with (
            _silenced_stderr(),
            open(path, "rb") as raw,
            soundfile.SoundFile(raw.fileno(), closefd=False) as file,
        ):
            if 0 < file.frames < _ABSURD:
                return float(file.frames / file.samplerate)
    except (OSError, soundfile.SoundFileError, RuntimeError):
        pass
    return _by_ffmpeg(path)


def _by_ffmpeg(path: Path) -> float | None:
    import av

    av.logging.set_level(av.logging.PANIC)
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                return None
            if container.duration:
                return float(container.duration / av.time_base)
            # Written as a stream (a WebM from a pipe): its packets are passed over, none is decoded.
            stream = container.streams.audio[0]
            ends = (
                (packet.pts + (packet.duration or 0)) * packet.time_base
                for packet in container.demux(stream)
                if packet.pts is not None
            )
            return float(max(ends, default=0)) or None
    except (av.FFmpegError, OSError, ValueError, OverflowError):
        return None
