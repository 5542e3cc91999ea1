"""The LoRA paper's claims, measured small. Results are kept in docs/paper/results; what is there is not run again.

python scripts/paper            what takes minutes, and the table in docs/paper.md
python scripts/paper --long     the trainings with every seed first
python scripts/paper --long --task cola    only those of one task, and no table
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported anywhere

from common import missing
from tasks import tasks
from trainings import SEEDS, train_all


def main() -> None:
    """Run what is asked for, then write the table."""
    parser = argparse.ArgumentParser(prog="python scripts/paper", description=__doc__)
    parser.add_argument("--long", action="store_true", help="every training, with every seed")
    parser.add_argument("--task", choices=("sst2", "cola", "e2e"), help="only the trainings of this task")
    parser.add_argument("--jobs", nargs="+", default=[], help="only these trainings of the task")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--ranks", action="store_true", help="what following `lowrank rank` gave")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    asked = parser.parse_args()
    if lacks := missing():
        print(f"skipped: needs {lacks}")
        return
    if asked.long:
        for task in [asked.task] if asked.task else tasks():
            for result in train_all(task, tuple(asked.seeds), asked.again, tuple(asked.jobs)):
                print(
                    f"{result['name']}: {result['metric']} {result['score']:.4f} in {result['seconds']} s", flush=True
                )
    if asked.ranks or (asked.long and not asked.task):
        from rank_choice import measure_ranks

        for result in measure_ranks(asked.again):
            print(result["name"], flush=True)
    if not asked.task:
        from mechanics import measure_all
        from subspaces import measure_subspaces
        from table import write

        if asked.long:
            measure_subspaces(asked.again)
        measure_all(asked.again)
        write()


if __name__ == "__main__":
    main()
