"""No network but loopback, for every Python process that has this folder on its PYTHONPATH, kernels included."""

import ipaddress
import socket
from typing import Any

LOCAL_NAMES = {None, "", b"", "localhost", "localhost.localdomain", "ip6-localhost", socket.gethostname()}


class NetworkRefused(OSError):
    """A chapter reached for the network; it must run without one."""


def is_local(host: Any) -> bool:
    """True for this machine's own names and loopback addresses."""
    if host in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except (ValueError, AttributeError):
        return False


def refuse(host: Any) -> None:
    """Raise unless the host is this machine."""
    if not is_local(host):
        raise NetworkRefused(f"the chapters run without a network, and something asked for {host!r}")


def guarded(name: str) -> Any:
    """The socket method of this name, for this machine's addresses only."""
    real = getattr(socket.socket, name)

    def method(self: socket.socket, *args: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(args[-1][0])
        return real(self, *args)

    return method


real_getaddrinfo = socket.getaddrinfo


def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
    """Look up this machine's own names only, so that no name leaves it."""
    refuse(host)
    return real_getaddrinfo(host, *args, **kwargs)


# On the class, so that its subclasses (ssl's among them) are guarded too.
for method_name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, method_name, guarded(method_name))
socket.getaddrinfo = guarded_getaddrinfo
