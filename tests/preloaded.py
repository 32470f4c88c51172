"""What every worker begins with: one process imports it, and the workers are forked from that process.

All that is alive then is set aside from Python's collector, for going through it takes longer than most tests.
"""

import gc

import keras

import tests.families  # noqa: F401
import tp_planner.api
import tp_planner.checkpoints.callback
import tp_planner.keras_distribution.install
import tp_planner.verification.in_job  # noqa: F401

keras.utils.clear_session()  # imports torch's compiler
gc.freeze()
