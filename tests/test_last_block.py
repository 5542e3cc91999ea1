"""The last feed-forward part at trained positions alone: same loss and gradients, less work; else it stays whole."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lowrank.train.head import find_head
from lowrank.train.losses import NextToken
from lowrank.train.models import checkpoint_activations
from test_chunked_loss import batch_of, measured, model_of

FAMILIES = {
    "llama": "layers.1.mlp",
    "gpt2": "h.1.mlp",
    "gemma2": "layers.1.mlp",
    "cohere": "layers.1.mlp",
    "qwen3_moe": "layers.1.mlp",
    "mamba": "",
}


def rows_seen(model, part, batch, head):
    """How many positions each matrix inside of the part was called with."""
    seen = []
    handles = [
        m.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[:-1].numel()))
        for m in part.modules()
        if isinstance(m, nn.Linear)
    ]
    NextToken(head)(model, batch)
    for handle in handles:
        handle.remove()
    return set(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_in_no_loss_and_no_gradient(family):
    model = model_of(family, torch.float32 if family in ("mamba", "qwen3_moe") else torch.float64)
    head, batch = find_head(model), batch_of()
    assert head.last == FAMILIES[family]
    total, tallies, gradients = measured(model, NextToken(head, 5), batch)
    wanted = measured(model, NextToken(replace(head, last=""), 5), batch)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if total.dtype is torch.float32 or family == "qwen3_moe" else {}
    torch.testing.assert_close(total, wanted[0], **tolerance)
    assert tallies == wanted[1]
    for name, gradient in wanted[2].items():
        torch.testing.assert_close(gradients[name], gradient, msg=name, **tolerance)


def test_the_part_sees_the_trained_positions_and_where_nearly_all_are_trained_all_of_them():
    model = model_of("llama")
    head, some, every = find_head(model), batch_of(), batch_of(2.0)
    part = model.model.layers[1].mlp
    trained = int((some.labels[:, 1:] != -100).sum())
    assert rows_seen(model, part, some, head) == {trained} != {some.labels.numel()}
    read = torch.ones_like(every.labels, dtype=torch.bool)
    seen = []
    part.gate_proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[:2]))
    head.hidden(every.inputs, read)
    assert seen == [read.shape]
    assert rows_seen(model, model.model.layers[0].mlp, some, head) == {some.labels.numel()}
    assert not part._forward_pre_hooks and not part._forward_hooks


class Mixing(nn.Module):
    """A feed-forward part whose answer takes a little of the position before, far below the residual stream."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 1e-6 * (self.inner(x) + self.inner(x).roll(1, 1))


class Late(nn.Module):
    """A last norm that reads the positions before."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.cumsum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_that_mixes_positions_and_one_that_is_read_by_others_are_computed_whole(dtype):
    model = model_of("llama", dtype)
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    assert find_head(model).last == ""
    model = model_of("llama", dtype)
    model.model.norm = Late(model.model.norm)
    assert find_head(model).last == ""


def test_a_block_that_is_computed_again_is_computed_whole():
    model = model_of("llama").train()
    assert find_head(model).last
    checkpoint_activations(model)
    head, batch = find_head(model), batch_of()
    assert head.last == ""
    _, _, gradients = measured(model, NextToken(head), batch)
    assert all(gradient is not None for gradient in gradients.values())
