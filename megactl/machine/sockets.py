"""A port of this machine, taken."""

from __future__ import annotations

import socket

from megactl.errors import RunError


def listen(address: str, port: int) -> socket.socket:
    """A listening socket on `port` (0: any free one). Raises RunError if the port is taken.

    The kernel queues connections from the moment of listen(), so a rank that starts before rank 0 serves just waits.
    """
    both = address == "" and socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=4096, dualstack_ipv6=both)
    except OSError as error:
        message = f"cannot listen on port {port}: {error.strerror}"
        raise RunError(message, "another run on this node uses it: set MASTER_PORT to a free port") from error
