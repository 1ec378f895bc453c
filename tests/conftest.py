"""What the tests share: real small collections, the command as a user runs it, and where real clips lie."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tests run side by side: two networks with two threads each on two cores would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import soundfile

import warm

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CLIPMILL_SHARED_DATA", REPO.parent / "shared" / "data"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs are deaf to it, and so would be all that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "test_engines",
    "test_ranks",
    "test_faults",
    "test_fetch_audioset",
    "test_slurm_job",
    "test_segments",
    "test_export",
    "test_train",
    "test_segment",
    "test_resume",
    "test_eat",
    "test_loader",
    "test_repair",
    "test_trainer",
    "test_models",
    "test_real_clips",
    "test_shards",
)
"""Files that take twenty seconds and more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, lest one is left to a worker alone; skip what this machine cannot run."""
    import torch

    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
    for item in items:
        if "shared_data" in item.keywords and not (SHARED / "esc10").is_dir():
            item.add_marker(pytest.mark.skip(reason=f"needs the real clips, and {SHARED} is not there"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies and indexes of shards that are far, or others', go to where pytest keeps its files."""
    os.environ["CLIPMILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@dataclass(frozen=True)
class Bucket:
    """A bucket of a real S3 service on this machine, and the folder `set` in it."""

    name: str
    client: Any

    @property
    def url(self) -> str:
        return f"s3://{self.name}/set"

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"set/{key}", Body=body)

    def fill(self, folder: Path) -> str:
        """Copy the files of a folder to `set`; returns its URL."""
        for path in folder.iterdir():
            self.put(path.name, path.read_bytes())
        return self.url


@pytest.fixture(scope="session")
def s3() -> Iterator[tuple[str, Any]]:
    """An S3 service's address, and a client of it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    yield address, boto3.client("s3", endpoint_url=address, **keys)
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def bucket(s3: tuple[str, Any], credentials: None, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, which s3:// leads to by the environment."""
    address, client = s3
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    name = f"bucket-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    return Bucket(name, client)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Whatever the environment says: on tensors this small, and beside other tests, threads cost more than they bring."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """No test leaves this process deaf to Ctrl-C: so would be all that later tests start, and interrupt."""
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def pipeline(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, as a user would but for the imports; output as text."""
    return warm.run("clipmill", *arguments, cwd=cwd, env=env)


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess]:
    return pipeline


@pytest.fixture(scope="session")
def cold() -> Callable[..., subprocess.CompletedProcess]:
    """As `run`, but from nothing, as a user starts it: for what a test of that start is."""

    def call(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "clipmill", *map(str, arguments)]
        settings = {**os.environ, **(env or {})}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env=settings, timeout=280, check=False
        )

    return call


@pytest.fixture
def here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess]:
    """As `run`, but in this process: what takes seconds to import is there already."""

    def call(*arguments: object) -> subprocess.CompletedProcess:
        from clipmill.cli import main

        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
        before = {number: signal.getsignal(number) for number in heard}
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back with the rest
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, ended.value.code, said.out, said.err)

    return call


SHALLOW = "from clipmill_models import erann; erann._stage.__kwdefaults__['blocks'] = 1"
"""One block a stage and not four, in each ERANN made from here on."""


@pytest.fixture(scope="module")
def shallow() -> Iterator[None]:
    """For tests that train or export networks, and ask nothing that four blocks would answer otherwise than one."""
    from clipmill_models import erann

    defaults = erann._stage.__kwdefaults__
    before = dict(defaults)
    exec(SHALLOW)
    yield
    defaults.update(before)


def sound(seconds: float, rate: int, channels: int = 1, seed: int = 0, level: float = 0.3) -> np.ndarray:
    """A chord over noise, float64 `[samples]` or `[samples, channels]`: something that every codec changes a little."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in rng.uniform(100, 0.3 * rate, 4)) / 4
    mono = level * (0.9 * tones + 0.1 * rng.standard_normal(len(time)))
    if channels == 1:
        return mono
    return np.stack([mono * gain for gain in np.linspace(1.0, 0.4, channels)], axis=1)


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 clips in three classes, several formats and rates, two of them beyond saving."""
    root = tmp_path_factory.mktemp("collection")
    kinds = [
        ("wav", 44100, 1, "PCM_16"),
        ("flac", 48000, 2, "PCM_24"),
        ("ogg", 22050, 1, "VORBIS"),
        ("wav", 8000, 6, "FLOAT"),
    ]
    for number in range(24):
        suffix, rate, channels, subtype = kinds[number % len(kinds)]
        path = root / ("bell", "drum", "horn")[number % 3] / f"take {number:02d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if number == 5:
            path.write_bytes(b"RIFF\xff\xff\xff\xffWAVEjunk" + bytes(range(256)) * 8)
        elif number == 11:
            path.write_bytes(b"")
        else:
            soundfile.write(path, sound(0.4 + 0.17 * number, rate, channels, seed=number), rate, subtype)
    return root


@pytest.fixture(scope="session")
def fetched(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the collection fetched as `small`."""
    from clipmill.datasets.folder import Folder
    from clipmill.fetch.job import fetch

    root = tmp_path_factory.mktemp("root")
    fetch("folder", Folder(name="small", from_dir=collection), root)
    return root


@pytest.fixture(scope="session")
def make(fetched: Path) -> Callable[..., dict]:
    """Shard the small collection in this process: `make(out, jobs=1, **options)` returns dataset.json's contents."""
    from dataclasses import fields

    from clipmill.fetch.fetched import load, state_of
    from clipmill.run import Engine, Local
    from clipmill.shards.job import make_shards
    from clipmill.shards.plan import ShardSpec

    def shard(out: Path, jobs: int = 1, engine: Engine | None = None, **options: object) -> dict:
        got = load(fetched, "small")
        names = {field.name for field in fields(ShardSpec)}
        settings = {"clips_per_shard": 5} | {k: v for k, v in options.items() if k in names}
        return make_shards(
            "small", got.manifest, got.losses, got.media_root, out, ShardSpec(**settings),  # type: ignore[arg-type]
            about=got.about, made_from=state_of(fetched, "small"), engine=engine or Local(jobs), **{k: v for k, v in options.items() if k not in names},
        )  # type: ignore[arg-type]  # fmt: skip

    return shard
