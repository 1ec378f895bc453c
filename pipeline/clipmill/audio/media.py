"""Whole files in the formats that recorders, phones and web sites write, encoded in memory and in process.

libsndfile writes what it can; PyAV (FFmpeg's libraries) writes Opus in WebM and AAC in
MPEG-4. Equal samples give equal bytes, but for the serial number that libsndfile draws
for every Ogg stream.
"""

from __future__ import annotations

import io
from typing import cast

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
_BLOCK = 16_384  # frames written at once


def encode_media(samples: NDArray[np.float32], rate: int, container: str, encoding: str) -> bytes:
    """Encode float32 `[channels, samples]` in -1..1 as a whole file.

    Args:
        samples: 1, 2 or 6 channels.
        rate: in Hz; Opus takes 48, 24, 16, 12 and 8 kHz only.
        container: libsndfile's name in upper case, such as "WAV", or FFmpeg's in lower, such as "webm".
        encoding: libsndfile's subtype, such as "PCM_24", or FFmpeg's encoder, such as "libopus".
    """
    if container.islower():
        return _encode_av(samples, rate, container, encoding)
    if container not in soundfile.available_formats():  # libsndfile can be built without MP3
        return _encode_av(samples, rate, "mp3", "libmp3lame")
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, len(samples), encoding, format=container) as file:
        # In blocks: libsndfile's Vorbis writer has run out of stack on long clips given whole.
        for start in range(0, samples.shape[1], _BLOCK):
            file.write(samples[:, start : start + _BLOCK].T)
    return buffer.getvalue()


def _encode_av(samples: NDArray[np.float32], rate: int, container: str, codec: str) -> bytes:
    layout = _LAYOUTS[len(samples)]
    # libopus takes its channels interleaved, the others take one after the other.
    packed = codec == "libopus"
    array = samples.T.reshape(1, -1) if packed else samples
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(array), "flt" if packed else "fltp", layout)
    frame.sample_rate = rate
    buffer = io.BytesIO()
    # Bit-exact: no random identifier, no date, no version in the file.
    with av.open(buffer, "w", format=container, container_options={"fflags": "+bitexact"}) as output:
        stream = cast("av.AudioStream", output.add_stream(codec, rate=rate, layout=layout))
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()
