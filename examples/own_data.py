"""Calibrate a guard on data of your own, and save it.

python examples/own_data.py MODEL DATA GUARD

DATA is a folder with `anchors.jsonl` and `calibration.jsonl` in the form of the package's own files
(src/vlm_safeguard/data).
"""

import sys
from pathlib import Path

from vlm_safeguard import CalibrationData, calibrate, load
from vlm_safeguard.utils.progress import Progress

data = CalibrationData.from_folder(Path(sys.argv[2]))
guard = calibrate(load(sys.argv[1]), data=data, progress=Progress())
guard.save_pretrained(sys.argv[3])
print(guard.config.calibration["proof"])
