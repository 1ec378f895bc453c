"""Engines: they run functions over units of work, and know nothing of audio."""

from clipmill.run.crew import Crew, Lost
from clipmill.run.local import Local
from clipmill.run.units import Engine, run_rounds, run_units

__all__ = ["Crew", "Engine", "Local", "Lost", "run_rounds", "run_units"]
