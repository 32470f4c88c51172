"""Run a script with ``keras.distribution`` enabled: ``python -m tp_planner.keras_distribution SCRIPT [ARGUMENTS]``."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the arguments name as Python would, on Keras's torch backend."""
    os.environ["KERAS_BACKEND"] = "torch"
    from tp_planner.keras_distribution.install import enable_keras_distribution

    enable_keras_distribution()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
