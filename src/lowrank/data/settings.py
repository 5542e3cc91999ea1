"""What a user may say of the data: which columns are what, and how rows become tokens."""

import re
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lowrank.data.names import split_names, split_pairs, split_tokens, texts, unescape

DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
Names = Annotated[tuple[str, ...], BeforeValidator(split_names)]
Tokens = Annotated[tuple[str, ...], BeforeValidator(split_tokens)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(split_tokens)]
Texts = Annotated[tuple[str, ...], BeforeValidator(texts)]
Pairs = BeforeValidator(split_pairs)


def _exists(day: str) -> bool:
    try:
        date.fromisoformat(day)
    except ValueError:
        return False
    return True


class Settings(BaseModel):
    """Unknown names are refused, and a settings object never changes once it is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True)


class DataSettings(Settings):
    """Where the rows' fields are, and how they become tokens."""

    kind: Literal["text", "completion", "chat", "classification", "regression", "preference"] | None = Field(
        None, description="What a row is; seen from its fields where not given"
    )
    prompt_column: str | None = Field(None, description='Column of the prompt ("prompt" where not given)')
    completion_column: str | None = Field(None, description='Column of the completion ("completion")')
    text_column: str | None = Field(None, description='Column of the text ("text")')
    text_pair_column: str | None = Field(None, description='Column of the second text of a pair ("text_pair")')
    label_column: str | None = Field(None, description='Column of the label ("label")')
    columns: Annotated[dict[str, str], Pairs] = Field(
        {}, description="Columns of other names by what they are, as in messages=dialogue,tools=functions"
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="A row that cannot be read is an error, or left out"
    )
    header: bool = Field(True, description="The first line of a csv or tsv names its columns; else they are 1, 2, ...")
    template: Annotated[str, BeforeValidator(unescape)] = Field(
        "{prompt}\\n", description="The text a completion follows; \\n is a new line"
    )
    train_on: Literal["assistant", "last", "completion", "all"] | None = Field(
        None, description="What of a chat is trained: every answer (the default), the last, the completion's, or all"
    )
    chat_template: str | None = Field(None, description="File of a chat template; the tokenizer's where not given")
    chat_date: str | None = Field(
        None, description="The day (YYYY-MM-DD) for chat templates that write the date; today where not given"
    )
    too_long: Literal["cut", "drop", "split", "error"] | None = Field(
        None, description="Rows over the longest length: chats lose old turns, prompts their beginning, text is split"
    )
    max_length: int | None = Field(
        None, ge=2, description="Tokens a row is cut to; 512, or what the model holds, where not given"
    )

    cache: bool = Field(True, description="Keep rows and tokens on disk, and use them again where nothing changed")

    @field_validator("columns")
    @classmethod
    def _known_roles(cls, columns: dict[str, str]) -> dict[str, str]:
        from lowrank.data.shapes import FLAGGED, ROLES

        for role in columns:
            if role not in ROLES:
                raise ValueError(f"{role!r} is none of {', '.join(ROLES)}")
            if role in FLAGGED:
                raise ValueError(f"{role!r} has a flag of its own, --{role.replace('_', '-')}-column")
        return columns

    @field_validator("chat_date", mode="before")
    @classmethod
    def _is_a_day(cls, day: object) -> object:
        """YAML reads a day that is not quoted as one."""
        if day is not None and not (DAY.fullmatch(str(day)) and _exists(str(day))):
            raise ValueError("must be a day as in 2026-11-30")
        return day if day is None else str(day)

    @model_validator(mode="after")
    def _has_prompt(self) -> Self:
        if self.template.count("{prompt}") != 1:
            raise ValueError(f"template must hold {{prompt}} once, not as in {self.template!r}")
        return self
