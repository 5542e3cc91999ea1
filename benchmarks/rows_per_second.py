"""Claim: from a file to the first step, lowrank takes no longer than TRL with `datasets`, and next to none again.

100,000 rows of one jsonl file, prompts with completions or chats of two turns, become tokens with their loss mask, and
the shipped decoder takes one step on 4 of them. Imports are not counted; each form runs in a process of its own.

    python benchmarks/rows_per_second.py [--rows 100000] [--kinds completion chat] [--out FILE]

cold  nothing is kept from an earlier run      warm  the second run over the same file
lowrank             `lowrank.train.run`, its tokenizer on all cores
trl, trl_processes  `load_dataset("json")` and SFTTrainer; with dataset_num_proc=None, and as many as there are cores
                    (needs `pip install trl`, left out where it is not there)
Chats are written by one template that marks answers by {% generation %}, and assistant turns are trained in both.
memory_mb is the most that the process had in memory and in no file (RssAnon; of TRL's other processes nothing), with
torch and transformers in it. trained: tokens that count in all rows, counted when the clock has stopped.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import conditions, keep

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + "
    "eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LONGEST, BATCH = 512, 4
WORDS = """the a red small old cat dog bird house river sleeps runs sees finds and then under over slowly
today""".split()  # noqa: SIM905


def write_rows(file: Path, kind: str, count: int) -> None:
    """The same rows each time."""
    chance = random.Random(0)

    def text(most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(most // 3, most)))

    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            row: dict[str, Any] = {"prompt": f"{number} {text(30)}", "completion": " " + text(30)}
            if kind == "chat":
                turns = [("user", f"{number} {text(20)}"), ("assistant", text(20)), ("user", text(20))]
                row = {"messages": [{"role": who, "content": said} for who, said in [*turns, ("assistant", text(20))]]}
            out.write(json.dumps(row) + "\n")


def model_folder(folder: Path) -> Path:
    """The shipped decoder, with a chat template."""
    from lowrank.train.models import find_model

    shutil.copytree(find_model("nano"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


def ours(data: Path, model: Path, _kind: str, place: Path, _processes: int | None) -> tuple[float, int]:
    """(seconds to the end of the first step, tokens that are trained in all rows)."""
    import lowrank.data.tokens
    import lowrank.train.trainer  # noqa: F401  # imported now, since imports are not counted
    from lowrank.train import TrainSettings, run
    from lowrank.train.reporting import Reporter

    os.environ["LOWRANK_CACHE"] = str(place)

    class First(Reporter):
        def started(self, summary: Any, _steps: int) -> None:
            self.trained = int(dict(summary)["tokens"].split()[0].replace(",", ""))

        def stepped(self, _step: int) -> None:
            self.ended = time.perf_counter()

    with tempfile.TemporaryDirectory() as out:
        settings = TrainSettings(
            model=str(model), data=str(data), out=f"{out}/run", steps=1, batch_size=BATCH, max_length=LONGEST,
            template="{prompt}", device="cpu",
        )  # fmt: skip
        first = First()
        began = time.perf_counter()
        run(settings, first)
    return first.ended - began, first.trained


def trl(data: Path, model: Path, kind: str, place: Path, processes: int | None) -> tuple[float, int]:
    """The same by TRL."""
    os.environ["HF_DATASETS_CACHE"] = str(place)
    cold = not place.exists()
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()

    class First(TrainerCallback):
        def on_step_end(self, *_told: Any, **_more: Any) -> None:
            self.ended = time.perf_counter()

    with tempfile.TemporaryDirectory() as out:
        how = SFTConfig(
            output_dir=out, max_steps=1, per_device_train_batch_size=BATCH, max_length=LONGEST, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            dataset_num_proc=processes, assistant_only_loss=kind == "chat", disable_tqdm=True,
        )  # fmt: skip
        first = First()
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(data), split="train")
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model), how, train_dataset=rows, callbacks=[first],
            processing_class=AutoTokenizer.from_pretrained(model),
        )  # fmt: skip
        trainer.train()
    return first.ended - began, sum(map(trained_of, trainer.train_dataset)) if cold else 0


def trained_of(row: dict[str, Any]) -> int:
    """By its labels, or by the masks that they are made from, as the version of TRL has it."""
    masks = [row[name] for name in ("assistant_masks", "completion_mask") if row.get(name) is not None]
    return sum(map(all, zip(*masks, strict=True))) if masks else sum(label != -100 for label in row["labels"])


FORMS: dict[str, tuple[Callable[..., tuple[float, int]], int | None]] = {
    "lowrank": (ours, None),
    "trl": (trl, None),
    "trl_processes": (trl, os.cpu_count()),
}


@contextlib.contextmanager
def watched() -> Iterator[list[float]]:
    """The most anonymous memory of this process, in MB, looked at fifty times a second."""
    most, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            most[0] = max(most[0], next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def measure(form: str, kind: str, data: Path, model: Path, place: Path) -> dict[str, float]:
    """One process. What all import is imported before the clock starts."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    job, processes = FORMS[form]
    with watched() as most:
        seconds, trained = job(data, model, kind, place, processes)
    found = {"seconds": round(seconds, 2), "memory_mb": round(most[0])}
    return found | ({"trained": trained} if trained else {})


def main() -> None:
    """Every form, cold and warm, over both kinds of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", default=["completion", "chat"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        form, kind, *paths = asked.measure
        print(json.dumps(measure(form, kind, *map(Path, paths))))
        return
    report: dict[str, Any] = {"claim": __doc__.split("\n")[0], "rows": asked.rows}
    report["conditions"] = conditions(os.cpu_count() or 1)
    if importlib.util.find_spec("trl"):
        report["trl"] = {name: importlib.metadata.version(name) for name in ("trl", "datasets")}
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(Path(folder) / "model")
        for kind in asked.kinds:
            data = Path(folder) / f"{kind}.jsonl"
            write_rows(data, kind, asked.rows)
            report[kind] = {"file_mb": round(data.stat().st_size / 1e6, 1)}
            for form in FORMS if "trl" in report else ["lowrank"]:
                report[kind][form] = {}
                for turn in ("cold", "warm"):
                    place = Path(folder) / f"{kind}-{form}"
                    command = [sys.executable, __file__, "--measure", form, kind, str(data), str(model), str(place)]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                    found["rows_per_second"] = round(asked.rows / found["seconds"])
                    report[kind][form][turn] = found
                    print(kind, form, turn, found, flush=True)
    keep(report, asked.out)


if __name__ == "__main__":
    main()
