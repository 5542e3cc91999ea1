"""Chat templates of our own making that show the traits of real families, and a tokenizer that cuts into bytes.

Each is (template, end of an answer). What differs: who opens a turn, what is trimmed, which history is rewritten.
"""

from typing import Any

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|header|>",
    "<|eot|>",
    "<turn>",
    "</turn>",
    "[INST]",
    "[/INST]",
]
SPECIAL += ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]

# a header for every role, trimmed content (Llama 3's traits)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|header|>' + m.role + '\n\n' + (m.content | trim) + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant\n\n' }}{% endif %}"
)
# thoughts of turns before the last question are dropped, the last answer always gets some (Qwen 3's traits)
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# another name for the assistant, the system prompt goes into the first question, turns must alternate (Gemma's traits)
ALTERNATING = (
    "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if first else messages %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + (first if loop.first else '') }}"
    "{{ (m.content | trim) + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# nothing opens an answer, the system prompt stands in the last question (Mistral's traits): history is rewritten
INSTRUCTED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# channels that the model writes itself, thoughts in the last answer alone, which ends in another token (gpt-oss's
# traits): history is rewritten
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# the prompt opens a thought that answers are written without (the traits of R1's distils)
OPENED = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m.role + ':' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant:<think>\n' }}{% endif %}"
)
# the answer is marked by the template itself
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FAMILIES = {
    "headers": (HEADERS, "", "<|eot|>"),
    "thinking": (THINKING, "", "<|im_end|>"),
    "alternating": (ALTERNATING, "", "</turn>"),
    "instructed": (INSTRUCTED, "", "</s>"),
    "channels": (CHANNELS, "<|channel|>final<|message|>", "<|return|>"),
    "opened": (OPENED, "", "</s>"),
    "marked": (MARKED, "", "<|im_end|>"),
}  # {name: (template, what an answer begins with, what it ends with)}
TRIMMED = ("headers", "alternating")


def byte_tokenizer(template: str | None = None, special: list[str] = SPECIAL) -> Any:
    """Every byte is a token, and so is every special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": special[2:]} if special else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = template
    return tokenizer
