"""The held-out loss of a model that many processes train, which all of them compute together.

Legend: B rows of a batch, T positions.
"""

import torch

from gpt2course.data import TokenStream
from gpt2course.loss import IGNORE
from gpt2course.train.parallel import Strategy


@torch.no_grad()
def held_out_loss(strategy: Strategy, stream: TokenStream, block_size: int, max_tokens: int, rows: int = 8) -> float:
    """Nats per token over the first tokens of a stream, cut into windows of block_size; the same on every process.

    Windows are dealt out in turn. Every process makes the same number of forward passes, those that have run out of
    windows with a row in which nothing is to be predicted: under FSDP a forward pass is a collective, and one pass
    more on one process would wait for the others for ever.

    Args:
        strategy: whose model; its mode is restored.
        stream: the held-out text.
        block_size: T; the first token of each window is not predicted.
        max_tokens: about so many are predicted, at least one window.
        rows: B, windows in one forward pass of one process.

    Raises:
        ValueError: if the stream is shorter than two tokens.
    """
    T = min(block_size, len(stream) - 1)
    if T < 1:
        raise ValueError(f"the held-out text has {len(stream)} tokens and needs 2; use a larger corpus")
    world = strategy.world
    n_windows = max(1, min((len(stream) - 1) // T, max_tokens // T))
    mine = range(world.rank, n_windows, world.world_size)
    most = -(-n_windows // world.world_size)
    was_training = strategy.model.training
    strategy.model.eval()
    total = torch.zeros((), device=world.device)
    for first in range(0, most, rows):
        block_BT = torch.full((min(rows, most - first), T + 1), IGNORE)
        for row, window in enumerate(mine[first : first + rows]):
            block_BT[row] = torch.from_numpy(stream.read(window * T, window * T + T + 1).astype("int64"))
        x_BT, y_BT = block_BT[:, :-1].clamp(min=0).to(world.device), block_BT[:, 1:].to(world.device)
        with strategy.autocast():
            total += strategy.model(x_BT, y_BT, reduction="sum")
    strategy.model.train(was_training)
    return world.sum(total.item())[0] / (n_windows * T)
