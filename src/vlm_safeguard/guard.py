"""The ``Guard`` class: load, save, share and attach a calibrated guard."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from vlm_safeguard.artifact import hub, serialization
from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.artifact.guard_folder import GuardFolder, expanded, write_folder
from vlm_safeguard.artifact.model_card import CARD_FILE, card
from vlm_safeguard.artifact.serialization import CONFIG_FILE, TENSOR_FILE
from vlm_safeguard.errors import GuardError
from vlm_safeguard.model.chat import prepare
from vlm_safeguard.model.chat_template import find_template
from vlm_safeguard.model.fingerprint import config_digest, dtype_name, template_digest
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.text_only import find_markup
from vlm_safeguard.model.weights import quantised, weights_digest
from vlm_safeguard.runtime.gate import gate_class
from vlm_safeguard.runtime.session import Session
from vlm_safeguard.runtime.steering import Steerer, mode_class

_EXACT = (torch.float32, torch.bfloat16)  # in which the digest of the weights is the same


class Guard:
    """A calibrated guard: load it with ``from_pretrained``, use it with ``attach``.

    Attributes:
        config: the settings, as in ``guard.json``.
        tensors: float32. For each steered layer ``directions.{l}`` (m, d) and ``anchor.{l}`` (m,),
            the mean coordinates of the harmful anchors; with ``later`` "refusal" also
            ``refusal.{l}`` (tokens - 1, m), those behind each token of the LLM's refusals of them.
            For each gate ``gate.{i}`` (n, d), its vectors.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` take the arguments of
    ``huggingface_hub.ModelHubMixin`` that apply to a guard. The class does not inherit the mixin,
    because the mixin requires a ``config.json``, takes every name that is not a folder for a
    repository on the hub, and downloads files of any size.
    """

    def __init__(self, config: GuardConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors
        serialization.check_tensors(tensors, config)
        mode_class(config.steering.mode)
        for gate in config.gates:
            gate_class(gate.kind)

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def from_bytes(cls, settings: bytes, tensors: bytes) -> Guard:
        """A guard from the contents of ``guard.json`` and ``guard.safetensors``.

        Raises:
            GuardError: the guard breaks a rule of ``docs/guard-format.md``.
        """
        files = {CONFIG_FILE: settings, TENSOR_FILE: tensors}

        def fetch(name: str, limit: int) -> bytes:
            if len(files[name]) > limit:
                raise GuardError(f"{name} is larger than the {limit} bytes allowed")
            return files[name]

        return cls(*serialization.read(fetch))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        endpoint: str | None = None,
    ) -> Guard:
        """Load a guard and check all of it: schema, digest, shapes, finite values.

        Args:
            pretrained_name_or_path: a folder, "owner/name" of a repository on the hub, or
                "embedded": the guard that ships for the embedded VLM. An existing folder or a
                ``Path`` is never looked up on the hub.
            revision: branch, tag or commit on the hub. A commit pins the guard.
            token: access token of the hub; by default that of ``hf auth login``.
            cache_dir: folder for downloaded files.
            force_download: download again what is in the cache.
            local_files_only: use the cache only, without network access.
            endpoint: address of the hub; by default ``HF_ENDPOINT``.

        Raises:
            GuardError: the guard is missing, damaged, changed or of another schema version, or the
                hub does not give it.
        """
        name = os.fspath(pretrained_name_or_path)
        folder = expanded(name)
        if not os.path.lexists(folder):
            from vlm_safeguard.embedded.assemble import guard_folder

            folder = guard_folder(folder)
        local = isinstance(pretrained_name_or_path, Path) or os.path.lexists(folder)
        if not local and hub.is_repository(name):
            repository = hub.Repository(
                name, revision, token, cache_dir, force_download, local_files_only, endpoint
            )
            fetch = repository.read
        else:
            if revision is not None:
                raise GuardError(
                    f"{name} is a path, and only a repository on the hub has revisions: leave "
                    "revision out"
                )
            fetch = GuardFolder(folder).read
        try:
            return cls(*serialization.read(fetch))
        except GuardError as error:
            raise GuardError(f"cannot load the guard {name}: {error}") from error

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        base_model: str | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write both files and the card.

        Each file is written completely or not at all. A ``README.md`` that is not a generated card
        is kept.

        Args:
            save_directory: folder, created if missing.
            push_to_hub: also push the guard. ``push_to_hub`` lists the further arguments.
            repo_id: repository to push to; by default the folder's name.
            base_model: hub name of the guarded model, for the card.

        Returns:
            The address of the commit if pushed, else None.

        Raises:
            GuardError: the mode is ``erase`` (an ablation that weakens the model), the calibration
                record holds NaN or Inf or exceeds a limit, the folder cannot be written, or the
                hub refuses the push.
        """
        target = Path(save_directory)
        if not push_to_hub and (repo_id is not None or push_to_hub_kwargs):
            raise GuardError("repo_id and other arguments of push_to_hub need push_to_hub=True")
        write_folder(target, self._render(base_model, repo_id))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or target.resolve().name, base_model=base_model, **push_to_hub_kwargs
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push a guard of vlm-safeguard",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        base_model: str | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Push both files and the card to the hub in one commit.

        Args:
            repo_id: "owner/name", or a name under your own account. Created if it does not exist.
            commit_message: message of the commit.
            private: whether a new repository is private.
            token: access token with write permission; by default that of ``hf auth login``.
            branch: existing branch; by default the main one.
            create_pr: open a pull request instead of writing to the branch.
            base_model: hub name of the guarded model, for the card.
            endpoint: address of the hub; by default ``HF_ENDPOINT``.

        Returns:
            The address of the commit.

        Raises:
            GuardError: the guard cannot be saved (see ``save_pretrained``), or the hub refuses it
                or does not answer.
        """
        return hub.push(
            repo_id,
            self._render(base_model, repo_id),
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            endpoint=endpoint,
        )

    def _render(self, base_model: str | None, repo_id: str | None) -> dict[str, bytes]:
        """Every file by name. Tensors come first: an incomplete write then fails the digest."""
        self.config, settings, blob = serialization.render(self.config, self.tensors)
        page = card(self.config, base_model=base_model, repo_id=repo_id)
        return {TENSOR_FILE: blob, CONFIG_FILE: settings, CARD_FILE: page.encode()}

    # -- use -----------------------------------------------------------------------------------

    def check_model(self, model: Any, processor: Any = None) -> None:
        """Check that this guard was calibrated on ``model``.

        Args:
            processor: the model's processor. If given, its chat template and the tokens it writes
                around pictures are compared too.

        Raises:
            GuardError: the size, configuration, weights, dtype, chat template or image tokens
                differ, or the model lacks the guard's padding token. The message says which.
        """
        decoder, own = find_decoder(model), self.config.model
        if (decoder.hidden_size, len(decoder.layers)) != (own.hidden_size, own.layers):
            raise GuardError(
                f"this guard is for {own.name} ({own.layers} layers of {own.hidden_size}), the "
                f"model has {len(decoder.layers)} layers of {decoder.hidden_size}"
            )
        if config_digest(model) != own.config_sha256:
            raise GuardError(
                f"this guard is for {own.name}: the model's configuration differs (vocabulary, "
                "attention heads, rope, vision tower or the like). Load the model that it was "
                "calibrated on, or calibrate on this one"
            )
        if weights_digest(model) != own.weights_sha256:
            raise GuardError(
                f"this guard is for {own.name}{_revision(own.revision)}: the model's weights "
                f"differ{_dtype_hint(model)}. A guard belongs to the weights it was calibrated on, "
                "of one revision; run `vlm-safeguard calibrate` on these"
            )
        if own.dtype and dtype_name(model) != own.dtype:
            raise GuardError(
                f"this guard is for {own.name} in {own.dtype}, and the model is in {model.dtype}: "
                "its thresholds were set on states of that type. Load the model with "
                f'dtype="{own.dtype}" (--dtype {own.dtype}), or calibrate on this one'
            )
        known = len(model.get_input_embeddings().weight)
        openings = [token for gate in self.config.gates for token in gate.openings]
        used = {
            "pads with token {}": self.config.markup.pad_id,
            "reads the probability of token {}": max(openings, default=0),
            "adds token {} to a text": max(self.config.probe, default=0),
        }
        for use, token in used.items():
            if token >= known:
                raise GuardError(
                    f"this guard {use.format(token)}, and the model has only {known} tokens: its "
                    "guard.json was changed, calibrate again"
                )
        if processor is not None and own.template_sha256:
            self._check_template(processor)
            self._check_markup(model, processor)

    def _check_template(self, processor: Any) -> None:
        if find_template(processor) is None:
            raise GuardError(
                f"this guard is for {self.config.model.name}: the processor has no chat template"
            )
        if template_digest(processor) != self.config.model.template_sha256:
            raise GuardError(
                f"this guard is for {self.config.model.name}: the chat template differs, so its "
                "gates would read other prompts than those it was calibrated on. Load the "
                "processor of the same revision, or calibrate with this one"
            )

    def _check_markup(self, model: Any, processor: Any) -> None:
        """Compare the image tokens: one model and template can be used with several image
        processors (tiles or none), which write different tokens."""
        name, own = self.config.model.name, self.config.markup
        found = find_markup(LoadedModel(model, processor, name))
        if found.model_dump(exclude={"pad_id"}) != own.model_dump(exclude={"pad_id"}):
            raise GuardError(
                f"this guard is for {name}: the processor writes other tokens around a picture, so "
                "its gates would take some of them for words. Load the processor of the same "
                "revision and settings, or calibrate with this one"
            )

    def prepare(self, processor: Any, messages: Sequence[Any]) -> BatchFeature:
        """Model inputs for chat messages, with several turns and pictures.

        Args:
            processor: the model's processor.
            messages: one conversation, or a list of them for a batch, in the chat format of
                transformers. A picture is ``{"type": "image", "image": PIL.Image}``.

        Returns:
            Tensors for ``generate``, left-padded, with ``to(device)``. If the guard reads the words
            in pictures, they include the conversation as text, which only a guarded model accepts.

        Raises:
            ImageError: a picture is no ``PIL.Image``, or is damaged, too large or too small.
            ModelError: a message has another format, its text writes a control token all the same,
                or the processor refuses the batch.
        """
        batch = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return BatchFeature(prepare(processor, batch, self.config.reads_pictures, "left"))

    def attach(self, model: Any, processor: Any = None, monitor: bool = False) -> Session:
        """Guard every ``generate`` and forward call of ``model`` from now on.

        Outside of ``generate``, a forward call without a cache starts a request and must contain
        the whole prompt. Later calls with its cache, one token at a time, are its answer.

        Code that ``torch.compile`` compiled before is compiled again, because it does not contain
        the hooks.

        Args:
            processor: the model's processor. If given, its chat template and the tokens it writes
                around pictures are checked too, and requests with pictures must have every input
                that it makes for them (without it, those of the usual ones that the model takes).
                Text gates also read the canonical form of a text (no invisible characters), and
                stay shut where a picture comes without words; a guard with text gates warns
                (``UserWarning``) where it has no processor for that, and one with
                ``reads_sentences`` needs it. The model runs once, over what its template writes
                before a user's words, so that text gates need not read that again.
            monitor: only watch: gates decide and are reported, and the model answers unguarded.

        Returns:
            A context manager that detaches the guard at the end of its ``with`` block. Without a
            ``with`` block, call ``session.detach()``. Detaching leaves the model as it was before,
            also after an exception.

        Raises:
            GuardError: the guard belongs to another model, or a guard is attached already.
        """
        self.check_model(model, processor)
        if processor is None and any(gate.source == "text" for gate in self.config.gates):
            warnings.warn(
                "this guard is attached without the model's processor, so its text gates read a "
                "request only as it stands: words in invisible or odd letters stay hidden, a "
                "picture without words is judged by its chat template, and the template itself "
                "is not compared. Use guard.attach(model, processor)",
                stacklevel=2,
            )
        return Session(self.config, self.tensors, model, processor, monitor)


def reads_pictures(guard: Guard | None) -> bool:
    """Whether ``guard`` needs the words in pictures; False without a guard."""
    return guard is not None and guard.config.reads_pictures


def reads_text(guard: Guard) -> bool:
    """Whether ``guard`` makes a text-only pass: for a gate, or for the coordinates it steers by."""
    from_text = any(gate.source == "text" for gate in guard.config.gates)
    steerer = Steerer(guard.config.steering, guard.tensors, from_text)
    return from_text or bool(steerer.reads_text)


def _revision(recorded: str) -> str:
    return f" of revision {recorded}" if recorded else ""


def _dtype_hint(model: Any) -> str:
    """A hint for the error if the dtype alone can make the weights differ."""
    if any(map(quantised, model.parameters())):
        return " (some are quantised: calibrate on the quantised model itself)"
    others = {parameter.dtype for parameter in model.parameters()} - set(_EXACT)
    if not others:
        return ""
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
    return f" (some are {names}; guards are recognised in float32 and bfloat16)"
