"""Answers to a user's own prompts, written while a training goes on."""

from collections.abc import Sequence

from lowrank.data.prompts import Prompt
from lowrank.data.recipe import Recipe
from lowrank.errors import DataError, Diverged
from lowrank.train.ends import end_tokens
from lowrank.train.generation import Writer
from lowrank.train.reporting import Sample
from lowrank.train.settings import GenerateSettings
from lowrank.train.state.randomness import seeded
from lowrank.train.task import Loaded


class Samples:
    """Called, it has the model answer every prompt, as `generate` would: the likeliest token each time.

    Nothing of the training changes: random states and training mode are put back. Of several processes each writes all,
    so that one that holds a part of the base alone would find the others in the same forward passes.

    Raises DataError, at once, for prompts that this model cannot be asked.
    """

    def __init__(self, loaded: Loaded, recipe: Recipe, prompts: Sequence[Prompt], most: int) -> None:
        how = GenerateSettings.model_validate({"model": "", "chat": True, "max_new_tokens": most})
        self.writer = Writer(loaded, recipe, how, end_tokens(loaded.model, loaded.tokenizer, recipe))
        self.asked = [(prompt.text, self._ids(prompt)) for prompt in prompts]

    def __call__(self) -> list[Sample]:
        model = self.writer.loaded.model
        was_training = model.training
        model.eval()
        try:
            with seeded(self.writer.settings.seed):
                return [Sample(text, self._answer(ids)) for text, ids in self.asked]
        finally:
            model.train(was_training)

    def _answer(self, ids: Sequence[int]) -> str:
        try:
            return self.writer.write(ids).strip()
        except Diverged as error:  # the training is judged by its evaluation rows, not by these
            return f"({error})"

    def _ids(self, prompt: Prompt) -> list[int]:
        writer = self.writer
        if len(prompt.turns) > 1 and not writer.recipe.chat_template:
            raise DataError(f"{prompt.place}: turns are for a training on chats; give the prompt as a text")
        try:
            ids = writer.ids([turn.fields for turn in prompt.turns])
        except DataError as error:
            raise DataError(f"{prompt.place}: {error}") from None
        if not ids:
            raise DataError(f"{prompt.place}: the prompt is empty, and this model has no token to begin with")
        if len(ids) >= writer.positions:
            raise DataError(
                f"{prompt.place}: the prompt is {len(ids)} tokens long, and this model holds {writer.positions}; "
                "shorten it"
            )
        return ids
