"""The page: a request at the top, both answers side by side, plots under them."""

from __future__ import annotations

import logging
from importlib.resources import files
from threading import Event as Flag

from nicegui import ui
from nicegui.events import UploadEventArguments
from PIL import Image

from vlm_safeguard.data.drawings import blank
from vlm_safeguard.data.image_io import LIMITS, decode_image
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import ImageError, SafeguardError
from vlm_safeguard.playground.answers import SIDES, Decided, Event, Side, SideDone, SideText
from vlm_safeguard.playground.desk import Desk
from vlm_safeguard.playground.examples import Example, examples
from vlm_safeguard.playground.svg import plot_map, plot_scores
from vlm_safeguard.playground.wording import verdict

logger = logging.getLogger(__name__)
TITLE = "VLM-Safeguard playground"
MAX_PROMPT = 2000  # characters
_TOO_LARGE = (
    f"The picture was not taken: at most {LIMITS.max_bytes // 10**6} MB, PNG, JPEG or WebP."
)
_THUMBNAIL = 360  # px
_CSS = (files("vlm_safeguard.playground") / "page.css").read_text()
_NOTES: dict[Side, str] = {
    "unguarded": "The model by itself. The guard only watches.",
    "guarded": "The same model and request, with the guard.",
}


class Page:
    """The page of one visitor."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._picture: Image.Image | None = None
        self._stopped = Flag()
        self._answers: dict[Side, ui.label] = {}
        self._ends: dict[Side, ui.label] = {}
        ui.add_css(_CSS)
        ui.context.client.on_delete(lambda: self._stopped.set())
        with ui.element("main").classes("page"):
            self._head()
            with ui.element("section").classes("card request"):
                self._request()
            self._examples()
            self._status = ui.label().classes("status").mark("status")
            with ui.element("section").classes("pair"):
                for side in SIDES:
                    self._answer_card(side)
            with ui.element("section").classes("pair"):
                self._plots()
            ui.label(
                "Unguarded answers can be harmful or wrong. Nothing leaves this machine."
            ).classes("note")

    # -- parts -----------------------------------------------------------------------------------

    def _head(self) -> None:
        with ui.element("header"):
            ui.html("VLM-Safeguard <span>playground</span>", tag="h1", sanitize=False)
            ui.label(f"Model: {self._desk.model} · Guard: {self._desk.guard}").classes("note")

    def _request(self) -> None:
        with ui.element("div").classes("picture"):
            with ui.element("div").classes("frame"):
                self._thumbnail = ui.image().props("no-spinner fit=contain").mark("thumbnail")
                self._caption = ui.label().classes("note caption").mark("caption")
            with ui.element("div").classes("buttons"):
                ui.button("None", on_click=self._take_none).props("flat dense no-caps")
                ui.button("Blank", on_click=self._take_blank).props("flat dense no-caps")
                self._upload = (
                    ui.upload(
                        auto_upload=True,
                        max_file_size=LIMITS.max_bytes,
                        on_upload=self._uploaded,
                        on_rejected=lambda: ui.notify(_TOO_LARGE, type="negative"),
                    )
                    .props('accept="image/png,image/jpeg,image/webp"')
                    .classes("hidden")
                )
                # In the browser: it opens its file dialog only right after a click.
                ui.button("Upload").props("flat dense no-caps").on(
                    "click", js_handler=f"() => getElement({self._upload.id}).pickFiles()"
                )
        with ui.element("div").classes("prompt"):
            self._prompt = (
                ui.textarea("Prompt")
                .props(f"outlined maxlength={MAX_PROMPT} input-style='min-height: 6.5rem'")
                .mark("prompt")
            )
            with ui.element("div").classes("buttons end"):
                self._stop_button = ui.button("Stop", on_click=lambda: self._stopped.set())
                self._stop_button.props("flat no-caps").mark("stop").set_enabled(False)
                self._ask_button = ui.button("Ask both", on_click=self._ask)
                self._ask_button.props("unelevated no-caps").mark("ask")
        self._show_picture(None, "No picture")

    def _examples(self) -> None:
        with ui.element("section").classes("examples"):
            ui.label("Examples").classes("note")
            for example in examples():
                button = ui.button(
                    example.title, on_click=lambda _, chosen=example: self._try(chosen)
                )
                button.props("outline dense no-caps").mark("example")

    def _answer_card(self, side: Side) -> None:
        with ui.element("article").classes(f"card {side}"):
            ui.label(side.capitalize()).classes("title")
            ui.label(_NOTES[side]).classes("note")
            self._answers[side] = ui.label().classes("answer").mark(side)
            self._ends[side] = ui.label().classes("note").mark(f"{side}-end")

    def _plots(self) -> None:
        with ui.element("article").classes("card"):
            ui.label("Gates").classes("title")
            ui.label(
                "Each score is shown less its threshold. A gate opens above 0. Gates have "
                "units of their own."
            ).classes("note")
            self._scores = ui.html(sanitize=False).classes("plot").mark("scores")
        with ui.element("article").classes("card"):
            ui.label("Hidden states").classes("title")
            ui.label(
                f"Calibration anchors and this request after layer {self._desk.anchors.layer}, "
                "on the anchors' two principal axes."
            ).classes("note")
            self._map = ui.html(plot_map(self._desk.anchors, None), sanitize=False)
            self._map.classes("plot").mark("map")

    # -- the picture -----------------------------------------------------------------------------

    def _show_picture(self, picture: Image.Image | None, caption: str) -> None:
        self._picture = picture
        self._caption.set_text(caption)
        self._thumbnail.set_visibility(picture is not None)
        if picture is not None:
            small = picture.copy()
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
            self._thumbnail.set_source(small)

    def _take_none(self) -> None:
        self._show_picture(None, "No picture")

    def _take_blank(self) -> None:
        self._show_picture(blank(), "Blank picture")

    async def _uploaded(self, event: UploadEventArguments) -> None:
        """Take the bytes of an upload; neither its name nor its declared type is used."""
        self._upload.reset()
        try:
            if event.file.size() > LIMITS.max_bytes:
                raise ImageError(_TOO_LARGE)
            picture = decode_image(await event.file.read())
        except ImageError as error:
            ui.notify(str(error), type="negative")
            return
        self._show_picture(picture, f"Your picture, {picture.width} × {picture.height} px")

    # -- a request -------------------------------------------------------------------------------

    async def _try(self, example: Example) -> None:
        if not self._ask_button.enabled:
            ui.notify("Stop the running request first.")
            return
        self._prompt.set_value(example.query.text)
        kind = "Blank picture" if "blank" in example.title else "Drawing of the example"
        self._show_picture(example.query.image, kind if example.query.image else "No picture")
        await self._ask()

    async def _ask(self) -> None:
        text = str(self._prompt.value or "").strip()
        if not text:
            ui.notify("Write a prompt first.", type="warning")
            return
        self._stopped = Flag()
        self._running(True)
        self._clear("Waiting for another request." if self._desk.busy else "Reading the request …")
        try:
            query = Query(text[:MAX_PROMPT], self._picture)
            async for event in self._desk.ask(query, self._stopped):
                self._show(event)
        except SafeguardError as error:
            self._failed(str(error))
        except Exception as error:
            # Anything may come out of a model. The page stays usable, the log has the cause.
            logger.exception("a request failed")
            self._failed(f"{type(error).__name__}; see the log")
        finally:
            self._running(False)

    def _running(self, running: bool) -> None:
        self._ask_button.set_enabled(not running)
        self._stop_button.set_enabled(running)

    def _clear(self, status: str) -> None:
        self._status.classes(remove="open shut failed").set_text(status)
        for side in SIDES:
            self._answers[side].set_text("")
            self._ends[side].set_text("")
        self._scores.set_content("")
        self._map.set_content(plot_map(self._desk.anchors, None))

    def _failed(self, message: str) -> None:
        self._status.classes(add="failed", remove="open shut").set_text(f"No answer: {message}")

    def _show(self, event: Event) -> None:
        if isinstance(event, SideText):
            label = self._answers[event.side]
            label.set_text((label.text + event.text).lstrip())
        elif isinstance(event, SideDone):
            self._ends[event.side].set_text(self._end(event))
        elif isinstance(event, Decided):
            kind = "open" if event.decision.fired else "shut"
            self._status.classes(add=kind).set_text(verdict(event.decision))
            self._scores.set_content(plot_scores(self._desk.gates, event.decision))
            self._map.set_content(plot_map(self._desk.anchors, event))

    def _end(self, event: SideDone) -> str:
        if self._stopped.is_set():
            return "Stopped."
        return f"Cut at {self._desk.answerer.max_new_tokens} tokens." if event.cut else "Complete."
