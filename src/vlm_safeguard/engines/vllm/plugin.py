"""The entry point of the group ``vllm.general_plugins``.

vLLM goes on without a plugin that it cannot import, so this module imports nothing that may fail.
It does not catch what the function raises: that stops it.
"""

from __future__ import annotations

import os

VARIABLE = "VLM_SAFEGUARD"
MODE = "VLM_SAFEGUARD_MODE"  # enforce (default): open gates steer; monitor: they are only counted


def register() -> None:
    """Arm the guard that the environment variable ``VLM_SAFEGUARD`` names; without it do nothing.

    vLLM calls this in every process: front ends, engine cores and workers.

    Raises:
        SafeguardError: the variable is empty, the mode is unknown, the guard cannot be loaded or
            not be used in vLLM, or this version of vLLM is not supported.
    """
    name = os.environ.get(VARIABLE)
    if name is None:
        return
    from vlm_safeguard.engines.vllm.arming import arm

    arm(name, os.environ.get(MODE, "enforce"))
