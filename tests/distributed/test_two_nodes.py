"""launch_ddp.sh on two machines: here two network namespaces of one, joined by a cable of their own."""

import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from gpt2course import launch

ROOT = Path(__file__).parents[2]

# "$1" is the folder to work in, the rest the command of each node. The outer namespace is node 0, the inner one node 1.
TWO_MACHINES = r"""
set -eu
cd "$1"; shift
mkfifo made
unshare --net sh -c 'echo >made; exec sleep 3600' &
other=$!
trap 'kill $other' EXIT
read -r _ <made
ip link add near type veth peer name far netns "$other"
there="nsenter --target $other --net"
ip addr add 10.231.0.1/24 dev near
$there ip addr add 10.231.0.2/24 dev far
for device in lo near; do ip link set "$device" up; done
for device in lo far; do $there ip link set "$device" up; done
export NNODES=2 MASTER_ADDR=10.231.0.1
NODE_RANK=1 LOCAL_ADDR=10.231.0.2 GLOO_SOCKET_IFNAME=far $there "$@" >node1 2>&1 &
node1=$!
code0=0 code1=0
NODE_RANK=0 LOCAL_ADDR=10.231.0.1 GLOO_SOCKET_IFNAME=near "$@" >node0 2>&1 || code0=$?
wait "$node1" || code1=$?
echo "$code0 $code1"
"""
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net"]

TRAINING = """
import json, os, sys
from pathlib import Path
if "--check" in sys.argv:
    sys.exit()
from gpt2course.train.world import connect, guarded
def main():
    world = connect("cpu")
    (total,) = world.sum(10.0 ** world.rank)
    found = {"rank": world.rank, "world_size": world.world_size, "total": total, "node": os.environ["GROUP_RANK"]}
    Path(sys.argv[1], f"rank{world.rank}.json").write_text(json.dumps(found | {"meet": os.environ["MASTER_ADDR"]}))
guarded(main)
"""


def why_not() -> str:
    """Why two namespaces cannot be made here; empty if they can."""
    for tool in ("unshare", "nsenter", "ip", "bash"):
        if shutil.which(tool) is None:
            return f"there is no {tool} here"
    cable = [*NAMESPACES, "unshare", "--net", "ip", "link", "add", "near", "type", "veth", "peer", "name", "far"]
    tried = subprocess.run(cable, capture_output=True, text=True, timeout=60)
    return f"no network namespaces with a veth pair here: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.mark.distributed
def test_two_machines_train_together(tmp_path: Path) -> None:
    """Flags that only look right: a rendezvous that nobody hosts, or ranks that meet at their own loopback address."""
    if reason := why_not():
        pytest.skip(reason)
    scripts = tmp_path / "scripts"
    shutil.copytree(ROOT / "scripts", scripts, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (scripts / "train_ddp.py").write_text(TRAINING)
    mark = uuid.uuid4().hex
    environment = launch.child_environment() | {"PYTHON": sys.executable, launch.MARK: mark}
    node = [str(scripts / "launch_ddp.sh"), "--nproc", "1", str(tmp_path)]
    try:
        ran = subprocess.run(
            [*NAMESPACES, "bash", "-c", TWO_MACHINES, "bash", str(tmp_path), *node],
            env={name: value for name, value in environment.items() if not name.startswith("SLURM_")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        left = launch.marked(mark)
    finally:
        for process in launch.marked(mark):
            process.kill()
    said = "".join(path.read_text() for path in tmp_path.glob("node[01]"))
    assert ran.stdout == "0 0\n", f"{ran.stderr}\n{said}"
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [item["rank"] for item in found] == [0, 1]
    assert {(item["world_size"], item["total"]) for item in found} == {(2, 11.0)}
    assert [item["node"] for item in found] == ["0", "1"]
    assert len({item["meet"] for item in found}) == 1
    assert found[0]["meet"].startswith("10.231.0.")
    assert not left
