"""A weight that is read, not called: every reader in a forward sees W0 + ΔW, everybody else the very parameter."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank
from layer_cases import ScaledEmbedding
from lowrank import LoraConfig
from lowrank.errors import LowrankError, LowrankWarning

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:The PyTorch API of nested tensors")
X = torch.linspace(-2, 3, 2 * 5 * 8).view(2, 5, 8).sin()
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class ByHand(nn.Module):
    """Calls one layer and multiplies by the weight of another, as Mamba does with `dt_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.read = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight.transpose(0, 1) + self.read.bias


class Both(ByHand):
    """Calls a layer whose weight it also reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.read(x))


class Convolved(nn.Module):
    """Reads the kernel of a depthwise convolution, as state-space models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 5, 3, groups=5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.conv.weight, self.conv.bias, padding=2, groups=5) + self.conv(F.pad(x, (2, 2)))


class Positions(nn.Embedding):
    """A table whose forward is its own, as BART's: row i + 2 for position i of whatever is given."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        return super().forward(torch.arange(past, past + ids.shape[1]) + 2)


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = Positions(13, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.position(ids, past=3) + self.position(ids)


class Standardised(nn.Conv2d):
    """A convolution whose forward is its own: it pads, and standardises its kernel, as BiT's do."""

    def forward(self, x: Tensor, *, pad: int) -> Tensor:
        kernel = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, (pad, pad)), kernel, self.bias)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None].expand(-1, 2, -1, -1), pad=2)


class Past(nn.Linear):
    """A layer with a second way in, past its forward, as ProphetNet's positions have."""

    def again(self, x: Tensor) -> Tensor:
        return super().forward(x)


class PastForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Past(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.again(self.layer(x))


class Table(nn.Module):
    """Looks rows up in a table, and scores by the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ScaledEmbedding(13, 8, embed_scale=2.5)
        self.layer = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.layer(self.table(ids)).to(self.table.weight.dtype), self.table.weight)


class Checkpointed(ByHand):
    """The reading is computed again in the backward pass."""

    reentrant = False

    def score(self, h: Tensor) -> Tensor:
        return F.linear(h, self.read.weight)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.score, self.called(x), use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class _Product(torch.autograd.Function):
    """What an extension's function is: it takes tensors past torch's overrides."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.flatten(0, 1).t() @ x.flatten(0, 1)


class Extension(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(self.called(x), self.read.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Encoder(nn.Module):
    """torch's own encoder, whose fast path in eval() reads every weight."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class PaddedEncoder(Encoder):
    """The fast path of whose layers runs on nested tensors."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
        return self.encoder(x, src_key_padding_mask=mask)[:, :3]


MODELS = {
    "by hand": (ByHand, ["called", "read"], X),
    "read and called": (Both, ["read"], X),
    "convolution": (Convolved, ["conv"], X),
    "standardised": (Images, ["conv"], X),
    "past its forward": (PastForward, ["layer"], X),
    "positions": (Positioned, ["position"], IDS),
    "table": (Table, ["table", "layer"], IDS),
    "checkpointed": (Checkpointed, ["called", "read"], X),
    "checkpointed, reentrant": (CheckpointedReentrant, ["called", "read"], X),
    "extension": (Extension, ["read"], X),
    "attention": (Attention, ["out_proj"], X),
    "encoder": (Encoder, ["linear1", "linear2", "out_proj"], X),
    "encoder, one of two": (Encoder, ["linear1"], X),
    "encoder, padded": (PaddedEncoder, "all-linear", X),
}
NO_DORA = {"convolution", "table", "positions", "standardised"}


def adapted(name: str, **settings: object) -> tuple[nn.Module, Tensor]:
    make, targets, x = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    options = {"r": 3, "lora_alpha": 5, "target_modules": targets, "init_lora_weights": "random", **settings}
    lowrank.inject(model, LoraConfig(**options))
    return model, x


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_adapted_answers_as_merged_and_every_factor_is_trained(name: str, training: bool, dora: bool) -> None:
    if dora and name in NO_DORA:
        pytest.skip("DoRA is for linear layers")
    model, x = adapted(name, use_dora=dora)
    model.train(training)
    with_grad = model(x).detach()
    with torch.no_grad():
        without = model(x)
        with lowrank.disabled(model):
            base = model(x)
        with lowrank.merged(model):
            merged = model(x)
    assert (merged - base).abs().max() > 0.1
    torch.testing.assert_close(with_grad, merged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without, merged, rtol=1e-5, atol=1e-5)
    assert all(g is not None and g.any() for g in gradients(model, x).values())
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(model(x).detach(), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if "checkpointed" not in name])
def test_gradients_are_those_of_the_formula(name: str) -> None:
    """By a model whose weights are W0 + s·B·A as torch.func puts them in place."""
    model, x = adapted(name)
    got = gradients(model, x)
    plain = lowrank.unload(copy.deepcopy(model))
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    weights = {}
    for path, layer in lowrank.injection.adapters.lora_layers(model):
        a, b = (leaves[f"{path}.lora_default.{f}"] for f in "ab")
        change = 5 / 3 * (b @ a)
        weights[f"{path}.weight"] = layer.base_weight + (change.t() if layer.transposed else change).view_as(
            layer.base_weight
        )
    torch.func.functional_call(plain, weights, (x,)).square().sum().backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(got[key], leaf.grad, rtol=1e-4, atol=1e-4, msg=key)


def test_outside_of_a_forward_the_weight_is_the_parameter() -> None:
    model, _ = adapted("by hand")
    weight = model.read.weight
    assert type(weight) is nn.Parameter and weight is dict(model.named_parameters())["read.weight"]
    assert weight is model.read.base_weight and weight.data_ptr() == model.state_dict()["read.weight"].data_ptr()
    model.called.weight = model.read.weight = nn.Parameter(torch.ones(8, 8))  # tied, and assigned
    assert model.called.weight is model.read.weight and len(list(model.called.parameters(recurse=False))) == 2
    assert type(model.read.weight) is nn.Parameter
    del model.read.weight
    assert not hasattr(model.read, "weight")


def test_a_layer_reads_its_own_weight_as_w0_and_its_hooks_do() -> None:
    model, x = adapted("read and called")
    seen: list[Tensor] = []
    model.read.register_forward_hook(lambda module, args, output: seen.append(module.weight))
    model(x)
    assert seen[0] is model.read.base_weight


def test_looking_at_a_weight_does_not_form_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted("by hand")
    wanted: list[object] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            w = model.read.weight
            wanted.extend([w.dtype, w.shape, w.device, w.size(0), w.dim(), w.is_floating_point(), w.requires_grad])
            return model.called(x.to(w.dtype))

    monkeypatch.setattr(type(model.read), "adapted_weight", None)
    Looks()(x)
    assert wanted == [torch.float32, torch.Size([7, 8]), torch.device("cpu"), 7, 2, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_is_rounded_once_to_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    model, x = adapted("by hand")
    model.to(dtype)
    with torch.no_grad():
        got = model.read.adapted_weight()
        with lowrank.merged(model):
            assert torch.equal(got, model.read.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.read.adapted_weight(), got)
    assert model(x.to(dtype)).dtype is dtype


def test_several_adapters_add_and_switching_is_seen() -> None:
    model, x = adapted("by hand")
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=7, target_modules=["read"], init_lora_weights="random"), "b")
    lowrank.inject(model, LoraConfig(r=2, target_modules=["read"], use_dora=True, init_lora_weights="random"), "c")
    with torch.no_grad():
        model.read.factors("c").magnitude *= 1.7
        for names in (["b"], ["default", "b"], ["default", "b", "c"], ["c"], []):
            lowrank.set_active(model, names)
            got = model(x)
            with lowrank.merged(model):
                torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_factors_leave_the_base_as_it_is(init: str) -> None:
    make, targets, x = MODELS["by hand"]
    model = make().eval()
    base = model(x)
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=init))
    assert torch.equal(model(x), base)


def test_dropout_on_a_weight_that_is_read_is_said_once_and_in_training_only() -> None:
    model, x = adapted("by hand", lora_dropout=0.5)
    model(x)
    model.train()
    with pytest.warns(
        LowrankWarning, match=r"lora_dropout is not applied to .*shape \[7, 8\].*computes with its weight"
    ) as seen:
        model(x)
        model(x)
    assert len(seen) == 1
    lowrank.unload(model)
    assert "said_dropout" not in model.read.__dict__


def test_a_forward_that_writes_to_the_weight_is_an_error() -> None:
    class Writes(ByHand):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.read.weight.clamp_(-1, 1)
            return super().forward(x)

    model = Writes()
    model(X)
    lowrank.inject(model, LoraConfig(r=2, target_modules=["read"]))
    with pytest.raises(
        LowrankError, match=r"clamp_: the forward of a model writes to the weight of an adapted LoraLin"
    ):
        model(X)


def test_copies_and_pickles_read_their_own_factors() -> None:
    model, x = adapted("encoder")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            for _, layer in lowrank.injection.adapters.lora_layers(twin):
                layer.factors("default").b.zero_()
        assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("name", ["by hand", "read and called", "convolution", "table", "positions", "encoder"])
def test_compiled_is_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model, x = adapted(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name != "encoder")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_torch_func_differentiates_through_it() -> None:
    model, x = adapted("by hand")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_another_thread_is_not_taken_for_the_layer_that_runs() -> None:
    """While one thread is inside of the layer's own forward, another reads W0 + ΔW."""
    model, x = adapted("read and called")
    wanted, inside, done, answers = model(x), threading.Event(), threading.Event(), []

    class Slow(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert done.wait(10)
            return F.linear(input, self.weight, self.bias)

    lowrank.unload(model)
    model.read.__class__ = Slow
    torch.manual_seed(0)
    model, x = copy.deepcopy(model), x
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["read"], init_lora_weights="random"))
    wanted = model(x)
    thread = threading.Thread(target=lambda: answers.append(model(x)))
    thread.start()
    assert inside.wait(10)
    here = model(x)
    done.set()
    thread.join()
    assert torch.equal(here, wanted) and torch.equal(answers[0], wanted)
