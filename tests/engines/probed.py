"""The reference with one more gate, which reads the mean over a text's words and a probe."""

from __future__ import annotations

from dataclasses import replace

from tests import tiny
from tests.engines import tiny_vllm
from tests.engines.conftest import Reference
from vlm_safeguard.model.words import find_frame


def probed(reference: Reference) -> Reference:
    """Its new gate opens on half of the requests, and the guard reads sentences too and restores
    what refusals have at later tokens."""
    config, frame = reference.guard.config, find_frame(reference.loaded)
    assert frame is not None
    guard = tiny_vllm.guard(
        reference.loaded,
        [*config.gates, tiny.gate("text", 1, 4, reads_probe=True)],
        frame=frame.model_copy(update={"probe": frame.probe[:5]}),
        **config.steering.model_dump() | {"tokens": 3, "later": "refusal"},
    )
    guard = tiny.changed(guard, reads_sentences=True)
    shut = replace(reference, guard=tiny.with_thresholds(guard, [[1e4], [0.0], [1e4, 0.0]]))
    scores = [shut.answer(request)[1].scores for request in reference.requests]
    text, in_vlm, other = (
        tiny_vllm.middle(row[name][0] + added for row in scores)
        for name, added in (("text.0", 1e4), ("vlm.1", 0.0), ("text.2", 1e4))
    )
    cuts = [[text], [in_vlm], [other, 0.0]]
    found = replace(shut, guard=tiny.with_thresholds(guard, cuts))
    found.answers = [found.answer(request) for request in found.requests]
    return found
