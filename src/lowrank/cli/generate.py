"""`lowrank generate`."""

from typing import Annotated

from cyclopts import App, Group, Parameter

from lowrank.cli.flags import given
from lowrank.train.config_file import resolve
from lowrank.train.settings import GenerateSettings, HeldSettings

command = App(
    name="generate",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank generate --model nano --prompt "One morning"
  lowrank generate --model nano --adapter demo-out/adapter \\
      --prompt "name[Mia], thing[kite], colour[red], place[garden]"

Examples with your own:
  lowrank generate --model llama/ --adapter runs/e2e --prompt "name[Aromi]" \\
      --temperature 0.7 --seed 1
  lowrank generate --model llama/ --adapter runs/chats --chat \\
      --system "Be brief."
""",
)


@command.default
def generate(
    *,
    model: str | None = None,
    prompt: str | None = None,
    adapter: str | None = None,
    template: str | None = None,
    chat: Annotated[bool, Parameter(negative=())] = False,
    system: str | None = None,
    chat_template: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    machine: Annotated[HeldSettings | None, Parameter(name="*", group=Group("The machine", sort_key=1))] = None,
) -> None:
    """Let a model write, with or without an adapter.

    Parameters
    ----------
    model
        A model: its folder, its name on the Hub (org/name), or "nano", which ships with lowrank
    prompt
        The prompt, put into the template of the adapter if it has one
    adapter
        An adapter: its folder, or its name on the Hub; the bare model where not given
    template
        Another template, as in "Q: {prompt}\\nA:"; the adapter's where not given
    chat
        Talk with the model, turn by turn, in its chat template; a pipe is answered line by line
    system
        What the model is told before the first turn of a chat
    chat_template
        File of a chat template; the one trained with, else the tokenizer's, where not given
    max_new_tokens
        Tokens to write at most, in each turn of a chat (128)
    temperature
        0 takes the likeliest token each time (the default); 1 samples as the model has it
    top_p
        Sample from the likeliest tokens that hold this probability together (1)
    seed
        Start of the sampling; same seed, same text (0)
    """
    single = {
        "model": model,
        "prompt": prompt,
        "adapter": adapter,
        "template": template,
        "chat": chat or None,
        "system": system,
        "chat_template": chat_template,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    settings = resolve(GenerateSettings, given(machine, **single))

    if settings.chat:
        from lowrank.cli.chat import converse

        converse(settings)
        return

    from lowrank.cli.console import stream
    from lowrank.train.generation import generate as write

    with stream() as on_text:
        write(settings, on_text)
