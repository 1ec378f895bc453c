"""The Dask engine: units on the workers of a running Dask cluster, or of one started for the job."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from clipmill.errors import ConfigError, RunError
from clipmill.run.backends import streamed
from clipmill.run.crew import Lost
from clipmill.run.local import safe_path

_ANSWER_S = 5
"""For a scheduler to answer."""

_WORKERS_S = 30
"""For a first worker to come."""

_GIVEN = 1000
"""So many units lie with the scheduler at the least: workers that join later find work."""


@dataclass(frozen=True)
class DaskEngine:
    """All workers of the scheduler at `address`; without one, `jobs` processes of this machine.

    Raises:
        ConfigError: Dask is not installed.
    """

    address: str | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        try:
            import distributed  # noqa: F401
        except ImportError as error:
            raise ConfigError("--engine dask needs Dask: pip install 'clipmill[dask]'") from error

    def run(
        self, function: Callable[[Any], Any], units: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """See `clipmill.run.Engine`; a unit comes as lost when Dask has lost several workers over it.

        Raises:
            ConfigError: no scheduler answers at the address, or it has no workers.
            RunError: the workers cannot run what they are sent, or the scheduler was lost.
        """
        with self._client() as client:
            backend = _backend(client)
            workers = self._workers(backend)
            yield from streamed(backend, workers, max(2 * workers, _GIVEN), function, units)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        from distributed import Client

        # It tells at length of workers that come and go; what matters of that is in our account.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        with contextlib.ExitStack() as stack:
            if self.address is None:
                place = stack.enter_context(_started(self.jobs))
            else:
                place = self.address
                _knock(place)
            try:
                client = Client(place, timeout=_ANSWER_S, set_as_default=False)
            except OSError as error:
                raise _no_scheduler(place, type(error).__name__) from error
            yield stack.enter_context(client)

    def _workers(self, backend: Any) -> int:
        """How many units can be worked on at a time, by now."""
        try:
            return backend.effective_n_jobs(-1)
        except TimeoutError as error:
            raise ConfigError(
                f"--address {self.address}: the Dask scheduler there has no workers after {_WORKERS_S} s; "
                f"start some with `dask worker {self.address}`"
            ) from error


@contextlib.contextmanager
def _started(jobs: int) -> Iterator[Any]:
    """A cluster of this machine."""
    from distributed import LocalCluster

    resource_tracker.ensure_running()  # left to the workers' thread, it would undo the mask there
    with safe_path():
        # Ctrl-C is for us. The workers are started, and started again, by a thread that is started here:
        # it inherits the mask, and so do they.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            # No limit of memory: near one, Dask's workers would pause, and be killed.
            cluster = LocalCluster(
                n_workers=jobs,
                threads_per_worker=1,
                memory_limit=0,
                dashboard_address=None,
                scheduler_kwargs={
                    "dashboard_address": "127.0.0.1:0"
                },  # else 8787, and a warning where it is taken
                silence_logs=logging.CRITICAL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with cluster:
            yield cluster


def _knock(address: str) -> None:
    """Raise ConfigError where no scheduler answers: a client would hang, or leave a mess behind."""
    from distributed import Security, rpc

    async def who() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
            return str((await there.identity())["type"])

    async def in_time() -> str:
        return await asyncio.wait_for(who(), _ANSWER_S)

    try:
        # In a thread of its own: a notebook has a loop in this one.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            found = thread.submit(asyncio.run, in_time()).result()
        why = "" if found == "Scheduler" else f"a {found.lower()} does"
    except (OSError, ValueError, TypeError, asyncio.TimeoutError) as error:
        why = type(error).__name__
    if why:
        raise _no_scheduler(address, why)


def _no_scheduler(address: object, why: str) -> ConfigError:
    return ConfigError(
        f"--address {address}: no Dask scheduler answers there within {_ANSWER_S} s ({why}); "
        "`dask scheduler` says its address as it starts"
    )


def _backend(client: Any) -> Any:
    """joblib's backend, less its habit of waiting for ever on a unit that killed its workers."""
    from distributed.scheduler import KilledWorker
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int) -> int:
            # With one, joblib would do everything in this process.
            return max(2, super().effective_n_jobs(n_jobs))

        def submit(self, func: Any, callback: Callable[[Any], None]) -> Any:
            [(_, (_, (place, _)), _)] = func.items

            def finished(out: Any) -> None:
                gone = isinstance(out, (concurrent.futures.CancelledError, asyncio.CancelledError))
                callback(RunError("the Dask scheduler was lost; run the same command again") if gone else out)

            def failed(error: BaseException | None) -> None:
                """Take what Dask itself failed with, of which joblib would never hear."""
                if isinstance(error, KilledWorker):
                    callback([(place, Lost("tool-error", "each Dask worker that had it died"))])
                elif error is not None:
                    cause = error.__cause__ or error
                    why = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
                    callback(
                        RunError(
                            f"the Dask cluster cannot run what it is sent ({why}): its scheduler and its workers "
                            "need the same clipmill, Python, dask and joblib as this machine"
                        )
                    )

            future = super().submit(func, finished)
            future.add_done_callback(lambda future: failed(future.exception()))
            return future

    return Backend(client=client, wait_for_workers_timeout=_WORKERS_S)
