"""Adapters that others saved years ago, with the answers they gave then."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.checkpoint import load_loralib
from lowrank.errors import CheckpointError
from lowrank.injection.adapters import lora_layers

ADAPTERS = Path(__file__).parents[2] / "shared" / "adapters"


def golden(name: str) -> Path:
    """The folder of a stored adapter, or a skip that says why."""
    folder = ADAPTERS / name
    if not folder.exists():
        pytest.skip(f"needs the stored adapter {name} in ../shared/adapters")
    return folder


class Mlp(nn.Module):
    """The base of lora_mlp-0.6.1."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.sm(self.lin1(self.relu(self.lin0(x.float()))))


class EmbConv1D(nn.Module):
    """The base of lora_emb_conv1d-0.6.1."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = nn.Embedding(100, 5)
        self.conv1d = Conv1D(1, 5)
        self.relu = nn.ReLU()
        self.flat = nn.Flatten()
        self.lin0 = nn.Linear(10, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.sm(self.lin0(self.flat(self.relu(self.conv1d(self.emb(x))))))


BASES = {"lora_mlp-0.6.1": Mlp, "lora_emb_conv1d-0.6.1": EmbConv1D}


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_of_peft_0_6_gives_its_stored_answers(name, tmp_path):
    folder = golden(name)
    stored = torch.load(folder / "output.pt", map_location="cpu", weights_only=True)
    x = torch.arange(90).reshape(9, 10)
    torch.manual_seed(0)
    model = BASES[name]().eval()
    plain = model(x)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        lowrank.load_adapter(model, folder)
    lowrank.load_adapter(model, folder, allow_pickle=True)
    torch.testing.assert_close(model(x), stored, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, stored, atol=1e-3)

    lowrank.save_adapter(model, tmp_path / "again")
    torch.manual_seed(0)
    fresh = BASES[name]().eval()
    lowrank.load_adapter(fresh, tmp_path / "again")
    assert torch.equal(fresh(x), model(x))
    torch.testing.assert_close(lowrank.merge_and_unload(fresh)(x), stored, rtol=1e-5, atol=1e-5)


def roberta(labels: int = 3) -> nn.Module:
    """RoBERTa-base's attention and head with little else, so that it is quickly made."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=50, intermediate_size=16, num_labels=labels, max_position_embeddings=40)
    return RobertaForSequenceClassification(config).eval()


def test_the_papers_own_adapter_is_the_dense_change_it_stands_for():
    file = golden("loralib_roberta_base_mnli") / "roberta_base_lora_mnli.bin"
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    ids = torch.arange(3, 33).view(2, 15)

    model = roberta()
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        load_loralib(model, file, alpha=16)
    report = load_loralib(model, file, alpha=16, allow_pickle=True)
    assert len(report.modules) == 24 and set(report.full) == {"classifier.dense", "classifier.out_proj"}
    assert not report.changes_nothing

    dense = roberta()
    state = dense.state_dict()
    for key in [key for key in tensors if key.endswith("lora_A")]:
        path = key.removesuffix(".lora_A")
        state[path + ".weight"] += 16 / 8 * tensors[path + ".lora_B"] @ tensors[path + ".lora_A"]
    for key in [key for key in tensors if key.startswith("classifier")]:
        state[key].copy_(tensors[key])
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids).logits, roberta()(ids).logits, atol=1e-2)


def test_the_papers_adapter_onto_another_head_is_refused_and_changes_nothing():
    file = golden("loralib_roberta_base_mnli") / "roberta_base_lora_mnli.bin"
    model = roberta(labels=2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"classifier.out_proj.weight has shape \[3, 768\], wanted \[2, 768\]"):
        load_loralib(model, file, alpha=16, allow_pickle=True)
    assert not list(lora_layers(model)) and not lowrank.adapter_configs(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_the_papers_adapter_goes_on_to_peft(tmp_path):
    from peft import PeftModel

    model = roberta()
    load_loralib(model, golden("loralib_roberta_base_mnli") / "roberta_base_lora_mnli.bin", 16, allow_pickle=True)
    lowrank.save_adapter(model, tmp_path / "mnli")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(roberta(), tmp_path / "mnli").eval()
    ids = torch.arange(3, 33).view(2, 15)
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
