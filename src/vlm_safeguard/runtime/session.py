"""The session of an attached guard, and the state machine of a request.

``generate`` starts a request with its whole prompt. The text-only pass runs first (``TextPass``).
Then each forward call of the model is a pass (``PromptPass``, ``DecodePass``). Outside of
``generate``, a forward call without a cache starts a request. Between calls there is no pass, and a
guarded layer that runs raises an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor

from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.model.kv_cache import cache_given
from vlm_safeguard.model.picture_inputs import picture_inputs, usual_inputs
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.shared_prefix import SharedPrefix
from vlm_safeguard.model.text_only import rows_of, with_pictures
from vlm_safeguard.model.text_reader import TextReader
from vlm_safeguard.model.words import with_probe
from vlm_safeguard.runtime import media, prompt_inputs, validation
from vlm_safeguard.runtime.attestation import Attestation, Decision, attest, decisions_of
from vlm_safeguard.runtime.compiling import uncompiled, untraced
from vlm_safeguard.runtime.forward_pass import ForwardPass, TextPass, begin_pass
from vlm_safeguard.runtime.further_readings import FurtherReadings, find_readings
from vlm_safeguard.runtime.gate import Gates
from vlm_safeguard.runtime.hooks import Hooks
from vlm_safeguard.runtime.owner_thread import OwnerThread
from vlm_safeguard.runtime.request import Request
from vlm_safeguard.runtime.steering import NoSteering, Steerer
from vlm_safeguard.runtime.streams import end_of_caller, ended_on_error


class _OfThread(threading.local):
    """What a session keeps for each thread."""

    called = False
    request: Request | None = None
    reported: Request | None = None


class Session:
    """A guard on a model, from ``Guard.attach`` until ``detach`` or the end of its ``with`` block.

    Threads take turns: a call waits until the model is free. ``decisions`` and ``attestation``
    describe the last request of the thread that reads them. A thread that made none may read those
    of another, as long as all requests come from that one.
    """

    def __init__(
        self,
        config: GuardConfig,
        tensors: dict[str, Tensor],
        model: Any,
        processor: Any = None,
        monitor: bool = False,
    ) -> None:
        """Attach the guard. If this fails, the model is left as it was.

        Args:
            processor: the model's. Without it, text gates read a request only as it stands, and
                which inputs pictures need is known by the names of the usual ones.
            monitor: gates decide, and nothing is steered.

        Raises:
            GuardError: a guard is attached already, a part of the model is compiled, or the guard
                reads sentences and there is no processor.
        """
        self.config, self.model = config, model
        decoder = find_decoder(model)
        self._gates = Gates(config.gates, tensors)
        steerer = NoSteering if monitor else Steerer
        self._steerer = steerer(config.steering, tensors, bool(self._gates.layers("text")))
        self._reads_text = bool(self._gates.layers("text") | self._steerer.reads_text)
        known = processor is not None
        if config.reads_sentences and not known:
            raise GuardError(
                "this guard reads each sentence of a request, for which it needs the processor: "
                "guard.attach(model, processor)"
            )
        reads_words = known and self._gates.layers("text")
        self._reader = TextReader(processor) if reads_words else None
        self._layers = sorted(
            self._gates.layers("text") | self._gates.layers("vlm") | self._steerer.layers
        )
        self._hooks, self._owner = Hooks(model, decoder), OwnerThread()
        needed = picture_inputs(model, processor) if known else usual_inputs(model)
        self._picture_inputs = needed
        self._other_tokens = media.other_tokens(model)
        self._adapters = validation.adapters(model)
        self._in_generate = False
        self._mine = _OfThread()
        self._last: Request | None = None  # the last one reported, of any thread
        self._threads = 0  # that made a request
        self._pass: ForwardPass | None = None  # None: a guarded layer that runs refuses
        self._begin, self._finish = untraced(self._begin_call), untraced(self._end_call)
        self._hooks.reserve()
        try:
            # Before the hooks are on, because it runs the model.
            self._shared = SharedPrefix(model, processor) if known and self._reads_text else None
        except BaseException:
            self._hooks.take_off()
            raise
        self._hooks.put_on(
            self._generate,
            self._forward,
            self._check_prepared,
            {layer: self._layer_hook(layer) for layer in self._layers},
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Detach the guard and leave the model as it was. Detaching twice does nothing.

        A running call in another thread is waited for.

        Raises:
            GuardRuntimeError: called inside a guarded ``generate``.
        """
        if self._in_generate and self._owner.mine:
            raise GuardRuntimeError(
                "the guard cannot be detached inside its own generate: detach it when that has "
                "returned"
            )
        self._owner.take()
        try:
            self._pass = self._request = self._shared = None
            self._hooks.take_off()
        finally:
            self._owner.give_back()

    @property
    def decisions(self) -> list[Decision]:
        """One decision per row of the last request, in batch order; after ``generate`` one per
        returned sequence."""
        return [] if self._reported is None else decisions_of(self._reported)

    @property
    def attestation(self) -> Attestation | None:
        """What the guard did in the last request; None if no prompt was processed completely."""
        if self._reported is None:
            return None
        return attest(self._reported, tuple(self._layers))

    @property
    def passes(self) -> int:
        """Forward calls of the running request that came to their end under guard."""
        return 0 if self._request is None else self._request.calls.passes

    # A request belongs to the thread that began it: it may go on in a later turn.
    @property
    def _request(self) -> Request | None:
        return self._mine.request

    @_request.setter
    def _request(self, request: Request | None) -> None:
        self._mine.request = request

    @property
    def _reported(self) -> Request | None:
        """The last request whose prompt was read.

        Raises:
            GuardRuntimeError: it is not clear whose: this thread made none, and several others did.
        """
        if self._mine.called:
            return self._mine.reported
        if self._threads > 1:
            raise GuardRuntimeError(
                "this thread made no request, and several others did: read decisions and "
                "attestation in the thread that called the model"
            )
        return self._last

    @_reported.setter
    def _reported(self, request: Request | None) -> None:
        self._threads += not self._mine.called
        self._mine.called = True
        self._mine.reported = self._last = request

    # -- a request -------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` under guard: the request begins with the whole prompt."""
        with ended_on_error(*args, kwargs.get("streamer")):
            return self._guarded_generate(*args, **kwargs)

    def _guarded_generate(self, *args: Any, **kwargs: Any) -> Any:
        self._owner.take()
        if self._in_generate:
            raise GuardRuntimeError(
                "generate inside generate is not guarded: call it when the other has returned"
            )
        try:
            self._request = self._reported = None
            if not self._hooks.armed:
                raise GuardRuntimeError(
                    "this generate belongs to a guard that was detached: call model.generate"
                )
            if len(args) > 1:
                raise GuardRuntimeError("under guard, pass everything after the ids by keyword")
            text = prompt_inputs.take_text(kwargs)
            validation.check_settings(self.model, kwargs)
            media.check_not_encoded(kwargs)
            given = args[0] if args else kwargs.get("inputs")
            ids = given if given is not None else kwargs.get("input_ids")
            validation.check_padding_is_told(self.model, self.config, ids, kwargs, generating=True)
            request = self._begin_request(ids, kwargs, text, generating=True)
            validation.check_left_padded(request)
            self._in_generate = True
            output = self._hooks.generate(*args, **uncompiled(kwargs))
            self._hooks.check(of_layers=True)
            if not request.calls.passes:
                raise GuardRuntimeError("the guarded model did not run: the output is withheld")
            request.end(len(getattr(output, "sequences", output)))
            return output
        finally:
            self._in_generate, self._request, self._pass = False, None, None
            self._owner.give_back()

    def _begin_request(
        self,
        ids: Tensor | None,
        options: dict[str, Any],
        text: tuple[Tensor, Tensor] | None,
        *,
        generating: bool = False,
    ) -> Request:
        """Start a request with its whole prompt, and run the text-only pass.

        ``text``: ids and mask of the request as text, if the caller passed them. ``generating``:
        whether ``options`` are those of ``generate``.
        """
        validation.check_adapters(self.model, self._adapters)
        media.check_only_pictures(self._other_tokens, ids, options)
        media.check_picture_inputs(self._picture_inputs, self.config.markup, ids, options)
        if self.config.reads_pictures and text is None:
            media.check_no_unread_picture(self.config.markup, ids, options)
        request, mask = prompt_inputs.begin(
            self.config,
            ids,
            options.get("attention_mask"),
            options.get("inputs_embeds"),
            self._reads_text and text is None,
        )
        validation.check_not_packed(options, mask)
        new = validation.new_tokens(self.model, options, mask.shape[1]) if generating else 0
        validation.check_length(self.model, ids, mask, self.config.markup, new=new)
        if self._reads_text:
            if text is None:
                text = prompt_inputs.derive_text(
                    self.model, self.config.markup, ids, mask, options.get("inputs_embeds")
                )
            validation.check_rows(request, text)
            self._read_text(request, ids, *text)
        self._request = request
        return request

    def _read_text(
        self, request: Request, prompt: Tensor | None, ids: Tensor, mask: Tensor
    ) -> None:
        """Run the text-only pass, and others over further readings of the text. Where there is a
        canonical form, the text's verdict is on that.

        ``prompt``: ids (B, T) of the whole prompt. ``ids``, ``mask`` (B, T'): of its text.
        """
        further = FurtherReadings()
        if self._reader is not None:
            pictured = with_pictures(prompt, self.config.markup, request.rows)
            further = find_readings(
                self._reader, rows_of(ids, mask), pictured, self.config.reads_sentences
            )
        request.wordless = frozenset(further.wordless)
        request.verdictless = frozenset(reading.row for reading in further.canonical)
        self._text_pass(request, ids, mask, "the request as text")
        for rows, part, batch in further.batches(request, ids, self.config.markup.pad_id):
            # NFKC may make it longer.
            self._text_pass(part, *batch, "a further reading of the request's text")
            request.take_worse(rows, part)

    def _text_pass(self, request: Request, ids: Tensor, mask: Tensor, told: str) -> None:
        if self.config.probe:
            text = with_probe({"input_ids": ids, "attention_mask": mask}, self.config.probe)
            ids, mask = text["input_ids"], text["attention_mask"]
            told += " with the guard's probe behind it"
        validation.check_length(self.model, ids, mask, self.config.markup, told)
        self._pass = reading = TextPass(
            request, self._layers, self._gates, self._steerer, self._shared, self.config.frame
        )
        try:
            reading.run(self.model, self._hooks.forward, ids, mask)
        finally:
            self._pass = None

    # -- a forward call --------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model.forward`` under guard: one pass, whose output is withheld unless it is whole."""
        if not self._hooks.armed:  # kept by somebody, or in compiled code
            return self._hooks.forward(*args, **kwargs)
        self._owner.take()
        if not self._hooks.armed:
            self._owner.give_back()
            raise GuardRuntimeError(
                "the guard was detached while this call waited for its turn: call it again, now "
                "without a guard, or attach one first"
            )
        if self._pass is not None:
            raise GuardRuntimeError("the model's forward ran inside its own forward")
        whole = False
        try:
            self._begin(args, kwargs)
            output = self._hooks.forward(*args, **kwargs)
            self._finish(output)
            whole = True
            return output
        finally:
            self._pass = None
            if not whole:
                self._request = None
            if not self._in_generate:
                self._owner.give_back()

    def _begin_call(self, args: tuple, kwargs: dict) -> None:
        """Begin the pass of a forward call, and a request if the call holds a whole prompt. Takes
        out of ``kwargs`` what is for the guard alone."""
        cache = cache_given(kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        begins = not self._in_generate and past == 0
        if begins:
            self._request = self._reported = None
        self._hooks.check()
        if len(args) > 1:
            raise GuardRuntimeError("under guard, pass everything after input_ids by keyword")
        ids = kwargs.get("input_ids", args[0] if args else None)
        current = ids if ids is not None else kwargs.get("inputs_embeds")
        if current is None:
            raise GuardRuntimeError(
                "a forward call without input_ids cannot be guarded: pass them, or inputs_embeds "
                "with the request as text in text_input_ids"
            )
        text = prompt_inputs.take_text(kwargs)
        validation.check_not_packed(kwargs)
        if not self._in_generate:  # there they are its own: it encodes the pixels itself
            media.check_not_encoded(kwargs)
        if begins:
            validation.check_padding_is_told(self.model, self.config, ids, kwargs, generating=False)
            self._begin_request(ids, kwargs, text)
        elif text is not None:
            raise GuardRuntimeError("text_input_ids belong to the first call of a request")
        rows, length = current.shape[:2]
        columns = range(past, past + length)
        request = validation.carry_on(self._request, cache, rows, columns, self._in_generate)
        validation.check_prompt_in_parts(self.config, request, columns)
        self._pass = begin_pass(request, self._layers, columns, self._gates, self._steerer)

    def _end_call(self, output: Any) -> None:
        """End the pass of a forward call, or withhold its output."""
        current = self._pass
        if current is None:
            raise GuardRuntimeError("the guard was detached during a forward call")
        try:
            current.finish(output)
        except GuardRuntimeError:
            self._reported = None
            raise
        if current.reads_prompt:
            self._reported = current.request

    def _check_prepared(self, options: Mapping[str, Any]) -> None:
        """Refuse a ``generate`` that went round ours: nobody looked at its settings and prompt."""
        if not self._in_generate or not self._owner.mine:
            end_of_caller()
            raise GuardRuntimeError(
                "this generate bypasses the guard (it is the class's own, or was stored before the "
                "guard was attached): call model.generate"
            )
        if options.get("is_first_iteration") and self._request and self._request.decided:
            end_of_caller()
            raise GuardRuntimeError(
                "generate inside generate is not guarded: call it when the other has returned"
            )

    def _layer_hook(self, layer: int) -> Callable[[Any], Tensor | None]:
        def see(output: Any) -> Tensor | None:
            current = self._pass
            if current is None:
                raise GuardRuntimeError(
                    "the decoder ran outside the guarded model's forward call: call the whole "
                    "model, or detach the guard first"
                )
            return current.visit(layer, output)

        def see_first(output: Any) -> Tensor | None:
            if not self._owner.mine and self._hooks.armed:  # another thread: the pass is not its
                raise GuardRuntimeError(
                    "the decoder ran outside the guarded model's forward call: call the whole "
                    "model, or detach the guard first"
                )
            return see(output)

        # A pass that the first layer lets through is the model's own; asking everywhere costs.
        return see_first if layer == self._layers[0] else see
