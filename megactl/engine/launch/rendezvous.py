"""Where the ranks meet: a TCP store whose port is taken before any rank exists, so that no other process can take it first."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from megactl.engine.launch.context import RankContext

if TYPE_CHECKING:
    import torch.distributed


def connect_store(context: RankContext, *, timeout: float = 600.0) -> torch.distributed.Store:
    """The store to hand to torch.distributed.init_process_group(store=..., rank=..., world_size=...). `timeout` in seconds.

    Rank 0 serves it, except under torchrun, whose agent does.
    """
    import torch.distributed as dist

    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        context.master_addr,
        context.master_port,
        context.world_size,
        is_master=context.rank == 0 and not agent_serves,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=context.listen_fd,
    )
    # After a torchrun restart the agent's store still holds the addresses of the ranks that died; a prefix per attempt hides them.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_serves else "0"
    return dist.PrefixStore(f"megactl-attempt-{attempt}", store)
