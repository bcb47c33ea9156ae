"""One process of the doctor's all-reduce: `python -m gpt2course.allreduce_probe BACKEND RANK WORLD_SIZE STORE_FILE`.

Every rank gives its rank + 1; the sum must be 1 + 2 + … + world_size.
"""

import datetime
import sys

import torch
import torch.distributed as dist

from gpt2course.distributed.way_out import leave


def main(backend: str, rank: int, world_size: int, store_file: str) -> None:
    store = dist.FileStore(store_file, world_size)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    total = torch.tensor([rank + 1.0], device=device)
    dist.all_reduce(total)
    expected = world_size * (world_size + 1) / 2
    assert total.item() == expected, f"rank {rank}: the sum is {total.item()}, expected {expected}"
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
