"""Engines: ways to train one module on one or several devices."""

from compt.engines.base import COMPUTE_DTYPES, AdamWSettings, Engine, Precision, decays
from compt.engines.ddp import DataParallelEngine

__all__ = ["COMPUTE_DTYPES", "AdamWSettings", "DataParallelEngine", "Engine", "Precision", "decays"]
