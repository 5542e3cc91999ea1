"""`lowrank demo`."""

import time
from typing import TYPE_CHECKING

from cyclopts import App

if TYPE_CHECKING:
    from lowrank.study.demo import Demo

command = App(
    name="demo",
    help_epilogue="""Example:
  lowrank demo --out my-first-adapter""",
)


@command.default
def demo(*, out: str = "demo-out") -> None:
    """The whole story in a minute, offline: teach a small decoder a skill, merge it, prove the merge.

    Parameters
    ----------
    out
        The folder to make: data, adapter and merged model.
    """
    from lowrank.study.demo import telling

    with telling(out) as story:
        _tell(story)


def _tell(story: "Demo") -> None:
    import torch
    from rich.console import Console

    from lowrank.cli.console import RunDisplay
    from lowrank.nano import model_path
    from lowrank.study.demo import SHOWN, Answers, folder_size

    torch.set_num_threads(1)  # a model of this size loses more to handing work over than it gains from a second core
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    base = story.base()
    size = sum(p.numel() for p in base.parameters())

    def heading(text: str) -> None:
        console.print(f"\n[bold]{text}[/bold]")

    def show(answers: Answers) -> None:
        for row, given in list(zip(answers.test, answers.given, strict=True))[:SHOWN]:
            mark = "right" if given == row.completion else "wrong"
            console.print(f"  {row.prompt}\n    → {given or '(nothing)'}  [{mark}]", markup=False)
        share = answers.right / len(answers.test)
        console.print(f"  exact match: {answers.right} of {len(answers.test)} unseen prompts, {share:.1%}")

    heading(f"1. A pretrained model: nano, {size:,} weights, {folder_size(model_path()) / 1e6:.1f} MB")
    console.print("  It has read small stories. It has never seen a record like these, to be told in one sentence:")
    before = story.answer(base)
    show(before)

    heading("2. Teach it with LoRA on query and value: h = W0·x + s·B·A·x, W0 frozen")
    data = story.write_data()
    with RunDisplay() as display:
        settings = story.train(display)

    heading("3. The same prompts again")
    adapted = story.adapted()
    after = story.answer(adapted)
    show(after)
    trained = sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n)
    ours, whole = folder_size(story.adapter), folder_size(model_path())
    console.print(f"  trained: {trained:,} numbers, {trained / size:.2%} of the model")
    console.print(f"  adapter: {ours / 1e3:.0f} kB beside a model of {whole / 1e3:,.0f} kB, 1/{whole / ours:.0f}")

    heading("4. Merge: W = W0 + s·B·A, one plain model")
    proof = story.prove(adapted, after)
    console.print(
        f"  merged model saved, loaded again: all {len(after.test)} answers "
        f"{'are the same' if proof.same_answers else 'are NOT the same'}, "
        f"largest difference of a logit {proof.largest_difference:.1e}"
    )
    console.print(f"  adapter unloaded: the base is {'back, bit for bit' if proof.base_is_back else 'NOT back'}")

    heading(f"Done in {time.perf_counter() - started:.0f} s. The same with your own model and data:")
    flags = (
        f"--rank {settings.rank} --alpha {settings.alpha:g} --steps {settings.steps} --batch-size {settings.batch_size}"
    )
    console.print(
        f"  lowrank train    --model MODEL --data FILE.jsonl --out adapter/   # rows of prompt and completion\n"
        f"  lowrank generate --model MODEL --adapter adapter/ --prompt TEXT\n"
        f"  lowrank inspect  adapter/ --model MODEL\n"
        f"  lowrank merge    --model MODEL --adapter adapter/ --out merged/\n"
        f"What ran here:\n"
        f"  lowrank train --model nano --data {data} --out {story.adapter} {flags} --lr {settings.lr:g} "
        f"--warmup {settings.warmup:g}",
        markup=False,
    )
    if not (proof.same_answers and proof.base_is_back):
        raise SystemExit(1)
