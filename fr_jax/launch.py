"""``python -m fr_jax.launch``: see :mod:`fr_jax.distributed.launch`."""

from __future__ import annotations

import sys

from fr_jax.distributed.launch import main

if __name__ == "__main__":
    sys.exit(main())
