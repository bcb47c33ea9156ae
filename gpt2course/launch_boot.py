"""The process that `launch.torchrun` starts: torchrun itself, tied to whoever asked for it.

    python launch_boot.py PARENT_PID REPORT_FILE torchrun's arguments …

It ends with its parent, even one that is killed without warning, and leaves a report of who failed in REPORT_FILE.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
"""of <sys/prctl.h>: the signal that the kernel sends to this process when its parent ends"""
ORPHAN_GRACE_S = 45.0
"""seconds that torchrun has to end its processes after this; it grants them 30 to save"""


def end_with(parent: int) -> None:
    """Let this process get SIGTERM when `parent` ends (on Linux only). Exits if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have ended before it was asked for: then nobody will ever send the signal.
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which asked for this launch, has ended")


def outlive_briefly(parent: int) -> None:
    """Wait for the parent's end, and a while after it kill the ranks and this process.

    torchrun should long have ended by itself. But the signal may catch it inside a wait for a process, and it was seen
    never to come back from there.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(ORPHAN_GRACE_S)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


def main() -> None:
    parent, report, *arguments = sys.argv[1:]
    end_with(int(parent))
    threading.Thread(target=outlive_briefly, args=(int(parent),), daemon=True).start()

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # torchrun copies the first error there, and complains of having no place for it otherwise.
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{report}.first"
    try:
        torchrun(arguments)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        failures = [
            {
                "rank": rank,
                "exit_code": failure.exitcode,
                "error": failure.error_file_data,
                "time": Path(failure.error_file).stat().st_mtime if os.path.isfile(failure.error_file) else None,
            }
            for rank, failure in sorted(error.failures.items())
        ]
        Path(report).write_text(json.dumps(failures))
        sys.exit(1)


if __name__ == "__main__":
    main()
