"""Rows whose masks TRL and we both make: scripts/trl_masks.py keeps TRL's, test_trl_masks.py holds ours to them."""

from chat_templates import FAMILIES, MARKED

SHORT = [("user", "a b"), ("assistant", "c d")]
LONG = [("system", "s"), ("user", "a b"), ("assistant", "c"), ("user", "d e"), ("assistant", "f g")]
CHATS = [SHORT, LONG]
STRINGS = [("what is the cat ?", " red"), ("the hat", " is black </s>")]  # in the words of `train_models`

# like the ones of `chat_templates`, which mark nothing
MARKED_HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|header|>' + m.role + '\n\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ (m.content | trim) + '<|eot|>' }}{% endgeneration %}{% else %}"
    "{{ (m.content | trim) + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant\n\n' }}{% endif %}"
)
MARKED_THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COMPLETION = {name: template for name, (template, _, _) in FAMILIES.items()}
ASSISTANT = {"marked": MARKED, "headers": MARKED_HEADERS, "thinking": MARKED_THINKING}


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """As a data file has them."""
    return [{"role": role, "content": text} for role, text in turns]
