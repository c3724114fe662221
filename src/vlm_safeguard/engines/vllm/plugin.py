"""The entry point of the group ``vllm.general_plugins``.

vLLM goes on without a plugin that it cannot import, so this module imports nothing that may fail.
It does not catch what the function raises: that stops it.
"""

from __future__ import annotations

import os
import sys
from functools import wraps

VARIABLE = "VLM_SAFEGUARD"
MODE = "VLM_SAFEGUARD_MODE"  # enforce (default): open gates steer; monitor: they are only counted
_ARMS = "_arms_vlm_safeguard"


def register() -> None:
    """Arm the guard that the environment variable ``VLM_SAFEGUARD`` names; without it do nothing.

    vLLM calls this in every process: front ends, engine cores and workers.

    Raises:
        SafeguardError: the variable is empty, the mode is unknown, the guard cannot be loaded or
            not be used in vLLM, or this version of vLLM is not supported; or the variable was unset
            after a guard was armed.
    """
    _look_again()
    _arm()


def _look_again() -> None:
    """Look at the variable each time that vLLM asks for its plugins.

    vLLM calls them once in a process, and not again where this plugin or another failed, or where
    the variable was set later: it would go on without a guard.
    """
    import vllm.plugins

    own = vllm.plugins.load_general_plugins
    if not hasattr(own, _ARMS):

        @wraps(own)
        def load_general_plugins() -> None:
            own()
            _arm()

        setattr(load_general_plugins, _ARMS, True)
        vllm.plugins.load_general_plugins = load_general_plugins


def _arm() -> None:
    name, arming = os.environ.get(VARIABLE), "vlm_safeguard.engines.vllm.arming"
    if name is None and arming not in sys.modules:
        return
    from vlm_safeguard.engines.vllm.arming import arm, check_unarmed

    if name is None:
        check_unarmed()
    else:
        arm(name, os.environ.get(MODE, "enforce"))


# vLLM imports all plugins before it calls the first.
if "vllm.plugins" in sys.modules:
    _look_again()
