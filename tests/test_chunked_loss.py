"""Laws of the loss in chunks: value, gradients and counts are those of the plain form, whatever the head does."""

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import IDS, build
from lowrank import LoraConfig, inject
from lowrank.data.batches import Batch, collate
from lowrank.data.tokens import IGNORED, Example
from lowrank.train.head import find_head
from lowrank.train.loss import Loss
from lowrank.train.losses import NextToken

# heads that differ: plain, tied, with a bias, soft-capped, scaled (divided, multiplied), cast, read
# from a backbone inside of a part
FAMILIES = ["llama", "qwen2", "gpt2", "phi", "gemma2", "gemma3_text", "granite", "cohere", "cohere2", "hyperclovax"]
FAMILIES += ["opt", "gpt_neox", "bloom", "nanochat", "olmo2", "mamba", "mixtral", "qwen3_moe"]
IN_FLOAT32 = ("mamba", "mixtral", "qwen3_moe")  # they cast, or multiply grouped matrices in float32 at most
WITH_TRAINED_HEAD = ["llama", "gemma2", "granite", "cohere"]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.06}  # AVX-512's own bfloat16 sums: 0.042


def model_of(family, dtype=torch.float64, cap=True, **config):
    model = build(family)
    for name, value in {"final_logit_softcapping": 2.0, "logits_scaling": 3.0, "logit_scale": 0.4}.items():
        if cap and getattr(model.config, name, None) is not None:
            setattr(model.config, name, value)
            if hasattr(model, name):
                setattr(model, name, value)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(12)  # logits that a cap bends
    inject(model, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", **config))
    model.to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def batch_of(trained=0.6):
    """Two rows, one padded, some positions of which are trained."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for ids in (IDS[0].tolist(), IDS[1, :5].tolist()):
        on = torch.rand(len(ids), generator=generator) < trained
        labels = [token if told else IGNORED for token, told in zip(ids, on.tolist(), strict=True)]
        rows.append(Example(ids, [IGNORED, *labels[1:]]))
    return collate(rows, 0, torch.device("cpu"), True)


def plain(model, batch):
    """The slow and obvious form: all logits, then the loss of the trained ones."""
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    targets = batch.labels[:, 1:]
    on = targets != IGNORED
    total = nn.functional.cross_entropy(logits[on].double(), targets[on], reduction="sum")
    right = (logits.argmax(-1) == targets) | ~on
    exact = (right.all(1) & on.any(1)).sum()
    return Loss(total, int(on.sum()), {"right": (right & on).sum(), "exact": exact, "rows": on.any(1).sum()})


def measured(model, loss_of, batch):
    """(total, tallies, gradients by name) of a loss divided by its count, as a training does it."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, batch)
    torch.autograd.backward(loss.total / loss.count)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.total.detach().double(), {n: t.tolist() for n, t in loss.tallies.items()}, gradients


def assert_same(model, batch, size, dtype):
    head = find_head(model)
    assert head is not None
    tolerance = TOLERANCE[dtype]
    total, tallies, gradients = measured(model, plain, batch)
    chunked, chunked_tallies, chunked_gradients = measured(model, NextToken(head, size), batch)
    assert (chunked - total).abs() <= tolerance * total.abs()
    assert chunked_tallies == tallies
    assert gradients
    for name, gradient in gradients.items():
        assert (gradient is None) == (chunked_gradients[name] is None), name
        if gradient is not None:
            apart = (chunked_gradients[name].double() - gradient.double()).norm()
            assert apart <= tolerance * gradient.double().norm() + 1e-12, name
    with torch.no_grad():
        for loss_of in (NextToken(head, size), NextToken(None, size)):
            assert (loss_of(model, batch).total - total).abs() <= tolerance * total.abs()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_are_the_plain_loss_in_every_family(family):
    dtype = torch.float32 if family in IN_FLOAT32 else torch.float64
    model = model_of(family, dtype)
    for size in (2, 100):
        assert_same(model, batch_of(), size, dtype)


def test_where_no_head_is_known_the_gradients_are_the_same():
    model, batch = model_of("gemma2"), batch_of()
    _, _, gradients = measured(model, plain, batch)
    _, _, found = measured(model, NextToken(None, 2), batch)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", WITH_TRAINED_HEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_the_plain_loss_in_other_dtypes(family, dtype):
    assert_same(model_of(family, dtype), batch_of(), 3, dtype)


@pytest.mark.parametrize("family", WITH_TRAINED_HEAD)
@pytest.mark.parametrize("how", ["adapted", "saved", "tied and trained"])
def test_a_trained_head_gets_its_gradients(family, how):
    configs = {"adapted": {}, "saved": {"modules_to_save": ["lm_head"]}, "tied and trained": {}}
    model = model_of(family, **configs[how])
    if how == "adapted":
        inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"]), "head")
        model.double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lm_head" in name and parameter.requires_grad:
                    parameter.add_(0.1)
    if how == "tied and trained":
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        head.weight = embedding.weight
        embedding.weight.requires_grad_(True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in name or "embed" in name for name in trained)
    assert_same(model, batch_of(), 2, torch.float64)


@pytest.mark.slow
def test_chunks_are_the_plain_loss_in_every_causal_family_that_transformers_has():
    """Of those that shrink without being told how, and run: 132 of 189 in transformers 5.23."""
    tried, unlike, unknown = 0, [], []
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            model, batch = build(name), batch_of()
            total, _, gradients = measured(model, plain, batch)
        except Exception:
            continue
        tried += 1
        if (head := find_head(model)) is None:
            unknown.append(name)
            continue
        found, _, chunked = measured(model, NextToken(head, 3), batch)
        far = [n for n, g in gradients.items() if g is not None and (chunked[n] - g).norm() > 1e-3 * g.norm() + 1e-7]
        if far or (found - total).abs() > 1e-4 * total.abs():
            unlike.append((name, far))
    assert unlike == []
    assert tried > 100 and len(unknown) < 0.05 * tried, unknown


def test_the_head_alone_can_be_trained():
    model = build("llama").double().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert_same(model, batch_of(), 2, torch.float64)


def test_only_trained_positions_reach_the_head_and_never_more_than_a_chunk():
    model, batch = build("llama"), batch_of()
    head = find_head(model)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _module, inputs, _answer: seen.append(inputs[0].shape[:-1]))
    loss = NextToken(head, 2)(model, batch)
    handle.remove()
    assert seen[0] == (2, 1)  # what the model itself asks for: a position of each row
    assert [shape[1] for shape in seen[1:]] == [2] * (loss.count // 2) + [1] * (loss.count % 2)


def test_chunks_of_a_model_that_is_called_otherwise_are_not_taken():
    model = build("llama")
    other = nn.Module()
    other.forward = model.forward
    assert NextToken(find_head(model))(other, batch_of()).total == NextToken()(model, batch_of()).total


def test_a_head_of_an_unknown_form_is_not_taken():
    model = build("llama")
    assert find_head(model) is not None

    class AddsAgain(type(model)):
        """Its logits depend on all positions of the row."""

        def forward(self, **inputs):
            answer = super().forward(**inputs)
            return type(answer)(logits=answer.logits + answer.logits.mean(1, keepdim=True))

    model.__class__ = AddsAgain
    assert find_head(model) is None
    model = build("llama")
    model.forward = lambda **inputs: None
    assert find_head(model) is None
    assert find_head(nn.Linear(2, 2)) is None


def test_looking_for_the_head_leaves_the_model_as_it_was():
    model = build("llama").train()
    before, hooks = dict(model.__dict__), [len(m._forward_hooks) for m in model.modules()]
    assert find_head(model) is not None
    assert model.training
    assert model.__dict__ == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_gradients_in_chunks_are_handed_out_once():
    model = model_of("llama")
    loss = NextToken(find_head(model), 2)(model, batch_of()).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_a_batch_without_trained_tokens_is_nothing():
    model, batch = build("llama"), batch_of()
    nothing = Batch(batch.inputs, torch.full_like(batch.labels, IGNORED), batch.tokens)
    loss = NextToken(find_head(model), 2)(model, nothing)
    assert (float(loss.total), loss.count) == (0.0, 0)
    assert {name: int(tally) for name, tally in loss.tallies.items()} == {"right": 0, "exact": 0, "rows": 0}


def test_exact_rows_are_counted_over_their_trained_tokens():
    class Says(nn.Module):
        """The likeliest next token is always the one it is told."""

        def forward(self, input_ids, attention_mask, use_cache):
            wanted = torch.tensor([[9, 3, 17, 1], [8, 21, 2, 1]])
            return type("Answer", (), {"logits": nn.functional.one_hot(wanted, 30).float()})

    rows = [Example([5, 9, 3, 17], [IGNORED, 9, IGNORED, 17]), Example([8, 8, 21, 11], [IGNORED, 8, 21, 11])]
    loss = NextToken()(Says(), collate(rows, 0, torch.device("cpu"), True))
    assert {name: int(t) for name, t in loss.tallies.items()} == {"right": 4, "exact": 1, "rows": 2}
