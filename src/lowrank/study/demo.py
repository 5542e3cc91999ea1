"""The whole story on the shipped decoder: teach it a skill, score it, merge it, prove the merge, take it off again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.checkpoint import load_adapter
from lowrank.checkpoint.outputs import claimed, entries, new_folder
from lowrank.checkpoint.temporaries import delete
from lowrank.data.recipe import Recipe
from lowrank.data.tokens import prompt_ids
from lowrank.injection.apply import inject
from lowrank.merge.memory import merge_and_unload, unload
from lowrank.nano import Row, model_path, rows
from lowrank.stages import stage
from lowrank.study.matrices import Matrices, look_at
from lowrank.train.adapting import lora_config
from lowrank.train.models import load_causal, load_tokenizer, quiet
from lowrank.train.reporting import Reporter
from lowrank.train.run_folder import save_whole
from lowrank.train.settings import TrainSettings
from lowrank.train.state.randomness import seeded
from lowrank.train.trainer import run

TRAIN_ROWS, TEST_ROWS, SHOWN = 6000, 200, 3
SETTINGS = {
    "rank": 8,
    "alpha": 16,
    "steps": 800,
    "batch_size": 8,
    "lr": 5e-3,
    "warmup": 0.07,
    "seed": 0,
    "log_every": 40,
}
RECIPE = Recipe("completion", "{prompt}\n", 0)  # as `lowrank train` makes prompts where nothing else is asked
LAYER = "model.layers.0.self_attn.q_proj"  # the one whose matrices are shown
LONGEST_ANSWER = 32  # tokens; the longest right one has 18


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model answered to every held-out prompt, beside what was wanted."""

    test: tuple[Row, ...]
    given: tuple[str, ...]

    @property
    def right(self) -> int:
        """How many answers are exactly what was wanted."""
        return sum(given == row.completion for given, row in zip(self.given, self.test, strict=True))


@dataclass(frozen=True, slots=True)
class Proof:
    """What was checked of the merged and of the unloaded model.

    largest_difference: of any logit, merged against adapted; same_answers: whether every answer is the same text;
    base_is_back: whether unloading gave every tensor of the base back bit for bit, under its name.
    """

    largest_difference: float
    same_answers: bool
    base_is_back: bool


UNFINISHED = ".unfinished"  # in a demo's folder until the story is told: the next one may have the folder
PARTS = ("data", "adapter", "merged")


@contextmanager
def telling(out: str) -> Iterator["Demo"]:
    """A demo that has the folder `out` to itself: a new one, or what an earlier demo left that was stopped.

    Raises OutputError where there is something else, or nothing can be written.
    """
    with claimed(out, {}, _new_demo) as place:
        for name in PARTS:
            delete(place / name)
        place.mkdir(exist_ok=True)
        (place / UNFINISHED).touch()
        yield Demo(out)
        (place / UNFINISHED).unlink()


def _new_demo(place: Path) -> None:
    if UNFINISHED not in entries(place):
        new_folder(place)


class Demo:
    """One telling of the story into the folder `out`; the steps are called in the order they stand here."""

    def __init__(self, out: str) -> None:
        self.data, self.adapter, self.merged = (Path(out) / name for name in PARTS)
        self.test = tuple(rows("held-out", TEST_ROWS))
        self.tokenizer: Any = load_tokenizer(model_path())

    def write_data(self) -> Path:
        """The two files of rows, as a user would bring them."""
        self.data.mkdir(parents=True)
        for name, examples in (("train", rows("train", TRAIN_ROWS)), ("held-out", self.test)):
            lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in examples]
            (self.data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self.data / "train.jsonl"

    def base(self) -> nn.Module:
        """The shipped decoder."""
        return load_causal(model_path(), torch.float32).eval()

    @property
    def settings(self) -> TrainSettings:
        """LoRA on query and value."""
        return TrainSettings.model_validate(
            {"model": "nano", "data": str(self.data / "train.jsonl"), "out": str(self.adapter), **SETTINGS}
        )

    def start(self, base: nn.Module) -> tuple[Matrices, str, bool]:
        """(the matrices before training, what is trained, whether the answers are the base's, bit for bit)."""
        before = self._logits(base, self.test[0])
        with seeded(self.settings.seed):
            summary = inject(base, lora_config(self.settings, ())).summary()
        matrices = look_at(base, LAYER)
        same = torch.equal(self._logits(base, self.test[0]), before)
        unload(base)
        return matrices, summary, same

    def train(self, reporter: Reporter) -> None:
        """The same call as `lowrank train`."""
        run(self.settings, reporter)

    def adapted(self) -> nn.Module:
        """The decoder with the saved adapter."""
        model = self.base()
        load_adapter(model, self.adapter)
        return model

    def answer(self, model: nn.Module) -> Answers:
        """Greedy answers to all held-out prompts, in one batch padded on the left."""
        prompts = [prompt_ids(self.tokenizer, RECIPE, row.prompt) for row in self.test]
        ids, mask = _left_padded(prompts, self.tokenizer.pad_token_id)
        decoder: Any = model
        stage(f"answering {len(prompts)} prompts")
        with torch.no_grad(), quiet():
            out = decoder.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        given = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return Answers(self.test, tuple(text.strip() for text in given))

    def prove(self, adapted: nn.Module, answers: Answers) -> Proof:
        """Merge, save the merged model, compare it with the adapted one; then unload that one and compare bits."""
        merged = merge_and_unload(self.adapted())
        save_whole(merged, self.tokenizer, self.merged)
        reloaded = load_causal(self.merged, torch.float32).eval()
        difference = max(
            float((self._logits(adapted, row) - self._logits(reloaded, row)).abs().max()) for row in self.test[:20]
        )
        same = self.answer(reloaded).given == answers.given
        base, given_back = self.base().state_dict(), unload(adapted).state_dict()
        bits = list(base) == list(given_back) and all(torch.equal(base[name], given_back[name]) for name in base)
        return Proof(difference, same, bits)

    def _logits(self, model: nn.Module, row: Row) -> Tensor:
        ids = torch.tensor([self.tokenizer.encode(f"{row.prompt}\n{row.completion}")])
        decoder: Any = model
        with torch.no_grad():
            logits: Tensor = decoder(input_ids=ids).logits
        return logits


def _left_padded(encoded: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), (rows, longest): prompts end together, so that all answers start together."""
    longest = max(map(len, encoded))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded])
    return ids, mask


def folder_size(folder: Path, pattern: str = "*.safetensors") -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob(pattern))
