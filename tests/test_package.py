"""The package's names, found when they are asked for."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest

import tp_planner


def test_a_missing_backend_says_what_to_set() -> None:
    """Without KERAS_BACKEND Keras looks for TensorFlow, of which somebody who has torch may never have heard."""
    missing = ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
    with (
        mock.patch.object(importlib, "import_module", side_effect=missing),
        pytest.raises(ModuleNotFoundError) as error,
    ):
        tp_planner.__getattr__("plan")
    assert str(error.value) == (
        "Keras looks for TensorFlow, its default; set KERAS_BACKEND=torch in the environment before Python starts, "
        "or os.environ['KERAS_BACKEND'] = 'torch' before the first import of keras or tp_planner"
    )
