"""The LoRA paper's claims, measured small. Results are kept in docs/paper/results; what is there is not run again.

python scripts/paper            what takes minutes, and the table in docs/paper.md
python scripts/paper --long     the trainings with every seed first
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported anywhere

from common import missing
from trainings import JOBS, SEEDS, train_all


def main() -> None:
    """Run what is asked for, then write the table."""
    parser = argparse.ArgumentParser(prog="python scripts/paper", description=__doc__)
    parser.add_argument("--long", action="store_true", help="every training, with every seed")
    parser.add_argument("--train", choices=list(JOBS), nargs="+", help="only these trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    asked = parser.parse_args()
    if lacks := missing():
        print(f"skipped: needs {lacks}")
        return
    if asked.long or asked.train:
        for result in train_all(tuple(asked.seeds), asked.again, tuple(asked.train or JOBS)):
            print(f"{result['name']}: accuracy {result['accuracy']:.4f} in {result['seconds']} s", flush=True)
    if not asked.train:
        from mechanics import measure_all
        from subspaces import measure_subspaces
        from table import write

        if asked.long:
            measure_subspaces(asked.again)
        measure_all(asked.again)
        write()


if __name__ == "__main__":
    main()
