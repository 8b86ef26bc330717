"""What the fork server of the tests imports once; processes that it forks start with it.

`gc.freeze` leaves these half a million objects out of every later collection, which would take 0.2 s each.
"""

import gc

import open_clip  # noqa: F401
import torch  # noqa: F401

import compt.chain.run  # noqa: F401
import tests.helpers.recipe  # noqa: F401

gc.collect()
gc.freeze()
