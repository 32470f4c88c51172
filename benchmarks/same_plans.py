"""Are plans what they were? Plans the zoo and the families on this checkout and on another commit, and compares hashes.

    python benchmarks/same_plans.py --against HEAD~1

Each model is planned with its preset or rules, on 2 and on 4 ranks, with Adam and its own loss. Exits with 1 where a
plan differs, naming it; models that only one of the two knows are left out, with a word.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def hashes() -> dict[str, str]:
    """Return the hash of each plan, by "model at ranks"."""
    import keras

    from tests.families import FAMILIES
    from tests.models import CASES, Case
    from tp_planner.frontend.training_loss import TrainingLoss
    from tp_planner.ir.errors import PlanError
    from tp_planner.ir.layout import Layout, LayoutRule
    from tp_planner.ir.mesh import Mesh
    from tp_planner.planner import make_plan

    def hash_of(case: Case, ranks: int) -> str:
        keras.utils.clear_session()  # numbers automatic names as in a new process
        rules = tuple(LayoutRule(pattern, axes) for pattern, axes in case.rules.items())
        layout = Layout(Mesh((("batch", 1), ("model", ranks))), rules)
        loss = TrainingLoss(case.make_loss())
        try:
            return make_plan(case.build(), layout, optimizer=keras.optimizers.Adam(), loss=loss).hash
        except PlanError as error:  # what is refused is compared, too
            return f"refused: {error}"

    cases = {**CASES, **{name: family.case for name, family in FAMILIES.items()}}
    return {f"{name} at {ranks}": hash_of(case, ranks) for name, case in cases.items() for ranks in (2, 4)}


def hashes_of(checkout: Path) -> dict[str, str]:
    """Return what ``hashes`` gives in a process that imports the package and the models of another checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "KERAS_BACKEND": "torch"}
    command = [sys.executable, str(Path(__file__).resolve()), "--print"]
    done = subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def hashes_at(commit: str) -> dict[str, str]:
    """Return what ``hashes`` gives at a commit, in a worktree that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            return hashes_of(Path(folder))
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="HEAD", help="the commit to compare this checkout with")
    parser.add_argument("--print", action="store_true", help="write the hashes of this checkout as JSON, and end")
    options = parser.parse_args()
    if options.print:
        json.dump(hashes(), sys.stdout)
        return 0
    now, before = hashes_of(ROOT), hashes_at(options.against)
    both = [name for name in now if name in before]
    different = [name for name in both if now[name] != before[name]]
    for name in different:
        print(f"{name}: {before[name]} before, {now[name]} now")
    for name in sorted(set(now) ^ set(before)):
        print(f"{name}: left out, known to one side only")
    print(f"{len(both) - len(different)} of {len(both)} plans are what they were at {options.against}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
