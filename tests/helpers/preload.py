"""What the fork server of the tests imports once; processes that it forks start with it.

`gc.freeze` leaves these objects, half a million, out of every later collection, of which each would take 0.2 s.
"""

import gc

import open_clip  # noqa: F401
import torch  # noqa: F401

import compt.chain.run  # noqa: F401
import tests.helpers.recipe  # noqa: F401

gc.collect()
gc.freeze()
