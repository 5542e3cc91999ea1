"""What several processes of one training know together; a process that is alone knows it by itself.

Each takes its own rows of a step. A gradient is that of the sum of losses over its rows, divided by what is trained in
the rows of all: added up over the processes (not averaged) they are the gradient of the whole step.
"""

import torch
from torch import distributed


def summed(count: int, device: torch.device) -> int:
    """The counts of all processes, added up. Every process of the group must call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return count
    total = torch.tensor(count, device=device)
    distributed.all_reduce(total)
    return int(total)
