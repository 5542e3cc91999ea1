"""Single rows of a table that are trained: the laws of every adapter, for models in memory."""

import copy

import pytest
import torch
from torch import nn

import lowrank
from checkpoint_models import IDS
from layer_cases import DTYPES, BufferScaledEmbedding, ScaledEmbedding
from lowrank import LoraConfig
from lowrank.core.token_rows import TokenRows
from lowrank.errors import ConfigError, LowrankError, TargetError
from snapshots import assert_same, same_bits, snapshot

V, D = 13, 6
ROWS = (9, 2, 4)
TABLES = {
    "plain": lambda: nn.Embedding(V, D),
    "padded": lambda: nn.Embedding(V, D, padding_idx=2),
    "scaled": lambda: ScaledEmbedding(V, D, embed_scale=2.5, padding_idx=1),
    "scale in a buffer": lambda: BufferScaledEmbedding(V, D, embed_scale=2.5),
}


class Offset(nn.Embedding):
    """A table that counts its rows from 2, as BART's positions do: adapted as it is read."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """E[i + 2]."""
        return nn.functional.embedding(ids.clamp_max(V - 3) + 2, self.weight)


class Words(nn.Module):
    """A table, a layer and a head, which may be one tensor with the table."""

    def __init__(self, table: nn.Embedding, tied: bool) -> None:
        super().__init__()
        self.table, self.layer, self.head = table, nn.Linear(D, D), nn.Linear(D, V, bias=not tied)
        self.config = type("Config", (), {"tie_word_embeddings": tied})()
        if tied:
            self.head.weight = table.weight

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models say it."""
        return self.table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) → (..., V)."""
        return self.head(torch.tanh(self.layer(self.table(ids))))


IDS_HERE = torch.tensor([[9, 2, 2, 0, 12], [4, 1, 9, 5, 3]])


def words(table: str = "plain", tied: bool = False, dtype: str = "float32") -> Words:
    made = Offset(V, D) if table == "offset" else TABLES[table]()
    return Words(made, tied).to(DTYPES[dtype]).eval()


def inject(model: nn.Module, rows=ROWS, name: str = "default", moved: float = 1.0, **options) -> list[TokenRows]:
    """In place: rows (and a low-rank change) that are not the base's. Returns the rows, each once."""
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["layer"], init_lora_weights="random", trainable_token_indices=rows, **options
    )
    lowrank.inject(model, config, name)
    owned = list({id(m): m for m in model.modules() if isinstance(m, TokenRows)}.values())
    with torch.no_grad():
        for one in owned:
            one.values += moved * torch.randn_like(one.values)
    return owned


def with_rows_written(model: Words, owned: TokenRows) -> Words:
    """The slow, obvious way: another model whose table holds the values."""
    plain = lowrank.unload(copy.deepcopy(model))
    with torch.no_grad():
        plain.table.weight[list(owned.indices)] = owned.values.to(plain.table.weight.dtype)
    return plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("table", [*TABLES, "offset"])
def test_rows_answer_as_a_table_that_holds_them(table: str, tied: bool, dtype: str) -> None:
    model = words(table, tied, dtype)
    before, base = snapshot(model), model(IDS_HERE)
    (owned,) = inject(model)
    lowrank.set_active(model, ["default"])
    answer = model(IDS_HERE)
    model.layer.activate(())  # the rows alone
    alone = model(IDS_HERE)
    model.layer.activate(("default",))
    written = with_rows_written(model, owned)
    assert same_bits(model.table(IDS_HERE), written.table(IDS_HERE))
    tolerance = {"float32": 1e-5, "bfloat16": 0.08, "float16": 0.01}[dtype]
    assert torch.allclose(alone, written(IDS_HERE), atol=tolerance, rtol=tolerance)
    assert (alone - base).abs().max() > 3 * tolerance
    with lowrank.disabled(model):
        assert same_bits(model(IDS_HERE), base)
    with lowrank.merged(model):
        merged = model(IDS_HERE)
    assert same_bits(model(IDS_HERE), answer) and torch.allclose(merged, answer, atol=tolerance, rtol=tolerance)
    other = lowrank.merge_and_unload(copy.deepcopy(model))
    assert same_bits(other(IDS_HERE), merged)
    assert type(other.table) is type(words(table).table) and (other.head.weight is other.table.weight) is tied
    lowrank.unload(model)
    assert_same(model, before)
    assert same_bits(model(IDS_HERE), base)


@pytest.mark.parametrize("tied", [False, True])
def test_step_zero_is_the_base_and_only_rows_get_gradients(tied: bool) -> None:
    model = words("padded", tied)
    base = model(IDS_HERE)
    (owned,) = inject(model, moved=0.0)
    model.layer.activate(())
    assert same_bits(model(IDS_HERE), base)
    assert type(model.table.weight) is nn.Parameter and not model.table.weight.requires_grad
    written = with_rows_written(model, owned).requires_grad_(True)
    for one in (model, written):
        one(IDS_HERE).square().sum().backward()
    assert model.table.weight.grad is None and model.head.weight.grad is None
    wanted = written.table.weight.grad[list(ROWS)]
    assert torch.allclose(owned.values.grad, wanted, atol=1e-4, rtol=1e-4)
    if not tied:
        assert not owned.values.grad[ROWS.index(2)].any()  # the padding row


def test_nothing_of_the_tables_size_is_made() -> None:
    """Neither forward nor backward holds another (V, d), and the optimiser has the rows' numbers alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            answer = func(*args, **(kwargs or {}))
            made.extend([answer.shape] if isinstance(answer, torch.Tensor) and "t.default" not in str(func) else [])
            return answer

    model = words(tied=True)
    inject(model)
    with Watch():
        model(IDS_HERE).square().sum().backward()
    assert made and (V, D) not in made
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == len(ROWS) * D + 2 * (D + D)


def test_adapters_with_other_rows_add_up_and_shared_rows_are_refused() -> None:
    model = words(tied=True)
    inject(model, (3, 5), "one")
    inject(model, (9, 2), "two")
    inject(model, (5,), "three")
    with pytest.raises(LowrankError, match="one and three each bring row 5 of table"):
        lowrank.set_active(model, ["one", "three"])
    lowrank.set_active(model, ["one", "two"])
    answer, base = model(IDS_HERE), words()
    one, two = model.table.rows("one"), model.table.rows("two")
    assert torch.equal(model.table(torch.tensor([5, 2])), torch.stack([one.values[1], two.values[1]]))
    lowrank.merge_and_unload(model, ["one", "two"])
    assert lowrank.adapter_configs(model).keys() == {"three"}
    assert torch.allclose(model(IDS_HERE), answer, atol=1e-5)
    lowrank.set_active(model, ["three"])
    assert not torch.allclose(model(IDS_HERE), answer, atol=1e-3)
    lowrank.delete_adapter(model, "three")
    assert type(model.table) is type(base.table) and model.head.weight is model.table.weight


def test_anothers_low_rank_change_is_added_to_the_rows() -> None:
    model = words()
    inject(model)
    lowrank.inject(model, LoraConfig(r=2, target_modules=["table", "head"], init_lora_weights="random"), "low")
    lowrank.set_active(model, ["default", "low"])
    answer = model(IDS_HERE)
    with lowrank.merged(model):
        assert torch.allclose(model(IDS_HERE), answer, atol=1e-5)
    lowrank.merge_and_unload(model)
    assert torch.allclose(model(IDS_HERE), answer, atol=1e-5)


def test_copies_and_moves_keep_the_rows(tmp_path) -> None:
    model = words(tied=True)
    inject(model)
    answer = model(IDS_HERE)
    other = copy.deepcopy(model)
    assert same_bits(other(IDS_HERE), answer)
    assert other.head.rows("default") is other.table.rows("default") is not model.table.rows("default")
    half = copy.deepcopy(model).to(torch.float64)
    assert torch.allclose(half(IDS_HERE).float(), answer, atol=1e-5)
    with lowrank.merged(model):
        folded = copy.deepcopy(model)
    assert torch.allclose(folded(IDS_HERE), answer, atol=1e-5)


def test_new_words_are_trained_and_a_shorter_table_is_refused() -> None:
    from checkpoint_models import llama

    model = llama()
    model.resize_token_embeddings(35)
    lowrank.inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[32, 34, 5]))
    ids = IDS.clone()
    ids[:, 0] = 34
    model(ids).logits.sum().backward()
    assert model.model.embed_tokens.rows("default").values.grad[1].any()
    model.resize_token_embeddings(40)
    with pytest.warns(UserWarning, match="carried over"):
        answer = model(ids).logits
    assert answer.shape[-1] == 40 and model.model.embed_tokens.rows("default").indices == (32, 34, 5)
    model.resize_token_embeddings(33)
    with pytest.raises(LowrankError, match="an adapter owns one above"):
        model(IDS)


@pytest.mark.parametrize(
    "rows, match",
    [
        ("all", "must be token ids"),
        ([1, -2], "must be token ids"),
        ([1, True], "must be token ids"),
        ([1.0], "must be token ids"),
        ({"table": []}, r"trainable_token_indices\['table'\] must be token ids"),
        ([1, 2, 1], "names row 1 twice"),
    ],
)
def test_rows_that_cannot_be_meant(rows, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LoraConfig(trainable_token_indices=rows)


@pytest.mark.parametrize(
    "rows, options, match",
    [
        ([3, 13], {}, r"table has 13 rows, and no row 13: .*resize_token_embeddings\(14\)"),
        ({"tabel": [1]}, {}, r"'tabel' matches no module \(nearest: table"),
        ({"table": [1], "layer": [2]}, {}, "layer is one of target_modules too"),
        ([1], {"modules_to_save": ["table"]}, "table is trained in full by modules_to_save too"),
        ({"norm": [1]}, {}, "a LayerNorm has no rows of tokens"),
        ({"table": [1], "head": [2]}, {"ensure_weight_tying": True}, "head is tied to table and has other rows"),
    ],
)
def test_rows_that_a_model_has_not(rows, options, match: str) -> None:
    model = words(tied=True)
    model.norm = nn.LayerNorm(D)
    before = snapshot(model)
    with pytest.raises(TargetError, match=match):
        inject(model, rows, **options)
    assert_same(model, before)


def test_ties_that_are_none_are_said() -> None:
    model = words(tied=True)
    with pytest.warns(UserWarning, match="head shares its weight with table, which does not follow"):
        inject(model, {"head": [3]})
    with pytest.warns(UserWarning, match="nothing in this model is tied to table"):
        inject(words(), [3], ensure_weight_tying=True)


def test_a_model_that_does_not_say_its_table_is_asked_to_name_it() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "table": nn.Embedding(V, D)})
    with pytest.raises(TargetError, match="name it"):
        inject(model, [1])
    assert inject(model, {"table": [1]})[0].indices == (1,)
