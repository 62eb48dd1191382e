"""Runs `megactl` commands, each in a fork of this process, which has imported torch once: the code a new interpreter would run, cheaper.

Reads one JSON request a line on stdin ({"id", "argv", "cwd", "env", "out", "err", "file_limit"}) and writes {"id", "pid"} when a
command has started and {"id", "status"} (the raw wait status) when it has ended. At the end of stdin it ends what still runs.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import sys
import traceback
from typing import Any

import torch
import torch.distributed

from megactl.cli import main as megactl
from megactl.engine import trainer

# Loaded here, so that every fork has it; the command itself would import it when it launches.
assert trainer.run_rank and torch.distributed.is_available()


def child(request: dict[str, Any]) -> None:
    """The life of one command: a group of its own, its own files and environment, then the command line's entry point."""
    code = 70
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, name, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], _WRITE), (2, request["err"], _WRITE)):
            opened = os.open(name, flags, 0o644)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["megactl", *request["argv"]]
        if request.get("file_limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
        code = megactl(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def answer(document: dict[str, Any]) -> None:
    """One line for whoever asked."""
    os.write(1, json.dumps(document).encode() + b"\n")


def main() -> None:
    """Serve requests until stdin ends."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, int] = {}
    selector = selectors.DefaultSelector()
    selector.register(reader, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    rest = b""
    while True:
        for key, _ in selector.select():
            if key.fileobj is reader:
                reader.recv(4096)
                reap(running)
                continue
            data = os.read(0, 65536)
            if not data:
                end_all(running)
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                start(json.loads(line), running)


def start(request: dict[str, Any], running: dict[int, int]) -> None:
    """Fork one command."""
    pid = os.fork()
    if pid == 0:
        child(request)
    running[pid] = request["id"]
    answer({"id": request["id"], "pid": pid})


def reap(running: dict[int, int]) -> None:
    """Report every command that has ended."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            answer({"id": running.pop(pid), "status": status})


def end_all(running: dict[int, int]) -> None:
    """Kill what still runs, with its ranks."""
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    answer({"ready": os.getpid()})
    main()
