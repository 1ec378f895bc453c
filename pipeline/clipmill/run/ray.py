"""The Ray engine: units on actors of a running Ray cluster, or of one started for the job."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clipmill.errors import ConfigError, RunError
from clipmill.run.backends import streamed
from clipmill.run.crew import Lost

_PATIENCE_S = 10
"""For a running cluster to answer, and to have a core free."""

_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""The head of an HTTP/2 frame of settings, the first that either side sends; gRPC's may come with some, and longer."""

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS

_WHERE = "`ray start --head` says its address as it starts"


@dataclass(frozen=True)
class RayEngine:
    """All free cores of the cluster at `address` ("auto": the one this machine is part of); without one, `jobs`
    processes of this machine.

    Raises:
        ConfigError: Ray is not installed.
    """

    address: str | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ConfigError("--engine ray needs Ray: pip install 'clipmill[ray]'") from error

    def run(
        self, function: Callable[[Any], Any], units: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """See `clipmill.run.Engine`; a unit whose actor died comes as lost.

        Raises:
            ConfigError: no Ray cluster answers at the address, or it has no core free.
            RunError: the actors cannot run what they are sent, or the cluster was lost.
        """
        with self._cluster() as workers:
            # An actor that dies takes along what waits for it: nothing is given in advance.
            yield from streamed(_backend(workers), workers, workers, function, units)

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[int]:
        """Connect to Ray, or start it; gives the number of actors to have."""
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self.address is not None:
            _knock(self.address)
        # Ray's own handler would end this process at once, and loudly.
        main = threading.current_thread() is threading.main_thread()
        on_term = signal.getsignal(signal.SIGTERM) if main else None
        quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
        try:
            if self.address is None:
                ray.init(address="local", num_cpus=self.jobs, include_dashboard=False, **quiet)
            else:
                ray.init(address=self.address, **quiet)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--address {self.address}: no Ray cluster answers there ({_line(error)}); {_WHERE}"
            ) from error
        finally:
            if on_term is not None:
                signal.signal(signal.SIGTERM, on_term)
        try:
            yield self.jobs if self.address is None else _free_cores(self.address)
        finally:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise ConfigError where nobody speaks gRPC, as Ray does: it would try for minutes, and print of it."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # "auto", which says itself what it does not find
        return
    encrypted = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    try:
        with socket.create_connection((host, int(port)), timeout=_PATIENCE_S) as there:
            if not encrypted:
                there.sendall(_HELLO)
                answer = there.recv(len(_SETTINGS), socket.MSG_WAITALL)
                if answer[3:] != _SETTINGS[3:]:
                    raise ConnectionError("what answers there is something else")
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--address {address}: no Ray cluster answers there ({_line(error)}); {_WHERE}"
        ) from error


def _forget(folders: set[str]) -> None:
    sys.path[:] = [place for place in sys.path if place not in folders]


def _free_cores(address: str) -> int:
    """How many cores of the cluster nobody uses now: an actor for a core that is not free would wait for it."""
    import ray

    end = time.monotonic() + _PATIENCE_S
    while (free := int(ray.available_resources().get("CPU", 0))) < 1:
        if time.monotonic() > end:
            raise ConfigError(
                f"--address {address}: the Ray cluster there has no core free after {_PATIENCE_S} s; wait for "
                "what runs there, or add a node with `ray start`"
            )
        time.sleep(0.2)
    return free


def _backend(workers: int) -> Any:
    """joblib's Ray backend, made to stream results, to give work to whoever is idle, and to outlive its actors."""
    import ray
    from ray.exceptions import (
        NodeDiedError,
        ObjectLostError,
        OutOfMemoryError,
        RayActorError,
        RayError,
        WorkerCrashedError,
    )
    from ray.util.joblib.ray_backend import RayBackend
    from ray.util.multiprocessing import Pool

    died = (NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError)

    class Backend(RayBackend):
        supports_return_generator = True

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, workers)  # with one, joblib would do everything in this process

        def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
            self.parallel = parallel
            self._load = [0] * workers
            self._starting: dict[Any, int] = {}  # a call that waits for a new actor -> that actor's number
            # Ray's workers would import from our current folder, though we do not: a `soxr.py` there, for one.
            stray = {os.getcwd()} - {os.path.abspath(place) for place in sys.path}
            self._pool = Pool(
                workers, initializer=_forget, initargs=(stray,), ray_remote_args={"num_cpus": 1}
            )
            return self.effective_n_jobs(n_jobs)

        def submit(self, func: Any, callback: Callable[[Any], None]) -> Any:
            [(_, (_, (place, _)), _)] = func.items
            number = self._choose()
            actor = self._pool._actor_pool[number][0]

            def finished(out: Any) -> None:
                self._load[number] -= 1
                if isinstance(out, died):
                    self._replace(number, actor)
                    out = [(place, Lost("tool-error", "the Ray actor that had it died"))]
                elif isinstance(out, RayError):
                    out = RunError(
                        f"the Ray workers cannot run what they are sent ({_line(out)}): they need the same "
                        "clipmill, Python, ray and joblib as this machine"
                    )
                callback(out)

            self._pool._next_actor_index = lambda: number  # left to itself the pool goes round, and waits
            return super().submit(func, finished)

        def _choose(self) -> int:
            """The actor with the least to do."""
            if self._starting:
                calls = list(self._starting)
                for call in ray.wait(calls, num_returns=len(calls), timeout=0)[0]:
                    del self._starting[call]
            # After a node was lost there may never be a core for a new actor.
            alive = [n for n in range(workers) if n not in self._starting.values()]
            number = min(alive or range(workers), key=self._load.__getitem__)
            self._load[number] += 1
            return number

        def _replace(self, number: int, actor: Any) -> None:
            """Start a new actor, unless that was done already for another unit that the dead one had."""
            pool = self._pool
            if pool is not None and not pool._closed and pool._actor_pool[number][0] is actor:
                pool._actor_pool[number] = pool._new_actor_entry()
                self._starting[pool._actor_pool[number][0].ping.remote()] = number

        def terminate(self) -> None:
            super().terminate()
            # The threads that wait for answers would start Ray anew, if they found it gone.
            end = time.monotonic() + _PATIENCE_S
            while any(self._load) and time.monotonic() < end:
                time.sleep(0.02)

    return Backend()


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
