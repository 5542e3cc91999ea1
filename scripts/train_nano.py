"""Make nano, the decoder that ships with lowrank, from nothing: its text, its tokenizer and its weights.

    python scripts/train_nano.py --out src/lowrank/nano/model --overwrite

The corpus is a function of the seed (`lowrank.nano.world`), so nothing is downloaded. The same machine and thread count
give the same bytes; another machine gives a model as good, with other bits. Training documents come from `SEED`, the
ones that the final losses are reported on from `SEED + 1`.

The first `RETELLING_STEPS` steps read only retellings, where nearly every name, thing, colour and place
stands earlier in the document. Copying from context is then learned within 200 steps; in the full mixture from the
start it did not come within 500.
"""

import argparse
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read on import; the order of merges must not depend on threads

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank.nano.world import KINDS, Kind, document, retelling

SEED = 20220425
VOCABULARY = 1024
MAX_POSITIONS = 512
BATCH = 48
PEAK_LR = 3e-3
WARM_UP = 50
RETELLING_STEPS = 300
END, PAD = "<|end|>", "<|pad|>"


def documents(seed: int, kind: Kind = document) -> Iterator[str]:
    """Endless documents of one seed, of all kinds or of one."""
    rng = random.Random(seed)
    while True:
        yield kind(rng)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token, so that any text can be written; the world's words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = documents(SEED)
    tokenizer.train_from_iterator((next(texts) for _ in range(20_000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained decoder, one million weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), each (BATCH, T): a document and the end token to a row, rows of like length together."""
    order = random.Random(SEED)
    while True:
        pool = [[*tokenizer.encode(next(texts)), tokenizer.eos_token_id] for _ in range(16 * BATCH)]
        pool.sort(key=len)
        chunks = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        order.shuffle(chunks)
        for chunk in chunks:
            yield _padded(chunk, tokenizer.pad_token_id), _padded(chunk, -100)  # -100: not in the loss


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to PEAK_LR, then a cosine down to a twentieth of it."""
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: Kind, count: int = 4) -> float:
    """Mean loss in nats a token over `count` batches of documents that training never drew."""
    source = batches(tokenizer, documents(SEED + 1, kind))
    return sum(model(input_ids=ids, labels=labels).loss.item() for ids, labels in islice(source, count)) / count


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """AdamW on the next token; a log line every 50 steps. Padding on the right needs no mask: attention is causal."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    retellings = islice(batches(tokenizer, documents(SEED, retelling)), RETELLING_STEPS)
    source = islice(chain(retellings, batches(tokenizer, documents(SEED))), steps)
    started = time.monotonic()
    for step, (ids, labels) in enumerate(source):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:6.0f} s", flush=True)


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Put the folder in place in one rename; the old one, where there is one, stays whole until the new one is."""
    fresh, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for path in (*fresh.iterdir(), fresh):
        _sync(path)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train nano, the decoder that ships with lowrank.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder where it exists")
    parser.add_argument("--steps", type=int, default=2200, help="optimiser steps of 48 documents")
    parser.add_argument("--threads", type=int, default=1, help="the bits of the result depend on it")
    arguments = parser.parse_args()
    if arguments.out.exists() and not arguments.overwrite:
        parser.error(f"{arguments.out} exists; give --overwrite to replace it, or another --out")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} weights", flush=True)
    train(model, tokenizer, arguments.steps)
    model.eval()
    for kind in KINDS:
        print(f"held-out loss {held_out_loss(model, tokenizer, kind):.4f}  {kind.__name__}", flush=True)
    write(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
