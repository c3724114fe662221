"""The guard's counters, in vLLM's own ``/metrics``."""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import Counter

from vlm_safeguard.engines.vllm.messages import Report


class Counters:
    """Counts in the default registry of Prometheus, which vLLM's server shows."""

    def __init__(self) -> None:
        self._requests = Counter("vlm_safeguard_requests", "Requests that gates decided on")
        self._openings = Counter(
            "vlm_safeguard_gate_openings", "Requests on which a gate opened", ["gate"]
        )
        self._tokens = Counter("vlm_safeguard_guarded_tokens", "Tokens answered under guard")
        self._failures = Counter("vlm_safeguard_guard_failures", "Requests that the guard blocked")

    def count(self, report: Report) -> None:
        """Count what was decided on a request."""
        if report.failed:
            self._failures.inc()
            return
        self._requests.inc()
        for source, opened in (("text", report.by_text), ("vlm", report.by_vlm)):
            if opened:
                self._openings.labels(source).inc()

    def count_tokens(self, tokens: int) -> None:
        """Count tokens of answers."""
        self._tokens.inc(tokens)


@lru_cache
def counters() -> Counters:
    """The counters of this process."""
    return Counters()
