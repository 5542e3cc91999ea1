"""Weights that two modules share, such as an embedding and an output head."""

from collections import defaultdict

from torch import nn


def shared_weights(modules: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    """Groups of module paths whose `weight` is one and the same parameter."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)].append(path)
    return [tuple(paths) for paths in owners.values() if len(paths) > 1]


def sharing_warnings(modules: dict[str, nn.Module], targets: set[str]) -> list[str]:
    """One sentence for every shared weight of which a target is a part.

    The change is added where the module is called, so its partners keep answering by W0; a merge gives the target a
    weight of its own and leaves the partners theirs.
    """
    sentences = []
    for group in shared_weights(modules):
        inside = [path for path in group if path in targets]
        outside = [path for path in group if path not in targets]
        if inside:
            others = ", ".join(outside) or "each other"
            sentences.append(
                f"{', '.join(inside)} shares its weight with {others}: only the targets change, and merging "
                "will untie them"
            )
    return sentences


# Their forward reads the flag as "scale the decoder's output", and their configs set it whatever is asked.
SCALED_BY_FLAG = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "udop"})


def part_tied_weights(model: nn.Module) -> None:
    """In place: where weights that a transformers model declares tied are no longer one, let it declare none.

    Saving such a model would write a shared tensor once and leave it to the declaration to find it again on loading, so
    every owner gets a tensor of its own. The config's `tie_word_embeddings` becomes false, but for the T5 family, where
    it has a second meaning; transformers does not tie tensors that a checkpoint holds with different values.
    """
    for module in model.modules():
        ties = getattr(module, "all_tied_weights_keys", None)
        if not ties or all(_tensor(module, a) is _tensor(module, b) for a, b in ties.items()):
            continue
        _give_each_its_own(module, {*ties, *ties.values()})
        module.all_tied_weights_keys = {}  # type: ignore[assignment]
        config = getattr(module, "config", None)
        for owner in (config, getattr(config, "text_config", None)):
            if getattr(owner, "tie_word_embeddings", False) and owner.model_type not in SCALED_BY_FLAG:  # type: ignore[union-attr]
                owner.tie_word_embeddings = False  # type: ignore[union-attr]


def _tensor(module: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _give_each_its_own(module: nn.Module, names: set[str]) -> None:
    seen: set[int] = set()
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        parameter = owner._parameters.get(leaf)
        if parameter is not None and id(parameter) in seen:
            owner._parameters[leaf] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        elif parameter is not None:
            seen.add(id(parameter))
