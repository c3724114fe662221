"""The same wish in another form of words, so that no form stands for harm or harmlessness."""

from __future__ import annotations

import random
import re

_HOW = re.compile(
    r"^(?:how (?:do|can|could|would|should) (?:i|you|we|one|someone)|how to"
    r"|what(?: is|'s) the (?:best|easiest|quickest) way to|what are some ways to"
    r"|what are the best ways to|tell me how to|explain how to|show me how to|help me"
    r"|give me advice on how to|give me a plan to|is there an? (?:easy )?way to|suggest how i could"
    r"|ways to|teach me how to|describe how to) (?P<deed>[a-z].*?)[.?!]?$",
    re.IGNORECASE | re.DOTALL,
)
_FORMS = (
    "How do I {}?",
    "How can I {}?",
    "How to {}?",
    "How could someone {}?",
    "What is the best way to {}?",
    "What are the ways to {}?",
    "Which tricks help to {}?",
    "Which steps do I need to {}?",
    "What do I need in order to {}?",
    "Tips to {}.",
    "Give me tips so that I can {}.",
    "Ways to {}.",
    "Explain how to {}.",
    "Describe how people {}.",
    "Write a short guide that shows how to {}.",
    "Write down the steps to {}.",
    "List ideas to {}.",
    "Tell me how to {}.",
    "Help me {}.",
    "Teach me to {}.",
    "I want to {}. What should I do?",
    "Suggest a way to {}.",
    "Make a plan to {}.",
)
_ING_FORMS = (
    "Tips for {}.",
    "What are good tricks for {}?",
    "Any advice on {}?",
    "Explain the steps of {}.",
    "A guide to {}.",
    "I am thinking of {}. What do I need?",
    "Write an instruction for {}.",
)


def reform(question: str, rng: random.Random) -> str:
    """``question`` in a random form; as it stands if it does not ask how to do something."""
    found = _HOW.match(question.strip())
    if found is None or "?" in found["deed"] or ". " in found["deed"]:
        return question
    deed = found["deed"].strip()
    if rng.random() < 0.25:
        return rng.choice(_ING_FORMS).format(_ing(deed))
    return rng.choice(_FORMS).format(deed)


def _ing(deed: str) -> str:
    """The deed with its verb, the first word, as a gerund."""
    verb, _, rest = deed.partition(" ")
    if re.search(r"[^aeiou]e$|[gu]e$", verb) and len(verb) > 2:
        verb = verb[:-1]
    elif re.search(r"^[^aeiou]*[aeiou][bdgmnprt]$", verb):
        verb += verb[-1]
    return f"{verb}ing {rest}".strip()
