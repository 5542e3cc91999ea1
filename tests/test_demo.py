"""What the demo shows of the matrices is true of them."""

import pytest
import torch

from lowrank import LoraConfig, inject
from lowrank.injection.adapters import lora_layers
from lowrank.study.demo import LAYER, Demo
from lowrank.study.matrices import look_at


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return Demo(str(tmp_path_factory.mktemp("demo") / "out"))


def test_before_training_b_is_zero_and_the_base_answers(story):
    base = story.base()
    names, bits = list(base.state_dict()), [value.clone() for value in base.state_dict().values()]
    matrices, summary, same = story.start(base)
    assert matrices.shapes == {"W0": (128, 128), "A": (8, 128), "B": (128, 8), "ΔW": (128, 128)}
    assert (matrices.norms["B"], matrices.norms["ΔW"], matrices.rank, matrices.scale) == (0, 0, 0, 2)
    assert matrices.norms["A"] > 0
    assert same
    assert "16,384 trained" in summary
    assert list(base.state_dict()) == names
    assert all(map(torch.equal, base.state_dict().values(), bits))


@pytest.mark.parametrize("rank", [1, 5])
def test_the_rank_and_the_singular_values_are_those_of_the_change(story, rank):
    model = story.base()
    inject(model, LoraConfig(r=8, lora_alpha=24))
    factors = dict(lora_layers(model))[LAYER].factors("default")
    with torch.no_grad():
        factors.b[:, :rank].normal_()  # the other columns stay zero, so ΔW is of this rank
    change = 3.0 * factors.b.detach() @ factors.a.detach()
    matrices = look_at(model, LAYER)
    assert matrices.rank == rank == torch.linalg.matrix_rank(change)
    torch.testing.assert_close(torch.tensor(matrices.singular[:rank]), torch.linalg.svdvals(change)[:rank])
    assert matrices.norms["ΔW"] == pytest.approx(float(change.norm()), rel=1e-5)
