"""Image URLs that would make a server knock at its own or its neighbours' doors, and a door that notices."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

# Every spelling of an address that is not public, with the trap's {port} where it can be reached at all; none needs a name
# server. Collected from advisories against servers that fetch for their clients.
FORGED = [
    # this host
    "http://127.0.0.1:{port}/x", "http://127.1:{port}/x", "http://127.0.1:{port}/x", "http://2130706433:{port}/x",
    "http://017700000001:{port}/x", "http://0x7f000001:{port}/x", "http://0x7f.0.0.1:{port}/x", "http://0177.0.0.1:{port}/x",
    "http://127.000.000.001:{port}/x", "http://127.255.255.254:{port}/x", "http://0:{port}/x", "http://0.0.0.0:{port}/x",
    "http://localhost:{port}/x", "http://LOCALHOST:{port}/x", "http://localhost.:{port}/x", "HTTP://127.0.0.1:{port}/x",
    "https://127.0.0.1:{port}/x", "http://127.0.0.1.:{port}/x", "http://[::1]:{port}/x", "http://[::]:{port}/x",
    "http://[0:0:0:0:0:0:0:1]:{port}/x", "http://[::ffff:127.0.0.1]:{port}/x", "http://[::ffff:7f00:1]:{port}/x",
    "http://[::127.0.0.1]:{port}/x", "http://[64:ff9b::7f00:1]:{port}/x", "http://[2002:7f00:1::]:{port}/x",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]:{port}/x", "http://１２７.0.0.1:{port}/x", "http://127。0。0。1:{port}/x",
    "http://①②⑦.0.0.1:{port}/x", "http://[::1%25lo]:{port}/x",
    # neighbours, and what clouds tell their guests
    "http://169.254.169.254/latest/meta-data/", "http://2852039166/latest/", "http://[::ffff:a9fe:a9fe]/latest/",
    "http://[fd00:ec2::254]/latest/", "http://100.100.100.200/latest/", "http://168.63.129.16/machine", "http://10.0.0.1/x",
    "http://172.16.0.1/x", "http://192.168.0.1/x", "http://100.64.0.1/x", "http://192.0.0.8/x", "http://198.18.0.1/x",
    "http://[fe80::1]/x", "http://[fec0::1]/x", "http://[fc00::1]/x", "http://[ff02::1]/x", "http://224.0.0.1/x",
    "http://240.0.0.1/x", "http://255.255.255.255/x", "http://0.1.2.3/x",
    # two parsers, two hosts
    "http://example.com\\@127.0.0.1:{port}/x", "http://127.0.0.1:{port}\\@example.com/x", "http://example.com@127.0.0.1:{port}/x",
    "http://127.0.0.1:{port}@example.com/x", "http://example.com:80@127.0.0.1:{port}/x", "http://127.0.0.1:{port}#@example.com/x",
    "http://127.0.0.1:{port}?@example.com/x", "http://127.0.0.1:{port};@example.com/x", "http:/\\127.0.0.1:{port}/x",
    "http:\\\\127.0.0.1:{port}/x", "http:127.0.0.1:{port}/x", "http:///127.0.0.1:{port}/x", "//127.0.0.1:{port}/x",
    "http://127.0.0.1:{port}\t/x", " http://127.0.0.1:{port}/x", "http://127.0.0.1:{port}/x\r\nHost: example.com",
    "http://ex\x00ample.com@127.0.0.1:{port}/x", "http://%31%32%37.0.0.1:{port}/x", "http://127.0.0.1%00.example.com:{port}/x",
    # other doors
    "file:///etc/passwd", "file://127.0.0.1/etc/passwd", "ftp://127.0.0.1:{port}/x", "gopher://127.0.0.1:{port}/_x",
    "dict://127.0.0.1:{port}/x", "ldap://127.0.0.1:{port}/x", "unix:///var/run/docker.sock", "jar:http://127.0.0.1:{port}!/x",
    "netdoc:///etc/passwd", "javascript:alert(1)", "blob:http://127.0.0.1:{port}/x", "ws://127.0.0.1:{port}/x",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/x", "/etc/passwd", "127.0.0.1:{port}", "\\\\127.0.0.1\\share",
]  # fmt: skip


class Trap:
    """`num_caught`: connections that somebody made to it, by IPv4 or IPv6."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.num_caught = 0

    def urls(self) -> list[str]:
        return [url.replace("{port}", str(self.port)) for url in FORGED]


@contextlib.contextmanager
def listening_trap() -> Iterator[Trap]:
    """A port of every local address; who connects is counted and hung up on."""
    with contextlib.ExitStack() as sockets:
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        else:
            listener = socket.create_server(("0.0.0.0", 0), backlog=128)
        sockets.enter_context(listener)
        trap = Trap(listener.getsockname()[1])

        def catch() -> None:
            with contextlib.suppress(OSError):  # closed: the test is over
                while True:
                    connection, _ = listener.accept()
                    trap.num_caught += 1
                    connection.close()

        threading.Thread(target=catch, daemon=True).start()
        yield trap
        listener.shutdown(socket.SHUT_RDWR)
