"""The process that reads pickles: `python -m lowrank.adapters.convert.unpickle SOURCE OUT [SOURCE OUT ...]`.

Prints the names of the tensors in every file as JSON, a list of lists. Tensors that share memory are written once, as
safetensors wants it and transformers expects of tied weights; views of a part of another tensor are copied.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


def main(places: Sequence[str]) -> None:
    """Rewrite every pickle among `places`, SOURCE OUT SOURCE OUT ..., as a safetensors file."""
    pairs = zip(places[::2], places[1::2], strict=True)
    print(json.dumps([rewrite(source, out) for source, out in pairs]))


def rewrite(source: str, out: str) -> list[str]:
    """Rewrite the pickle `source` as the safetensors file `out`; the names of its tensors."""
    from safetensors.torch import save_file

    from lowrank.checkpoint.read import read_pickle

    tensors = distinct(read_pickle(Path(source)))
    save_file(tensors, out, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(out, 0o666 & ~mask)  # safetensors would have nobody else read it
    descriptor = os.open(out, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return sorted(tensors)


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without second names of one and the same, each in memory of its own."""
    seen: set[tuple[object, ...]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        same = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and same in seen:
            continue
        seen.add(same)
        kept[name] = tensor.clone().contiguous()
    return kept


if __name__ == "__main__":
    from safetensors import SafetensorError

    from lowrank.adapters.convert.model_pickles import NOT_WRITTEN
    from lowrank.errors import LowrankError

    torch.set_num_threads(1)
    try:
        main(sys.argv[1:])
    except SafetensorError as error:  # only writing goes through it
        print(error, file=sys.stderr)
        sys.exit(NOT_WRITTEN)
    except (LowrankError, OSError) as error:
        sys.exit(str(error))
