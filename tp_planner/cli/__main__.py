"""``python -m tp_planner.cli`` is ``tp-planner``."""

from tp_planner.cli import main

main()
