"""`merged`, `disabled`, switching and copies inside of each other, and other threads that run the model meanwhile."""

import copy
import io
import pickle
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank
from layer_cases import Chain, chain
from lowrank import LoraConfig
from lowrank.errors import LowrankError
from lowrank.injection.state import require_state
from snapshots import assert_same, same_bits, snapshot


def _disable(model: nn.Module) -> None:
    with lowrank.disabled(model):
        pass


def _merge(model: nn.Module) -> None:
    with lowrank.merged(model):
        pass


INSIDE: dict[str, Callable[[nn.Module], object]] = {
    "merged": _merge,
    "disabled": _disable,
    "set_active": lambda m: lowrank.set_active(m, ["one"]),
    "delete_adapter": lambda m: lowrank.delete_adapter(m, "two"),
    "unload": lowrank.unload,
    "merge_and_unload": lowrank.merge_and_unload,
    "inject": lambda m: lowrank.inject(m, LoraConfig(r=2, target_modules=["first"]), "three"),
}


@pytest.mark.parametrize("what", INSIDE)
def test_inside_of_merged_whatever_switches_is_an_error_and_changes_nothing(what: str) -> None:
    model, x = chain("one", "two")
    outside, answer = snapshot(model), model(x)
    with lowrank.merged(model):
        before, merged = snapshot(model), model(x)
        who = "a new adapter 'three'" if what == "inject" else what
        with pytest.raises(LowrankError, match=f"{who}: the adapters are folded .*: leave the block of `merged`"):
            INSIDE[what](model)
        assert_same(model, before)
        assert same_bits(model(x), merged)
    assert_same(model, outside)
    assert same_bits(model(x), answer)


def test_loading_inside_of_merged_is_an_error(tmp_path: Path) -> None:
    model, _ = chain("one")
    lowrank.save_adapter(model, tmp_path, "one")
    with lowrank.merged(model), pytest.raises(LowrankError, match="leave the block"):
        lowrank.load_adapter(model, tmp_path, "two")
    assert set(lowrank.adapter_configs(model)) == {"one"}


def test_saving_inside_of_merged_writes_the_same(tmp_path: Path) -> None:
    model, _ = chain("one")
    lowrank.save_adapter(model, tmp_path / "outside", "one")
    with lowrank.merged(model):
        lowrank.save_adapter(model, tmp_path / "inside", "one")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lowrank.json"):
        assert (tmp_path / "inside" / file).read_bytes() == (tmp_path / "outside" / file).read_bytes()


@pytest.mark.parametrize("by", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_taken_inside_of_merged_is_not_merged(by: str) -> None:
    model, x = chain("one", "two")
    wanted = model(x)
    with lowrank.merged(model):
        if by == "deepcopy":
            twin = copy.deepcopy(model)
        elif by == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
    assert same_bits(twin(x), wanted) and same_bits(model(x), wanted)
    lowrank.set_active(twin, ["one"])
    lowrank.set_active(twin, ["one", "two"])
    assert same_bits(twin(x), wanted)
    plain = lowrank.unload(model).state_dict()
    assert all(same_bits(tensor, plain[name]) for name, tensor in lowrank.unload(twin).state_dict().items())


def test_disabled_holds_what_the_block_does_to_adapters() -> None:
    model, x = chain("one", "two")
    both = model(x)
    with lowrank.disabled(model):
        base = model(x)
        with lowrank.disabled(model), lowrank.merged(model):
            assert same_bits(model(x), base)
        assert same_bits(model(x), base)
        lowrank.set_active(model, ["one"])
        one = model(x)
    assert same_bits(model(x), both)
    with lowrank.disabled(model):
        lowrank.delete_adapter(model, "two")
    assert lowrank.active_adapters(model) == ("one",) and same_bits(model(x), one)
    with lowrank.disabled(model):
        lowrank.unload(model)
    assert same_bits(model(x), base) and not lowrank.adapter_configs(model)


def test_switching_inside_of_the_models_own_forward_is_an_error() -> None:
    model, x = chain("one", "two")
    model.second.register_forward_hook(lambda *_: lowrank.set_active(model, ["one"]))
    with pytest.raises(LowrankError, match="cannot be switched inside of the forward of the Chain"):
        model(x)
    model.second._forward_hooks.clear()
    lowrank.set_active(model, ["one"])  # the failed forward has ended


class Wrapped(nn.Module):
    """A model that calls an adapted one twice, as preference training does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with lowrank.disabled(self.inner):
            base = self.inner(x)
        return self.inner(x) - base


def test_another_models_forward_may_switch() -> None:
    model, x = chain("one")
    adapted = model(x)
    with lowrank.disabled(model):
        base = model(x)
    assert same_bits(Wrapped(model)(x), adapted - base)


def test_an_interrupted_forward_blocks_nobody() -> None:
    model, x = chain("one", "two")
    handle = model.second.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    lowrank.set_active(model, ["two"])
    thread = threading.Thread(target=lambda: lowrank.set_active(model, ["one"]), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and lowrank.active_adapters(model) == ("one",)
    model(x)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_in_a_forward_blocks_nobody() -> None:
    model, x = chain("one", "two")
    handle = model.second.register_forward_hook(lambda *_: sys.exit())
    thread = threading.Thread(target=lambda: model(x))
    thread.start()
    thread.join()
    handle.remove()
    lowrank.set_active(model, ["two"])


def test_a_switch_that_waits_too_long_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.injection.turnstile.PATIENCE", 0.1)
    model, x = chain("one", "two")
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        inside.set()
        go_on.wait(10)

    model.second.register_forward_hook(hold)
    thread = threading.Thread(target=lambda: model(x))
    thread.start()
    assert inside.wait(10)
    try:
        with pytest.raises(LowrankError, match="another thread is in a forward of the Chain for more than"):
            lowrank.set_active(model, ["one"])
        assert lowrank.active_adapters(model) == ("one", "two")
    finally:
        go_on.set()
        thread.join()
    lowrank.set_active(model, ["one"])


def run_beside(model: nn.Module, x: Tensor, act: Callable[[], None], rounds: int) -> list[Tensor]:
    """What two threads that run the model answer while this one acts."""
    answers: list[Tensor] = []
    faults: list[BaseException] = []
    stop = threading.Event()

    def infer() -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    answers.append(model(x))
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=infer) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    patience = pytest.MonkeyPatch()
    patience.setattr("lowrank.injection.turnstile.PATIENCE", 30.0)  # a switch that forwards starve fails soon
    try:
        for thread in threads:
            thread.start()
        for _ in range(rounds):
            act()
            time.sleep(0)
    finally:
        patience.undo()
        stop.set()
        for thread in threads:
            thread.join(30)
        sys.setswitchinterval(interval)
    assert not faults, faults[0]
    return answers


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def deep() -> tuple[Deep, Tensor, dict[str, Tensor]]:
    """A deep model with adapters a and b, an input, and all answers it may give: by a, b, both and none."""
    model, x = Deep().eval(), torch.randn(3, 6)
    for name in ("a", "b"):
        lowrank.inject(
            model, LoraConfig(r=2, lora_alpha=5, target_modules=r"layers\.\d+", init_lora_weights="random"), name
        )
    wanted = {}
    for names in (["a"], ["b"], ["a", "b"], []):
        lowrank.set_active(model, names)
        with torch.no_grad():
            wanted[" ".join(names)] = model(x)
    return model, x, wanted


def assert_whole(answers: list[Tensor], wanted: dict[str, Tensor]) -> None:
    strange = [a for a in answers if not any(torch.allclose(a, w, rtol=1e-4, atol=1e-5) for w in wanted.values())]
    assert answers and not strange, f"{len(strange)} of {len(answers)} answers belong to no adapter"


def test_switching_is_seen_whole_by_other_threads() -> None:
    model, x, wanted = deep()
    choices = iter([["a"], ["b"], ["a", "b"], []] * 100)
    assert_whole(run_beside(model, x, lambda: lowrank.set_active(model, next(choices)), 100), wanted)


def test_merging_for_a_block_is_seen_whole_by_other_threads() -> None:
    model, x, wanted = deep()
    lowrank.set_active(model, ["a"])

    def act() -> None:
        with lowrank.merged(model):
            time.sleep(0)

    assert_whole(run_beside(model, x, act, 40), {"a": wanted["a"]})


def test_disabling_deleting_and_injecting_are_seen_whole_by_other_threads() -> None:
    model, x, wanted = deep()
    lowrank.set_active(model, ["a"])
    config = LoraConfig(r=2, lora_alpha=5, target_modules=r"layers\.\d+")  # starts at the base's answers

    def act() -> None:
        _disable(model)
        lowrank.inject(model, config, "c")
        lowrank.delete_adapter(model, "c")
        lowrank.set_active(model, ["a"])

    assert_whole(run_beside(model, x, act, 30), {"a": wanted["a"], "": wanted[""]})


def test_merging_for_good_is_seen_whole_by_other_threads() -> None:
    model, x, wanted = deep()
    lowrank.set_active(model, ["a"])
    answers = run_beside(model, x, lambda: (time.sleep(0.05), lowrank.merge_and_unload(model)), 1)
    assert_whole(answers, {"a": wanted["a"]})
    assert type(model.layers[0]) is nn.Linear


def test_two_threads_that_switch_do_not_block_each_other() -> None:
    model, x, wanted = deep()
    done = threading.Barrier(3, timeout=30)

    def switch(name: str) -> None:
        for _ in range(50):
            lowrank.set_active(model, [name])
        done.wait()

    threads = [threading.Thread(target=switch, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    done.wait()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert_whole([model(x)], {"a": wanted["a"], "b": wanted["b"]})


def test_the_turnstile_is_not_copied_with_what_waits_in_it() -> None:
    model, x = chain("one")
    twins = []
    model.second.register_forward_hook(lambda *_: twins.append(copy.deepcopy(model)) if not twins else None)
    model(x)
    twins[0].second._forward_hooks.clear()
    lowrank.set_active(twins[0], [])
    assert require_state(twins[0]).turnstile is not require_state(model).turnstile


def test_the_models_own_hooks_are_gone_after_unload_and_compile_sees_one_graph() -> None:
    torch._dynamo.reset()
    model, x = chain("one")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    lowrank.unload(model)
    assert not model._forward_hooks and not model._forward_pre_hooks and not model._forward_hooks_always_called
    torch._dynamo.reset()
    assert type(model) is Chain


def test_a_compiled_model_and_a_plain_one_take_turns() -> None:
    """In a thread where no adapted model has run: the compiler's guards must hold after the plain one has."""
    torch._dynamo.reset()
    model, x = chain("one")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    turns = (compiled, model, compiled, compiled)
    with ThreadPoolExecutor(1) as fresh:
        first, *others = fresh.submit(lambda: [each(x) for each in turns]).result()
    for answer in others:
        torch.testing.assert_close(answer, first)
    torch._dynamo.reset()
