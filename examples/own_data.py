"""Calibrate a guard on prompts of your own beside ours, and save it.

python examples/own_data.py MODEL HARMFUL HARMLESS GUARD

HARMFUL and HARMLESS are text, CSV or JSONL files (docs/calibrate.md). The command line does the
same: vlm-safeguard calibrate MODEL --harmful HARMFUL --harmless HARMLESS -o GUARD
"""

import sys
from pathlib import Path

from vlm_safeguard import calibrate, load
from vlm_safeguard.calibration.budget import Budget
from vlm_safeguard.calibration.conformal import least_bound
from vlm_safeguard.data.own_prompts import OwnFiles, own_data
from vlm_safeguard.utils.progress import Progress

model, harmful, harmless, folder = sys.argv[1:]
budget = Budget(false_positives=0.02)
files = OwnFiles(Path(harmful), Path(harmless))
data = own_data(files, least_bound(budget.false_positives))
guard = calibrate(load(model), data=data, budget=budget, progress=Progress())
guard.save_pretrained(folder)
print(guard.config.calibration["proof"])
