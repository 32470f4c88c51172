"""Run Keras's own tests of ``keras.distribution`` on the torch backend, against tp_planner's library.

Keras skips most of them on other backends than JAX, because only JAX has a library: they are told that this is it.
What needs TensorFlow is skipped where that is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "torch"

import keras
import pytest

import tp_planner

MODULE = "keras.src.distribution.distribution_lib_test"
FOUR_PROCESSES = {"WORLD_SIZE": "4", "RANK": "0"}  # for the one test that needs four devices


class NoTensorFlow(types.ModuleType):
    """Stands for TensorFlow where it is not installed: the test that uses it is skipped."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip("TensorFlow is not installed")


def main() -> int:
    """Return pytest's exit code; 0 where the installed Keras comes without its tests."""
    if importlib.util.find_spec(MODULE) is None:
        print(f"skipped: Keras {keras.__version__} is installed without {MODULE}")
        return 0
    tp_planner.enable_keras_distribution()
    import_the_tests()
    with mock.patch.dict(os.environ, FOUR_PROCESSES):
        sharing = run("-k", "DataShardingIntegrationTest")
    return run("-k", "not DataShardingIntegrationTest") or sharing


def run(*options: str) -> int:
    """Run tests of Keras's module without the settings of this repository; return pytest's exit code."""
    alone = ["-c", os.devnull, "--rootdir", os.path.dirname(keras.__file__), "--noconftest", "-p", "no:cacheprovider"]
    return int(pytest.main([*alone, "-q", "-rs", *options, "--pyargs", MODULE]))


def import_the_tests() -> None:
    """Import Keras's module, in which its skips are decided; pytest takes it from there."""
    if absent := importlib.util.find_spec("tensorflow") is None:
        sys.modules["tensorflow"] = NoTensorFlow("tensorflow")
    try:
        with mock.patch("keras.src.backend.backend", return_value="jax"):
            importlib.import_module(MODULE)
    finally:
        if absent:
            del sys.modules["tensorflow"]


if __name__ == "__main__":
    sys.exit(main())
