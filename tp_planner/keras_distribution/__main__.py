"""Run a script with ``keras.distribution`` enabled: ``python -m tp_planner.keras_distribution SCRIPT [ARGUMENTS]``."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT  # the exit code that shells expect


def main() -> None:
    """Run the script that the arguments name as Python would, on Keras's torch backend."""
    os.environ["KERAS_BACKEND"] = "torch"
    from tp_planner.keras_distribution.install import enable_keras_distribution

    enable_keras_distribution()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except KeyboardInterrupt:  # of all ranks; that of rank 0 says where it was
        if os.environ.get("RANK", "0") == "0":
            raise
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
