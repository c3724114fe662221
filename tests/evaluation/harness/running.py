"""Run a plan and keep nothing but its logs, for tests of what stands in them."""

from pathlib import Path

from inspect_ai.log import EvalLog

from vlm_safeguard.evaluation.harness.execution import Plan, running


def run_plan(plan: Plan, output: Path) -> list[EvalLog]:
    """The logs of ``plan``, run or gone on with in ``output``."""
    with running(plan, output, "none") as logs:
        return logs
