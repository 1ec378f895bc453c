"""Engines: they run functions over units of work, and know nothing of audio."""

from clipmill.run.crew import Crew, Lost
from clipmill.run.local import run_units

__all__ = ["Crew", "Lost", "run_units"]
