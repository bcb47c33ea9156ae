"""One process of the doctor's all-reduce: `python -m gpt2course.allreduce_probe BACKEND RANK WORLD_SIZE STORE_FILE`.

Every rank gives its rank + 1; the sum must be 1 + 2 + … + world_size.
"""

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist


def main(backend: str, rank: int, world_size: int, store_file: str) -> None:
    store = dist.FileStore(store_file, world_size)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    total = torch.tensor([rank + 1.0], device=device)
    dist.all_reduce(total)
    expected = world_size * (world_size + 1) / 2
    assert total.item() == expected, f"rank {rank}: the sum is {total.item()}, expected {expected}"
    dist.barrier()
    # Leaving a gloo group at once can abort the process: a thread of it may still want the interpreter.
    time.sleep(0.1)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
