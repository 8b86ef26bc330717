"""What the fork server of the tests imports once; processes that it forks start with it.

`gc.freeze` leaves these half a million objects out of every later collection, which would take 0.2 s each.
"""

import gc
import logging

gc.disable()  # collections would take an eighth of the time of these imports

import open_clip  # noqa: E402, F401
import torch._inductor.compile_fx  # noqa: E402, F401  # as DeepSpeed does in every rank

import compt.chain.run  # noqa: E402, F401
import tests.helpers.recipe  # noqa: E402, F401

logging.disable(logging.DEBUG)  # as in tests/conftest.py
gc.enable()
gc.collect()
gc.freeze()
