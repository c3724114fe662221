"""Prometheus metrics and JSON logs. Neither ever holds what was asked or answered."""

from __future__ import annotations

import json
import logging
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Telemetry:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vlm_safeguard_requests", "Requests by endpoint, outcome and mode",
            ["endpoint", "outcome", "mode"], registry=registry,
        )  # fmt: skip
        self.responses = Counter(
            "vlm_safeguard_responses", "HTTP responses by path and status",
            ["path", "status"], registry=registry,
        )  # fmt: skip
        self.gates = Counter(
            "vlm_safeguard_gate_openings", "Requests on which a gate opened",
            ["gate"], registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "vlm_safeguard_tokens", "Tokens read and written", ["kind"], registry=registry
        )
        self.pictures = Counter("vlm_safeguard_pictures", "Pictures read", registry=registry)
        self.failures = Counter(
            "vlm_safeguard_guard_failures", "Batches that failed", registry=registry
        )
        self.self_check_failures = Counter(
            "vlm_safeguard_self_check_failures", "Self-checks that failed", registry=registry
        )
        self.queue = Gauge("vlm_safeguard_waiting", "Requests that wait", registry=registry)
        self.first_text = Histogram(
            "vlm_safeguard_first_text_seconds", "Time until the first text",
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "vlm_safeguard_request_seconds", "Time until the end of the answer",
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields of ``extra``."""

    _known = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {key: value for key, value in vars(record).items() if key not in self._known}
        return json.dumps(line | extra, default=str)
