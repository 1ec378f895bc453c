"""Engines: run a pure function over units of work, here or elsewhere. Knows nothing of audio."""

from clipmill.run.local import run_units

__all__ = ["run_units"]
