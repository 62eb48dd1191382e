"""The operators megactl compiles for itself, each with a reference in plain torch. `MEGACTL_OPS=auto|compiled|torch` chooses."""

from megactl.engine.ops.adamw import adamw_
from megactl.engine.ops.library import describe, use_compiled
from megactl.engine.ops.philox import INITIALISATION_STEP, dropout_add, normal_, philox_bits_, stream_of

__all__ = ["INITIALISATION_STEP", "adamw_", "describe", "dropout_add", "normal_", "philox_bits_", "stream_of", "use_compiled"]
