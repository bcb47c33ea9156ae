"""How a process that talked to others ends. Needs nothing of ours, so that the doctor's probe can use it, too."""

import os
import sys
import time
import traceback
from typing import NoReturn

import torch.distributed as dist


def leave(code: int = 0) -> NoReturn:
    """Part from the other processes and end this one: the one way out of every script.

    A gloo group that is destroyed at once, or left to the interpreter's end, now and then aborts the process (SIGABRT)
    or hangs it: a thread of gloo's waits for the interpreter while the interpreter waits for the thread. So: wait for
    all, let the threads come to rest, destroy, flush, and end without the interpreter's own cleaning up. After an
    error there is nobody to wait for; nor if another process is lost here, after which this one ends with 1.
    """
    if code == 0 and dist.is_initialized():
        try:
            dist.barrier()
            time.sleep(0.2)
            dist.destroy_process_group()
        except RuntimeError:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
