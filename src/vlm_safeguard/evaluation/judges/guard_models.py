"""Guard models as judges, run locally with transformers: Llama Guard, Qwen3Guard and others.

The conversation [user: prompt, assistant: response] goes through the guard model's own chat
template; a model whose prompt stands only in its model card (HarmBench's classifiers, WildGuard)
takes that prompt from a file. Formats follow the model cards; see ``parse`` for the answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from vlm_safeguard.errors import DataError, ModelError
from vlm_safeguard.evaluation.judges import parse
from vlm_safeguard.evaluation.judges.injection import disarm, marks_of
from vlm_safeguard.evaluation.judges.judgement import (
    Asks,
    JudgeError,
    Judgement,
    Pair,
    screened,
    unscored,
)
from vlm_safeguard.model.control_tokens import ControlTokens
from vlm_safeguard.utils.files import read_utf8

# Stand-ins for prompt and response: what a template does to them, it does to any text.
PROBES = ("qzprobeprompt", "qzproberesponse")
PLACEHOLDERS = ("{prompt}", "{response}")

BATCH = 8  # responses judged at a time

Answer = Literal["yes-no", "wildguard"]


class Frame(Protocol):
    """Writes the judge prompt round a prompt and a response."""

    adds_special: bool  # whether the tokenizer must add its own first token

    def __call__(self, prompt: str, response: str) -> str: ...


class ChatTemplate:
    """A tokenizer's chat template, tried out once.

    Templates take the content of a turn as a string or as a list of parts, and one given the
    other kind may silently leave the text out. So both are tried on probes, and the first that
    shows both probes exactly once is used.

    Raises:
        JudgeError: there is no chat template, or neither form shows the conversation.
    """

    adds_special = False  # the template writes them

    def __init__(self, tokenizer: Any, name: str) -> None:
        if tokenizer.chat_template is None:
            raise JudgeError(
                f"{name} has no chat template: give its prompt from the model card in a file "
                "(prompt-file:NAME#FILE)"
            )
        self._tokenizer = tokenizer
        problem: Exception | None = None
        for self._parts in (False, True):
            try:
                shown = self(*PROBES)
            except Exception as error:  # templates raise errors of their own kinds
                problem = error
                continue
            if all(shown.count(probe) == 1 for probe in PROBES) and "'type'" not in shown:
                return
        raise JudgeError(
            f"the chat template of {name} does not show a prompt and its response"
        ) from problem

    def __call__(self, prompt: str, response: str) -> str:
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._parts else text}
            for role, text in (("user", prompt), ("assistant", response))
        ]
        shown: str = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return shown


class PromptFrame:
    """A judge prompt from a file with the placeholders ``{prompt}`` and ``{response}``.

    Raises:
        DataError: the file cannot be read, or lacks a placeholder.
    """

    adds_special = True

    def __init__(self, path: Path) -> None:
        self.text = read_utf8(path, "the judge prompt")
        for slot in PLACEHOLDERS:
            if slot not in self.text:
                raise DataError(f"the judge prompt {path} has no placeholder {slot}")

    def __call__(self, prompt: str, response: str) -> str:
        # In one pass, so that a placeholder inside a text is not filled in its turn.
        texts = dict(zip(PLACEHOLDERS, (prompt, response), strict=True))
        slots = "|".join(map(re.escape, PLACEHOLDERS))
        return re.sub(slots, lambda slot: texts[slot[0]], self.text)


@dataclass(frozen=True)
class GuardParts:
    """A causal language model and its tokenizer, and where they came from."""

    model: Any
    tokenizer: Any
    name: str


def load_guard(name: str, dtype: str = "auto", device: str = "auto") -> GuardParts:
    """Load a guard model from a folder or a hub name (network only if not a folder).

    Args:
        dtype: one of ``loading.DTYPES``, or "auto": the checkpoint's, but
            float32 for float16 on a CPU.
        device: for example "cuda". "auto": CUDA, else MPS, else the CPU.

    Raises:
        JudgeError: it cannot be loaded, weights are missing (they would be random), or there is no
            such dtype or device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vlm_safeguard.model.loading import on_device, torch_device, torch_dtype

    try:
        wanted, place = torch_dtype(dtype), torch_device(device)
    except ModelError as error:
        raise JudgeError(f"the guard model {name}: {error}") from error
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise JudgeError(f"there is no model folder {name}")
    source = str(folder) if local else name
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, output_loading_info=True, **options
        )
    except Exception as error:  # transformers, safetensors and json each raise their own kinds
        reason = str(error).strip().splitlines()
        raise JudgeError(
            f"cannot load the guard model {name}: {reason[0] if reason else type(error).__name__}"
        ) from error
    missing = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
    if missing:
        raise JudgeError(
            f"{name} lacks weights of a causal language model ({missing[0]} and others): "
            "its weights would be random"
        )
    try:
        model = on_device(model, wanted, place)
    except RuntimeError as error:  # the device lacks memory, for example
        why = str(error).partition("\n")[0]
        raise JudgeError(f"cannot move the guard model {name} to {device!r}: {why}") from error
    return GuardParts(model.eval(), tokenizer, name)


class GuardModelJudge:
    """A guard model, its frame and the reading of its answers. Greedy, in left-padded batches.

    Args:
        parts: Model and tokenizer.
        frame: Writes the judge prompt.
        read: Reads the model's answer.
        asks: What the verdict is about (see ``judgement.Asks``).
        max_new_tokens: Tokens of the answer.
        batch: Responses judged at a time.

    Raises:
        JudgeError: the tokenizer has neither a padding nor an end token.
    """

    def __init__(
        self,
        parts: GuardParts,
        frame: Frame,
        read: parse.Parser,
        asks: Asks,
        *,
        max_new_tokens: int = 32,
        batch: int = BATCH,
    ) -> None:
        self.name = parts.name
        self.asks: Asks = asks
        self._parts, self._frame, self._read = parts, frame, read
        self._new, self._batch = max_new_tokens, batch
        tokenizer = parts.tokenizer
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise JudgeError(
                f"the tokenizer of {parts.name} has no padding token: set pad_token in its "
                "tokenizer_config.json"
            )
        self._pad = tokenizer.pad_token_id
        if self._pad is None:
            self._pad = tokenizer.eos_token_id
        stops = parts.model.generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
        bare = frame(*PROBES)
        self._marks = marks_of(bare, PROBES)
        # Tokens made of white space are ordinary text in some tokenizers.
        added = {token: id for token, id in tokenizer.get_added_vocab().items() if token.strip()}
        ids = {*added.values(), *tokenizer.all_special_ids}
        # Nor does an unknown character control anything, where it has a token of its own.
        if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            ids.discard(tokenizer.unk_token_id)
        self._control = ControlTokens(frozenset(added), frozenset(ids))
        self._allowed = self._control.count(self._tokens(bare))

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement for each (prompt, response).

        Unscored: an answer out of the model's format, a conversation longer than the model's
        context, one that its template changes, or one that leaves a control token standing.
        """
        return screened(pairs, self._ask, self.asks)

    def render(self, prompt: str, response: str) -> str:
        """The judge prompt, with the marks inside ``prompt`` and ``response`` broken."""
        return self._frame(self._safe(prompt), self._safe(response))

    def _safe(self, text: str) -> str:
        # Tokenizers cannot encode lone surrogates; templates strip what surrounds a text.
        text = text.encode("utf-8", "replace").decode("utf-8").strip()
        return disarm(self._control.broken(text), self._marks)

    def _tokens(self, rendered: str) -> list[int]:
        tokenizer, special = self._parts.tokenizer, self._frame.adds_special
        if special and tokenizer.bos_token and rendered.startswith(tokenizer.bos_token):
            special = False
        ids: list[int] = tokenizer(rendered, add_special_tokens=special)["input_ids"]
        return ids

    def _prepare(self, prompt: str, response: str) -> list[int] | Judgement:
        """Token ids of the judge prompt, or why there are none."""
        rendered = self.render(prompt, response)
        if any(self._safe(text) not in rendered for text in (prompt, response)):
            return unscored("the judge's chat template changes this prompt or response")
        ids = self._tokens(rendered)
        if self._control.count(ids) != self._allowed:
            return unscored("a control token of the judge survives in this prompt or response")
        config = self._parts.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and len(ids) + self._new > limit:
            return unscored(
                f"{len(ids)} tokens and {self._new} for the answer exceed the judge's {limit}"
            )
        return ids

    def _ask(self, pairs: list[Pair]) -> list[Judgement]:
        prepared = [self._prepare(*pair) for pair in pairs]
        found = {i: item for i, item in enumerate(prepared) if isinstance(item, Judgement)}
        ready = {i: item for i, item in enumerate(prepared) if not isinstance(item, Judgement)}
        order = sorted(ready, key=lambda i: -len(ready[i]))  # a lack of memory shows at once
        groups = [order[n : n + self._batch] for n in range(0, len(order), self._batch)]
        for group in groups:
            answers = self._generate([ready[i] for i in group])
            found |= {i: self._read(said) for i, said in zip(group, answers, strict=True)}
        return [found[i] for i in range(len(pairs))]

    def _generate(self, rows: list[list[int]]) -> list[str]:
        """Greedy answers to token ids of different lengths."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        padded = partial(pad_sequence, batch_first=True, padding_side="left")
        ids = padded([torch.tensor(row) for row in rows], padding_value=self._pad)
        mask = padded([torch.ones(len(row), dtype=torch.long) for row in rows])
        device = self._parts.model.get_input_embeddings().weight.device
        with torch.inference_mode():
            out = self._parts.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self._new,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._pad,
            )
        answers = []
        for row in out[:, ids.shape[1] :].tolist():
            stop = next((n for n, token in enumerate(row) if token in self._ends), len(row))
            answers.append(self._parts.tokenizer.decode(row[:stop], skip_special_tokens=True))
        return answers


def llama_guard(name: str, *, batch: int = BATCH, **place: str) -> GuardModelJudge:
    """Llama Guard 1 to 4. ``LlamaGuard-7b`` finds a third of HarmBench's jailbreaks: validate.

    ``place``: ``dtype`` and ``device``, see ``load_guard``; likewise for the judges below.

    Raises:
        JudgeError: the model cannot be loaded or has no chat template.
    """
    parts = load_guard(name, **place)
    frame = ChatTemplate(parts.tokenizer, name)
    return GuardModelJudge(parts, frame, parse.llama_guard, "harm", batch=batch)


def qwen3guard(
    name: str,
    *,
    asks: Asks = "harm",
    controversial: parse.Reading = "unsafe",
    batch: int = BATCH,
    **place: str,
) -> GuardModelJudge:
    """Qwen3Guard-Gen. ``asks`` and ``controversial`` as in ``parse.qwen3guard``.

    Raises:
        JudgeError: the model cannot be loaded or has no chat template.
    """
    parts = load_guard(name, **place)
    frame = ChatTemplate(parts.tokenizer, name)
    read = partial(parse.qwen3guard, asks=asks, controversial=controversial)
    judge = GuardModelJudge(parts, frame, read, asks, max_new_tokens=96, batch=batch)
    if controversial == "safe" and asks == "harm":  # other verdicts, another judge
        judge.name += ", controversial counted as safe"
    return judge


def prompt_file(
    name: str,
    file: Path,
    *,
    answer: Answer = "yes-no",
    asks: Asks = "harm",
    batch: int = BATCH,
    **place: str,
) -> GuardModelJudge:
    """A guard model whose prompt is in ``file``: HarmBench's classifiers, or WildGuard.

    Raises:
        DataError: the file cannot be read or lacks a placeholder.
        JudgeError: the model cannot be loaded, or a model that only says yes or no is asked for
            refusals.
    """
    if answer == "yes-no" and asks == "refusal":
        raise JudgeError("a model that says yes or no judges harm, not refusal")
    frame = PromptFrame(file)
    parts = load_guard(name, **place)
    read = parse.yes_no if answer == "yes-no" else partial(parse.wildguard, asks=asks)
    new = 4 if answer == "yes-no" else 32
    judge = GuardModelJudge(parts, frame, read, asks, max_new_tokens=new, batch=batch)
    # Another prompt, or another reading of the answer, gives other verdicts.
    digest = hashlib.sha256(frame.text.encode()).hexdigest()[:8]
    judge.name += f" with {file.name} ({digest})"
    if answer != "yes-no":
        judge.name += f", read as {answer}"
    return judge
