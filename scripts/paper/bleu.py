"""BLEU of what a model writes for the meanings of E2E's test set, by sacrebleu."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import DATA

from lowrank.checkpoint import load_adapter
from lowrank.data.faults import Faults
from lowrank.data.readers import read_records
from lowrank.data.recipe import Recipe, read_recipe
from lowrank.data.tokens import prompt_ids
from lowrank.train.settings import MachineSettings
from lowrank.train.task import Loaded, load

BATCH, LONGEST = 64, 110


def bleu(model: str, adapter: Path | None) -> tuple[float, float, int]:
    """(BLEU from 0 to 1, its standard error by bootstrap, meanings): greedy, against all references of a meaning.

    The meanings are those of the whole test set, each once.
    """
    import sacrebleu

    references = meanings()
    recipe = read_recipe(adapter or Path(model))
    assert recipe is not None
    loaded = load(Path(model), recipe.kind, (), MachineSettings())
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    loaded.model.eval()
    written = write(loaded, recipe, list(references))
    most = max(map(len, references.values()))
    columns = [[found[i] if i < len(found) else None for found in references.values()] for i in range(most)]
    scorer = sacrebleu.BLEU()
    found = scorer.corpus_score(written, columns, n_bootstrap=1000)
    return found.score / 100, found._ci / 1.96 / 100, len(references)


def meanings() -> dict[str, list[str]]:
    """{meaning: its references} of the test set, in order."""
    found = defaultdict(list)
    for record in read_records(DATA / "e2e/testset_w_refs.csv", True, Faults(), {}):
        found[record.fields["mr"]].append(record.fields["ref"])
    return dict(found)


@torch.no_grad()
def write(loaded: Loaded, recipe: Recipe, prompts: list[str]) -> list[str]:
    """What the model writes after each prompt, greedily; prompts of one length go together, so nothing is padded."""
    from transformers import GenerationConfig

    model: Any = loaded.model
    how = GenerationConfig(
        max_new_tokens=LONGEST, do_sample=False, eos_token_id=loaded.tokenizer.eos_token_id, pad_token_id=loaded.pad
    )
    by_length = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(ids := prompt_ids(loaded.tokenizer, recipe, prompt))].append((number, ids))
    written = [""] * len(prompts)
    for rows in by_length.values():
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            ids = torch.tensor([row for _, row in part])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
            texts = loaded.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for (number, _), text in zip(part, texts, strict=True):
                written[number] = text.strip()
    return written
