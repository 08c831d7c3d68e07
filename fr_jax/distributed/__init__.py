"""A run of several processes: joining, coordination, launch and supervision."""

from fr_jax.distributed._alike import from_rows, rows
from fr_jax.distributed._coordination import Group, GroupError
from fr_jax.distributed._joining import COORDINATOR, NUM_PROCESSES, PROCESS_ID, free_port, group, initialize, is_first
from fr_jax.distributed._reading import read

__all__ = [
    "COORDINATOR",
    "NUM_PROCESSES",
    "PROCESS_ID",
    "Group",
    "GroupError",
    "free_port",
    "from_rows",
    "group",
    "initialize",
    "is_first",
    "read",
    "rows",
]
