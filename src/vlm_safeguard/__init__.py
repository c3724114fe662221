"""VLM-Safeguard: an inference-time safety guard for vision-language models.

from vlm_safeguard import Guard, load

loaded = load("path/to/vlm")
guard = Guard.from_pretrained("guard/")
inputs = guard.prepare(loaded.processor, messages)
with guard.attach(loaded.model, loaded.processor):
    loaded.model.generate(**inputs)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_safeguard.calibration.calibrate import calibrate
    from vlm_safeguard.data.prompts import CalibrationData
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.loading import load

__all__ = ["CalibrationData", "Guard", "calibrate", "load"]
_HOMES = {
    "CalibrationData": "data.prompts",
    "Guard": "guard",
    "calibrate": "calibration.calibrate",
    "load": "model.loading",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``vlm-safeguard --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
