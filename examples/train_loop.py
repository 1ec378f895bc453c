"""A training loop of one's own, fed by clipmill's loader: balanced classes, random crops, resuming by one integer.

python examples/train_loop.py data/tones/shards/webdataset-flac-44100
"""

import sys

import torch
from torch import nn

from clipmill.augment import to_float
from clipmill.features import LogMel
from clipmill.loader import Loader, WholeClips, choose_sampler
from clipmill.shards.read import Shards

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
shards = Shards.open(sys.argv[1])
learnt, held_out = shards.where("fold != 1"), shards.where("fold == 1")
rate, classes = shards.sample_rate, len(shards.labels)

torch.manual_seed(0)
logmel = LogMel(sample_rate=rate).to(device)
network = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, classes)).to(
    device
)


def hear(waves):
    """Int16 `[B, samples]` -> logits `[B, classes]`, from the mean of the log-mel over time."""
    return network(logmel(to_float(waves)).mean(2))


# Step 0 to 199; a run that was stopped at step 120 calls batches(120, 200) and sees what this one would have.
sampler = choose_sampler(learnt, "balanced", seed=0)
loader = Loader(learnt, 16, sampler=sampler, crop=rate, workers=2, device=device)
optimizer = None
for step, batch in enumerate(loader.batches(0, 200)):
    loss = nn.functional.cross_entropy(hear(batch.waves), batch.targets)
    optimizer = optimizer or torch.optim.Adam(network.parameters(), 1e-2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 49:
        print(
            f"step {step + 1}: loss {loss.item():.3f}, first clip {learnt.keys_of(batch.rows[:1].numpy())[0]}"
        )

network.eval()
right = 0
with torch.inference_mode():
    for batch in WholeClips(held_out, 32 * rate, workers=2, device=device).batches():
        right += int((hear(batch.waves).argmax(1) == batch.targets.argmax(1)).sum())
print(f"{right} of {len(held_out)} clips held out are right")
