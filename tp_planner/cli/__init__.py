"""The command line: plan a model from a file or a factory, without devices and without its weights.

Keras and torch are imported inside the commands: ``--help`` stays quick, and Keras's backend can still be chosen.
"""

from tp_planner.cli import checkpoint as _checkpoint
from tp_planner.cli import convert as _convert
from tp_planner.cli import diff as _diff
from tp_planner.cli import explain as _explain
from tp_planner.cli import layout as _layout
from tp_planner.cli import lint as _lint
from tp_planner.cli import paths as _paths
from tp_planner.cli import plan as _plan
from tp_planner.cli import run as _run
from tp_planner.cli import selftest as _selftest
from tp_planner.cli import sweep as _sweep
from tp_planner.cli import verify as _verify
from tp_planner.cli.app import app

__all__ = ["app", "main"]

_COMMANDS = (
    _plan,
    _paths,
    _explain,
    _diff,
    _sweep,
    _layout,
    _lint,
    _verify,
    _run,
    _checkpoint,
    _convert,
    _selftest,
)  # importing a command's module adds the command to the application


def main() -> None:
    """Run the command line."""
    app()
