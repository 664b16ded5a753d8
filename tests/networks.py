"""Two nodes on this machine, network namespaces, and a cable between them that can be slow, or cut."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from types import TracebackType

TUN = "/dev/net/tun"
ADDRESSES = ("10.77.18.1", "10.77.18.2")
HOSTS = ("n1", "n2")
_INTERFACE = "eth0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET, _CLONE_NEWUTS = 0x40000000, 0x04000000
_PACKET_BYTES = 1 << 16


class Cable:
    """Carries every packet from one node to the other. A context manager, which needs root and /dev/net/tun.

    delay_s: how long each is on its way. cut: none arrives, and neither end is told. carried: how many have arrived.
    The kernel here has no netem; what TCP sees is the same.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s, self.cut, self.carried = delay_s, False, 0
        self.nodes = [f"dsbert{os.getpid()}{host}" for host in HOSTS]
        self._ends: list[int] = []
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()

    def __enter__(self) -> Cable:
        try:
            for node, address in zip(self.nodes, ADDRESSES, strict=True):
                self._ends.append(_plug_in(node, address))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        for start, end in (self._ends, self._ends[::-1]):
            self._threads.append(threading.Thread(target=self._carry, args=(start, end), daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            os.close(end)
        for node in self.nodes:
            subprocess.run(("ip", "netns", "del", node), check=False, capture_output=True, timeout=30)

    def _carry(self, start: int, end: int) -> None:
        under_way: deque[tuple[float, bytes]] = deque()
        while not self._over.is_set():
            patience = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.1
            if select.select([start], [], [], patience)[0]:
                under_way.append((time.monotonic() + self.delay_s, os.read(start, _PACKET_BYTES)))
            while under_way and under_way[0][0] <= time.monotonic():
                packet = under_way.popleft()[1]
                if not self.cut:
                    with suppress(OSError):  # the node at the other end is not up
                        os.write(end, packet)
                        self.carried += 1


def _plug_in(node: str, address: str) -> int:
    """Make a node; the end of the cable that this process holds."""
    name = f"t{os.getpid()}{node[-2:]}".encode()
    end = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TUN | _IFF_NO_PI))
    for command in (
        ("ip", "netns", "add", node),
        ("ip", "link", "set", name.decode(), "netns", node, "name", _INTERFACE),
        ("ip", "-n", node, "address", "add", f"{address}/24", "dev", _INTERFACE),
        ("ip", "-n", node, "link", "set", _INTERFACE, "up"),
        ("ip", "-n", node, "link", "set", "lo", "up"),
    ):
        subprocess.run(command, check=True, timeout=30)
    return end


def move_to(node: str, host: str) -> None:
    """This process is on a node from now on, whose hostname it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{node}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), f"could not move to {node}")
    socket.sethostname(host)
    os.environ["GLOO_SOCKET_IFNAME"] = _INTERFACE
