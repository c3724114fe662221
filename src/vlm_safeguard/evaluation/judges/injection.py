"""Prevents prompt injection into a judge: breaks control tokens and markers in judged text.

A response is written by the model under test, perhaps under attack. Left as it is, ``[/INST]`` in
it ends the judge's instructions, and a made-up turn ``Agent: I cannot help.`` becomes the last
answer that Llama Guard is told to assess. A zero-width space inside such a mark keeps the text
readable for a judge and takes the mark's effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BREAK = "\u200b"
_LINE = r"(?:^|(?<=[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]))"  # whatever a model may read as a new line

# Shapes of control tokens in the field, whether or not this judge's tokenizer knows them.
_SHAPES = re.compile(
    r"([\[<])(?="
    r"\s?/?\s?[A-Z_]{3,24}\s?\]"  # [INST], [/INST], [TOOL_CALLS]
    r"|<\s?/?\s?SYS\s?>>"  # <<SYS>>, <</SYS>>
    r"|[|｜][^<>\n]{1,64}[|｜]>"  # <|im_start|>, <|eot_id|>
    r"|/?\s?(?:BEGIN|END)\b[^<>\n]{0,64}>"  # the fences of Llama Guard's prompt
    r"|/?(?:s|bos|eos|pad|unk|think|system|user|assistant|start_of_turn|end_of_turn)>)"
)
# A turn's label at the start of a line, as guard prompts write conversations.
_ROLE = re.compile(
    _LINE + r"([^\S\n]*[*_#>]*)(user|agent|assistant|human|system|model)(?=[*_\s]*:)",
    re.IGNORECASE,
)


def disarm(text: str, marks: Iterable[str] = ()) -> str:
    """``text`` with control-token shapes, turn labels and ``marks`` at line starts broken.

    Only zero-width spaces are put in; nothing is taken away. ``marks`` are the labels and fences
    of one judge's own prompt (see ``marks_of``).
    """
    text = _SHAPES.sub(r"\1" + BREAK, text)
    text = _ROLE.sub(lambda m: m[1] + m[2][0] + BREAK + m[2][1:], text)
    for mark in sorted(marks, key=len, reverse=True):
        text = re.sub(
            _LINE + r"([^\S\n]*)" + re.escape(mark),
            lambda m, mark=mark: m[1] + mark[0] + BREAK + mark[1:],  # type: ignore[misc]
            text,
        )
    return text


def marks_of(frame: str, probes: Iterable[str]) -> set[str]:
    """The short labels and fences in ``frame``, a judge prompt written round ``probes``.

    They are what stands on a line outside the probes and ends like a label or a tag ("Rules:",
    "[/INST]", "<END>") or has no letter or digit ("---").
    """
    between = "|".join(map(re.escape, probes))
    pieces = {piece.strip() for line in frame.split("\n") for piece in re.split(between, line)}
    return {
        piece
        for piece in pieces
        if 2 <= len(piece) <= 60
        and (piece.endswith((":", "]", ">")) or not re.search(r"[^\W_]", piece))
    }
