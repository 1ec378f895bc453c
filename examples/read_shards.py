"""Three ways to read shards: the webdataset library, clipmill's random access, and pyarrow for the index alone.

python examples/read_shards.py data/tones/shards/webdataset-flac-44100
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile
import webdataset

from clipmill.shards.read import Shards

folder = Path(sys.argv[1])

# In order, by any WebDataset tool: shards are plain tars of KEY.flac and KEY.json.
for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).slice(3):
    wave, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")
    print(sample["__key__"], json.loads(sample["json"])["labels"], len(wave) // rate, "s")

# At random: any clip is one read away. take() narrows a set down, here to the clips of one class.
shards = Shards.open(folder)
some = shards.take(np.flatnonzero(shards.targets[:, 0]))
last = some.read(len(some) - 1)
print(f"{len(some)} of {len(shards)} clips are {shards.labels[0]}; the last has {len(last)} samples")

# The index is a table: ask it without touching a shard.
index = pq.read_table(folder / "index.parquet", columns=["key", "duration_s", "loudness_lufs"])
print(index.slice(0, 3).to_pydict())
