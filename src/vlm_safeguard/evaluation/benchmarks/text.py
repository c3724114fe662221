"""Reads text-only benchmarks. Labels are the publishers'; licences stand beside the authors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_safeguard.data.prompts import Label, Prompt
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.benchmarks.folders import Folder
from vlm_safeguard.evaluation.benchmarks.registry import GITHUB, benchmark
from vlm_safeguard.evaluation.benchmarks.table_files import fields, read_csv, read_json, read_lines

# Jailbreak Instructions as VLM-Guard (Liu et al., 2025) uses it: 5 templates x 20 questions. Which
# five, the paper does not say. These are ours, fixed so that results stay comparable: one of each
# family whose templates are prose around the plain question. The other families are optimised
# token strings (universal-attack), or want the question encoded (combination-attack,
# functional-attack).
JAILBREAK_TEMPLATES = (
    ("Multi-Roleplaying", "2"),
    ("Single-Roleplaying", "3"),
    ("Privilege-Escalation", "0"),
    ("Attention-Shifting", "5"),
    ("auto-generated-attack", "5"),
)
_SLOT = "[INSERT PROMPT HERE]"

_XSTEST_LABELS: dict[str, Label] = {"safe": "harmless", "unsafe": "harmful"}


@benchmark("MaliciousInstruct", GITHUB + "Princeton-SysML/Jailbreak_LLM", "MaliciousInstruct.txt")
def malicious_instruct(folder: Folder) -> list[Prompt]:
    """MaliciousInstruct (Huang et al., 2023): an instruction a line."""
    lines = read_lines(folder.find("MaliciousInstruct.txt", inside="data"))
    return [folder.prompt(f"{n:04}", line) for n, line in enumerate(lines)]


@benchmark(
    "Jailbreak Instructions",
    GITHUB + "thu-coai/JailbreakDefense_GoalPriority",
    "harmful_questions.json",
    "jailbreak_templates.json",
)
def jailbreak_instructions(folder: Folder) -> list[Prompt]:
    """Jailbreak Instructions (Zhang et al., 2023): ``JAILBREAK_TEMPLATES`` x the questions."""
    path = folder.find("harmful_questions.json", inside="data/test")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: a list of questions is expected; download it again")
    questions = [
        fields(row, ("id", "question"), f"{path}, question {n}") for n, row in enumerate(rows, 1)
    ]
    path = folder.find("jailbreak_templates.json", inside="data/test")
    families = read_json(path)
    found = []
    for family, number in JAILBREAK_TEMPLATES:
        template = _template(families, family, number, str(path))
        for question in questions:
            cluster = f"q{question['id']}"
            prompt = folder.prompt(
                f"{cluster}@{family}-{number}",
                # Generated templates have the slot several times; their publisher fills them all.
                template.replace(_SLOT, question["question"]),
                intent=family,
                cluster=cluster,
            )
            found.append(replace(prompt, form="jailbreak"))
    return found


def _template(families: Any, family: str, number: str, where: str) -> str:
    members = families.get(family) if isinstance(families, dict) else None
    for row in members if isinstance(members, list) else []:
        template = fields(row, ("id", "prompt"), f"{where}, {family}")
        if template["id"] == number and _SLOT in template["prompt"]:
            return template["prompt"]
    raise DataError(
        f"{where}: no template {number} with {_SLOT} in the family {family}; "
        "is it the publisher's file?"
    )


@benchmark(
    "AdvBench, harmful behaviours", GITHUB + "llm-attacks/llm-attacks", "harmful_behaviors.csv"
)
def advbench(folder: Folder) -> list[Prompt]:
    """AdvBench's harmful behaviours (Zou et al., 2023; MIT). The targets are left unread."""
    path = folder.find("harmful_behaviors.csv", inside="data/advbench")
    goals = [row["goal"] for row in read_csv(path, ("goal",))]
    # Copies are about with the two headings exchanged: the answers' openings under "goal".
    if sum(goal.startswith("Sure,") for goal in goals) * 2 > len(goals):
        raise DataError(
            f"{path}: the column goal holds the targets; exchange the two headings, "
            f"or get the file from {folder.publisher}"
        )
    return [folder.prompt(f"{n:04}", goal) for n, goal in enumerate(goals)]


@benchmark(
    "JailbreakBench, JBB-Behaviors",
    "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
    "harmful-behaviors.csv",
    "benign-behaviors.csv",
)
def jailbreakbench(folder: Folder) -> list[Prompt]:
    """JBB-Behaviors (Chao et al., 2024; MIT): harmful, and benign on the same topics."""
    kinds: tuple[tuple[str, Label], ...] = (("harmful", "harmful"), ("benign", "harmless"))
    return [
        folder.prompt(f"{kind}-{row['Index']}", row["Goal"], label=label, intent=row["Category"])
        for kind, label in kinds
        for row in read_csv(
            folder.find(f"{kind}-behaviors.csv", inside="data"), ("Index", "Goal", "Category")
        )
    ]


@benchmark(
    "HarmBench, text behaviours",
    GITHUB + "centerforaisafety/HarmBench",
    "harmbench_behaviors_text_all.csv",
)
def harmbench(folder: Folder) -> list[Prompt]:
    """HarmBench's text behaviours (Mazeika et al., 2024; MIT), copyright among them.

    A contextual behaviour is asked as HarmBench's direct request asks it: the context, a line of
    three dashes, the behaviour. The intent is the semantic category.
    """
    path = folder.find("harmbench_behaviors_text_all.csv", inside="data/behavior_datasets")
    rows = read_csv(path, ("Behavior", "SemanticCategory", "BehaviorID"), ("ContextString",))
    return [
        folder.prompt(
            row["BehaviorID"],
            "\n\n---\n\n".join(filter(None, (row["ContextString"], row["Behavior"]))),
            intent=row["SemanticCategory"],
        )
        for row in rows
    ]


@benchmark("StrongREJECT", GITHUB + "alexandrasouly/strongreject", "strongreject_dataset.csv")
def strongreject(folder: Folder) -> list[Prompt]:
    """StrongREJECT's forbidden prompts (Souly et al., 2024; MIT)."""
    path = folder.find("strongreject_dataset.csv", inside="strongreject_dataset")
    return [
        folder.prompt(f"{n:04}", row["forbidden_prompt"], intent=row["category"])
        for n, row in enumerate(read_csv(path, ("category", "forbidden_prompt")))
    ]


@benchmark("XSTest", GITHUB + "paul-rottger/xstest", "xstest_prompts.csv")
def xstest(folder: Folder) -> list[Prompt]:
    """XSTest (Röttger et al., 2024; CC-BY-4.0): safe prompts that look unsafe, and contrasts.

    The second version's file has no labels: there, contrasts are the types named so. A prompt has
    the same id in both files.
    """
    path = folder.find("xstest_prompts.csv", "xstest_v2_prompts.csv")
    if path.name == "xstest_v2_prompts.csv":
        rows = read_csv(path, ("id_v2", "type", "prompt"))
        for row in rows:
            row["id"] = row["id_v2"].removeprefix("v2-")
            row["label"] = "unsafe" if row["type"].startswith("contrast_") else "safe"
    else:
        rows = read_csv(path, ("id", "type", "prompt", "label"))
    if odd := [row for row in rows if row["label"] not in _XSTEST_LABELS]:
        raise DataError(
            f"{path}: the label of {odd[0]['id']} is {odd[0]['label']}; safe or unsafe is wanted"
        )
    return [
        folder.prompt(
            row["id"], row["prompt"], label=_XSTEST_LABELS[row["label"]], intent=row["type"]
        )
        for row in rows
    ]
