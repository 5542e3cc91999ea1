"""`lowrank demo`."""

import time
from typing import TYPE_CHECKING

from cyclopts import App

if TYPE_CHECKING:
    from torch import nn

    from lowrank.study.demo import Answers, Demo
    from lowrank.study.matrices import Matrices
    from lowrank.train.settings import TrainSettings

command = App(
    name="demo",
    help_epilogue="""Example:
  lowrank demo --out demo-out""",
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

    from lowrank.cli.console import RunDisplay
    from lowrank.nano import model_path
    from lowrank.study.demo import LAYER, folder_size
    from lowrank.study.matrices import look_at

    torch.set_num_threads(1)  # a model of this size loses more to handing work over than it gains from a second core
    started = time.perf_counter()
    base = story.base()
    size = sum(p.numel() for p in base.parameters())

    _heading(f"1. A pretrained model: nano, {size:,} weights, {folder_size(model_path()) / 1e6:.1f} MB")
    _say("It has read small stories. It has never seen a record like these, to be told in one sentence:")
    _show_answers(story.answer(base))

    _heading("2. LoRA: two thin matrices beside query and value of every layer, h = W0·x + s·B·A·x")
    _show_start(*story.start(base))

    _heading("3. Train A and B")
    data = story.write_data()
    with RunDisplay() as display:
        story.train(display)

    _heading("4. What was learned")
    adapted = story.adapted()
    _show_change(look_at(adapted, LAYER))
    _show_sizes(adapted, size, folder_size(story.adapter), folder_size(model_path()))

    _heading("5. The same prompts again")
    after = story.answer(adapted)
    _show_answers(after)

    _heading("6. Merge: W = W0 + s·B·A, one plain model")
    proven = _show_proof(story, adapted, after)

    _heading(f"Done in {time.perf_counter() - started:.0f} s. The same with your own model and data:")
    _show_commands(story.settings, str(data))
    if not proven:
        raise SystemExit(1)


def _heading(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(f"\n[bold]{text}[/bold]")


def _say(text: str) -> None:
    from lowrank.cli.pulse import spoke
    from lowrank.cli.say import say

    say(f"  {text}")
    spoke()


def _show_answers(answers: "Answers") -> None:
    from lowrank.study.demo import SHOWN

    for row, given in list(zip(answers.test, answers.given, strict=True))[:SHOWN]:
        mark = "right" if given == row.completion else "wrong"
        _say(f"{row.prompt}\n    → {' '.join(given.split()) or '(nothing)'}  [{mark}]")
    share = answers.right / len(answers.test)
    _say(f"exact match: {answers.right} of {len(answers.test)} unseen prompts, {share:.1%}")


def _show_start(matrices: "Matrices", summary: str, same: bool) -> None:
    _say(f"in {matrices.path}:")
    for name, what in (("W0", "frozen"), ("A", "random"), ("B", "zero")):
        d, k = matrices.shapes[name]
        norm = matrices.norms[name]
        _say(f"  {name:<3}{d:>5} × {k:<4} {d * k:>7,} numbers, {what:<7} ‖{name}‖ = {norm:.4g}")
    (d, r), (_, k) = matrices.shapes["B"], matrices.shapes["A"]
    _say(f"  {r}·({d} + {k}) = {r * (d + k):,} numbers stand for the {d * k:,} of ΔW = s·B·A, s = {matrices.scale:g}")
    _say(f"in all {summary}")
    answers = "are the base's, bit for bit" if same else "are NOT the base's"
    _say(f"B = 0, so ΔW = 0: before training the model's answers {answers}")


def _show_change(matrices: "Matrices") -> None:
    d, k = matrices.shapes["ΔW"]
    share = matrices.norms["ΔW"] / matrices.norms["W0"]
    shown = " ".join(f"{value:.2g}" for value in matrices.singular[: matrices.rank])
    _say(f"in {matrices.path}:")
    _say(f"  B is no longer zero: ‖B‖ = {matrices.norms['B']:.4g}; ‖A‖ = {matrices.norms['A']:.4g}")
    _say(f"  ΔW = s·B·A: {d} × {k}, ‖ΔW‖ = {share:.0%} of ‖W0‖")
    _say(f"  its {len(matrices.singular)} singular values: {shown}, then zeros: rank {matrices.rank}")


def _show_sizes(adapted: "nn.Module", size: int, ours: int, whole: int) -> None:
    trained = sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n)
    _say(f"trained: {trained:,} numbers, {trained / size:.2%} of the model")
    _say(f"adapter: {ours / 1e3:.0f} kB beside a model of {whole / 1e3:,.0f} kB, 1/{whole / ours:.0f}")


def _show_proof(story: "Demo", adapted: "nn.Module", after: "Answers") -> bool:
    proof = story.prove(adapted, after)
    _say(
        f"merged model saved, loaded again: all {len(after.test)} answers "
        f"{'are the same' if proof.same_answers else 'are NOT the same'}, "
        f"largest difference of a logit {proof.largest_difference:.1e}"
    )
    _say(f"adapter unloaded: the base is {'back, bit for bit' if proof.base_is_back else 'NOT back'}")
    return proof.same_answers and proof.base_is_back


def _show_commands(settings: "TrainSettings", data: str) -> None:
    from lowrank.cli.say import say

    _say("lowrank train    --model MODEL --data FILE.jsonl --out adapter   # rows of prompt and completion")
    _say("lowrank generate --model MODEL --adapter adapter --prompt TEXT")
    _say("lowrank inspect  adapter --model MODEL")
    _say("lowrank merge    --model MODEL --adapter adapter --out merged")
    say("What ran here:")
    _say(
        f"lowrank train --model nano --data {data} --out {settings.out} --rank {settings.rank} "
        f"--alpha {settings.alpha:g} --steps {settings.steps} --batch-size {settings.batch_size} "
        f"--lr {settings.lr:g} --warmup {settings.warmup:g}"
    )
