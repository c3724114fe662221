"""An inspect_ai model provider for VLMs under a defence, with pictures.

inspect's own Hugging Face provider refuses pictures and knows no guard. This one takes the model
as its name and the defence as arguments:

    inspect eval vlm_safeguard/own_malicious --model vlm-safeguard/embedded \
        -M defence=guard -M guard=FOLDER -T setting=blank

An attack, where one is given, is put on before the defence; inspect's sample keeps the original.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from inspect_ai.model import (
    ChatMessage,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelInfo,
    ModelOutput,
    ModelUsage,
    StopReason,
    set_model_info,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from vlm_safeguard.calibration.generation import Response
from vlm_safeguard.data.image_io import open_image
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.attacks import make_attack
from vlm_safeguard.evaluation.defenses import make_defence
from vlm_safeguard.evaluation.harness.engine import engine
from vlm_safeguard.evaluation.harness.results_page import PREFIX
from vlm_safeguard.evaluation.harness.waiting import answer_of
from vlm_safeguard.model.fingerprint import template_digest
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.weights import weights_digest

MAX_TOKENS = 32
BATCH = 32
DATA_URI = "data:"


class VlmSafeguardAPI(ModelAPI):
    """Greedy answers of a VLM under one defence.

    Args:
        model_name: ``embedded``, a folder, or a hub name.
        defence: one of ``vlm_safeguard.evaluation.defenses.DEFENCES``.
        guard: folder of the guard, for the defences that need one.
        defence_text: file with the exact wording of a prompt-based defence.
        attack: its name (see ``vlm_safeguard.evaluation.attacks``).
        batch: rows generated together.
        workers: processes of Ray that answer; 0 answers in this one.
        vllm: whether vLLM answers.
        options: fields of ``LoadOptions``, such as dtype and device.

    Raises:
        DataError: an unknown argument, defence or attack.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (inspect's own signature)
        defence: str = "none",
        guard: str | None = None,
        defence_text: str | None = None,
        attack: str | None = None,
        batch: int = BATCH,
        workers: int = 0,
        vllm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        known = [field.name for field in fields(LoadOptions)]
        if unknown := options.keys() - known:
            raise DataError(
                f"unknown model argument {', '.join(sorted(unknown))}: known are defence, guard, "
                f"defence_text, attack, batch, workers, vllm, {', '.join(known)}"
            )
        self.defence = make_defence(defence, guard, defence_text)
        self.attack = make_attack(attack) if attack else None
        # inspect looks it up for every model; where it finds none, it makes the provider once more,
        # with other arguments, which would load the model a second time.
        set_model_info(PREFIX + model_name, ModelInfo())
        self.workers = int(workers)
        self.engine = engine(model_name, LoadOptions(**options), int(batch), self.workers, vllm)
        loaded = self.engine.loaded
        # Every response is kept with what made it.
        self.provenance = {
            "defence": self.defence.name,
            "model_sha256": weights_digest(loaded.model),
            "template_sha256": template_digest(loaded.processor),
            "guard_sha256": self.defence.guard.config.tensors_sha256 if self.defence.guard else "",
        }

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One greedy answer to one user turn with at most one picture."""
        if tools:
            raise DataError("the vlm-safeguard provider does not support tools")
        if config.temperature:
            raise DataError("the vlm-safeguard provider decodes greedily: leave temperature out")
        request = read_request(input)
        if self.attack is not None:
            request = self.attack(request)
        answer = self.engine.submit(
            Query(self.defence.reword(request.text), request.image),
            self.defence.guard,
            config.max_tokens or MAX_TOKENS,
        )
        return self._output(await answer_of(answer))

    def _output(self, said: Response) -> ModelOutput:
        stop: StopReason = "max_tokens" if said.truncated else "stop"
        output = ModelOutput.from_content(self.model_name, said.text, stop)
        output.usage = ModelUsage(output_tokens=said.tokens, total_tokens=said.tokens)
        output.metadata = self.provenance | {"fired": said.fired, "score": said.score}
        return output

    def max_tokens(self) -> int | None:
        """Enough to tell a refusal from an answer."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """Several batches, so that the engine can sort requests by length."""
        return 8 * self.engine.batch * max(1, self.workers)

    def connection_key(self) -> str:
        """Every defence fills batches of its own."""
        return f"{self.model_name}/{self.defence.name}"


def read_request(messages: Sequence[ChatMessage]) -> Query:
    """The one user turn of ``messages``: its text, and its picture if it has one.

    Raises:
        DataError: another number or kind of turns, several pictures, or a picture elsewhere than
            in the message itself.
        ImageError: the picture is damaged.
    """
    if len(messages) != 1 or not isinstance(messages[0], ChatMessageUser):
        raise DataError("the vlm-safeguard provider answers single user turns")
    content = messages[0].content
    parts = [ContentText(text=content)] if isinstance(content, str) else content
    words = [part.text for part in parts if isinstance(part, ContentText)]
    pictures = [part.image for part in parts if isinstance(part, ContentImage)]
    if len(words) + len(pictures) != len(parts) or len(pictures) > 1:
        raise DataError("a request is text with at most one picture")
    return Query("\n".join(words), open_image(_bytes(pictures[0])) if pictures else None)


def _bytes(uri: str) -> bytes | str:
    """What a data URI holds; a path stays as it is, and an address is refused."""
    if uri.startswith(DATA_URI):
        try:
            return base64.b64decode(uri.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise DataError("a picture's data URI is not valid base64") from error
    if "://" in uri:
        raise DataError("pictures are never downloaded: give a local file")
    return uri
