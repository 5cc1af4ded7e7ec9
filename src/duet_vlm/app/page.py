"""The page, made with Gradio: layout and events. Texts and pictures come from the other files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, fields
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import duet_vlm
from duet_vlm.api.loading import LoadedModel
from duet_vlm.app.controls import NO_TOWER, Controls, other_methods, tower_methods
from duet_vlm.app.depth import FIRST, DepthView, depth_view, tiled
from duet_vlm.app.errors import sentence
from duet_vlm.app.files import check_question, open_uploads
from duet_vlm.app.generate import AppSide, StreamedText, answers

EACH = len(fields(Controls))  # controls of a method
WAITING = 20  # questions in the queue; more are refused
KEPT = 3600  # seconds that an upload, and what a page remembers, are kept
LEGEND = (
    "Left: what is alive (clear), merged (tinted, with the number of the outlined patch that stands for it) and "
    "dropped (dark); click a patch to "
    "read what became of it. Right: the scores that decided, light is high; it is missing where none did."
)
CSS = """
#problem { color: #7d1a06; background: #fdeee9; border-left: 4px solid #c8350f; padding: 0.6em 0.9em; border-radius: 4px; font-weight: 600 }
.facts { min-height: 1.6em }
.report { font-family: ui-monospace, monospace; font-size: 12px; overflow-x: auto; white-space: pre }
"""


def theme() -> Any:
    """Fonts of the reader's machine; Gradio's own are fetched from a server."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class AppPage:
    """The page for one loaded model; ``blocks`` is what Gradio serves."""

    def __init__(self, loaded: LoadedModel, first: Controls, second: Controls, shown_first: Sequence[tuple[Path, str]]) -> None:
        self._loaded = loaded
        self._files = first.files | second.files
        with gr.Blocks(title="duet-vlm", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as self.blocks:
            clips = "or clip " if loaded.takes_clips else ""
            gr.Markdown(f"# duet-vlm\nFewer visual tokens, same model: `{loaded.name}` on {loaded.model.device}. Drop a "
                f"picture {clips}and ask.")
            with gr.Row():
                with gr.Column(scale=1):
                    self._file = gr.File(label=f"Picture {clips}(drop it here)", height=110, elem_id="file")
                    bare: dict[str, Any] = {"interactive": False, "format": "png", "buttons": []}
                    self._preview = gr.Image(label="As the model is shown it", height=240, elem_id="preview", **bare)
                with gr.Column(scale=1):
                    self._question = gr.Textbox(label="Question", lines=2, max_lines=6, elem_id="question")
                    self._longest = gr.Slider(1, 512, 32, step=1, label="Longest answer, tokens", elem_id="longest")
                    self._compare = gr.Checkbox(label="Compare two methods", elem_id="compare")
                    with gr.Row():
                        self._ask = gr.Button("Ask", variant="primary", elem_id="ask")
                        self._stop = gr.Button("Stop", elem_id="stop")
                    if shown_first:
                        rows = [[str(path), question] for path, question in shown_first]
                        gr.Examples(rows, [self._file, self._question], label="Examples", elem_id="examples", api_visibility="private")
            with gr.Row():
                controls = [self._controls(0, first, "Method")]
                with gr.Column(visible=False) as self._other:
                    controls.append(self._controls(1, second, "Second method"))
            self._problem = gr.HTML(visible=False, elem_id="problem")
            with gr.Row():
                self._columns = [self._column(number) for number in range(3)]
            self._walks = gr.State(None, time_to_live=KEPT)
            self._depth = gr.Slider(
                FIRST, 1, 0, step=1, visible=False, elem_id="depth",
                label="Depth: -1 is the vision tower, 0 the entry to the decoder, then in front of each layer",
            )  # fmt: skip
            self._legend = gr.Markdown(LEGEND, visible=False)
            with gr.Row():
                self._views = [self._view(number) for number in range(2)]
            self._story = gr.HTML(elem_id="story")
            with gr.Row(elem_id="reports"):
                self._reports = [gr.HTML(elem_id=f"report-{number}") for number in range(2)]
            self._events([control for group in controls for control in group])

    def _controls(self, number: int, start: Controls, title: str) -> list[Any]:
        """The controls of one method, in the order of the fields of ``Controls``."""
        values, name = astuple(start), f"method-{number}"
        with gr.Group():
            method = gr.Dropdown(
                sorted({*other_methods(), *tower_methods(), values[0]}), value=values[0], label=title,
                allow_custom_value=True, info="several with a + between: frames+duet", elem_id=name,
            )  # fmt: skip
            means = "visual tokens per layer (64), or a share of all (0.22, 22%)"
            budget = gr.Textbox(values[1], label="Budget", info=means, elem_id=f"budget-{number}")
            with gr.Accordion("Schedule, vision tower, other settings", open=any((values[2], values[5], values[3] != NO_TOWER))):
                schedule = gr.Textbox(
                    values[2], label="Schedule",
                    info="((layer, keep), ...): what is left in front of layers, of what entered; in place of a budget",
                    placeholder="((6, 0.5), (9, 0))", elem_id=f"schedule-{number}",
                )  # fmt: skip
                tower = gr.Dropdown([NO_TOWER, *tower_methods()], value=values[3], label="In the vision tower", elem_id=f"tower-{number}")
                keep = gr.Textbox(
                    values[4], label="Share of the patches that go through it", info="left out: by the budget",
                    placeholder="0.56", elem_id=f"keep-{number}",
                )  # fmt: skip
                rest = gr.Textbox(values[5], label="Other settings", info=_settings(values[0]), lines=2, elem_id=f"settings-{number}")
        method.change(lambda name: gr.update(info=_settings(name)), method, rest, queue=False, show_progress="hidden", api_visibility="private")
        return [method, budget, schedule, tower, keep, rest]

    def _column(self, number: int) -> tuple[Any, Any, Any]:
        with gr.Column(visible=number < 2, min_width=220) as column:
            text = gr.Textbox(label=("Full model", "Reduced", "Second method")[number], lines=3, interactive=False, elem_id=f"answer-{number}")
            facts = gr.HTML(elem_id=f"facts-{number}", elem_classes="facts")
        return column, text, facts

    def _view(self, number: int) -> tuple[Any, Any, Any, Any]:
        with gr.Column(visible=False, elem_id=f"view-{number}") as column:
            title = gr.HTML(elem_id=f"step-{number}")
            with gr.Row():
                bare: dict[str, Any] = {"show_label": False, "interactive": False, "format": "png", "buttons": []}
                patches = gr.Image(label="Patches", elem_id=f"patches-{number}", **bare)
                scores = gr.Image(label="Scores that decided", elem_id=f"scores-{number}", **bare)
        return column, title, patches, scores

    def _events(self, controls: list[Any]) -> None:
        light: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self._file.change(self._look, self._file, [self._preview, self._problem], **light)
        self._compare.change(lambda on: [gr.update(visible=on)] * 2, self._compare, [self._other, self._columns[2][0]], **light)
        parts = [part for column in self._columns for part in column] + [part for view in self._views for part in view]
        outputs = [self._problem, self._walks, self._depth, self._legend, self._story, *self._reports, *parts]
        asked = gr.on(
            [self._ask.click, self._question.submit],
            self._answer,
            [self._file, self._question, self._longest, self._compare, *controls],
            outputs,
            concurrency_limit=1,  # one question at a time, so that times are its own
            trigger_mode="once",
            show_progress="minimal",
            show_progress_on=self._columns[0][1],  # the place in the queue
            api_visibility="private",
        )
        self._stop.click(None, None, None, cancels=[asked], queue=False, api_visibility="private")
        moved = [part for view in self._views for part in view] + [self._story]
        self._depth.change(self._move, [self._walks, self._depth], moved, trigger_mode="always_last", **light)
        for number, (_, _, patches, _) in enumerate(self._views):
            patches.select(self._tell_of(number), [self._walks, self._depth], self._story, **light)

    def _look(self, path: str | None) -> list[Any]:
        """The dropped file as the model's input, or its error."""
        if path is None:
            return [None, _nothing_wrong()]
        try:
            return [tiled(open_uploads(Path(path), self._loaded).preview), _nothing_wrong()]
        except Exception as error:  # whatever it is, the page says it
            return [None, _wrong(error, Path(path))]

    def _answer(self, path: str | None, question: str | None, longest: float, comparing: bool, *values: str | None) -> Iterator[dict[Any, Any]]:
        """One question: answers while they are written, then the depth views and the reports."""
        yield self._cleared()
        file = None if path is None else Path(path)
        groups = [values[:EACH], values[EACH:]][: 1 + bool(comparing)]
        try:
            methods = [Controls(*(value or "" for value in group)).read(self._files) for group in groups]
            uploads, text = open_uploads(file, self._loaded), check_question(question)
            with ExitStack() as ending:
                sides = []
                for method in [None, *methods]:
                    sides.append(AppSide(self._loaded, method, uploads, text))
                    ending.callback(sides[-1].close)
                texts: list[StreamedText] = []
                for texts in answers(sides, int(longest)):
                    yield self._written(texts)
                if failed := [f"{one.name}: {one.error}" for one in texts if one.error]:
                    yield {self._problem: gr.update(value=_alert("; ".join(failed)), visible=True)}
                done = {number: side.record() for number, side in enumerate(sides) if number and not texts[number].error}
            update: dict[Any, Any] = {}
            walks: list[tuple[str, DepthView] | None] = [None, None]
            for number, record in done.items():
                update |= {self._columns[number][2]: _facts(texts[number], texts[0], f"{record.mean:.1f} of {record.tokens} visual tokens per layer")}
                update |= {self._reports[number - 1]: f"<h3>{escape(sides[number].name)}</h3><pre class='report'>{escape(record.report)}</pre>"}
                try:
                    way = depth_view(uploads, sides[number].inputs, self._loaded.processor, record)
                    way.at(0)
                    walks[number - 1] = sides[number].name, way
                except ValueError as error:  # tokens that form no grid: there are answers and reports all the same
                    update |= {self._story: f"{escape(sides[number].name)}: {escape(sentence(error))}"}
            deep = max((way.depth for _, way in filter(None, walks)), default=0)
            if deep:
                update |= {self._depth: gr.update(maximum=deep - 1, value=0, visible=True), self._legend: gr.update(visible=True)}
                update |= dict(zip([part for view in self._views for part in view], self._depth_updates(walks, 0), strict=True))
            yield update | {self._walks: walks}
        except Exception as error:  # whatever it is, the page says it
            yield {self._problem: _wrong(error, file)}

    def _cleared(self) -> dict[Any, Any]:
        hidden = {self._problem: _nothing_wrong(), self._walks: None, self._depth: gr.update(visible=False), self._legend: gr.update(visible=False)}
        texts = {part: "" for _, text, facts in self._columns for part in (text, facts)}
        return hidden | texts | {self._story: ""} | dict.fromkeys(self._reports, "") | {view[0]: gr.update(visible=False) for view in self._views}

    def _written(self, texts: Sequence[StreamedText]) -> dict[Any, Any]:
        updates: dict[Any, Any] = {}
        for (_, text, facts), one in zip(self._columns, texts, strict=False):
            updates |= {text: gr.update(value=one.text, label=one.name), facts: _facts(one, texts[0])}
        return updates

    def _depth_updates(self, walks: Sequence[tuple[str, DepthView] | None], layer: int) -> list[Any]:
        """Updates of the views of both methods, each a name and a depth view."""
        updates: list[Any] = []
        for one in walks:
            if one is None:
                updates += [gr.update(visible=False), "", None, None]
            else:
                step = one[1].at(min(layer, one[1].depth - 1))
                words = f"<b>{escape(one[0])}, {escape(step.title)}</b><br>{escape(step.note)}"
                updates += [gr.update(visible=True), words, step.patches, gr.update(value=step.scores, visible=step.scores is not None)]
        return updates

    def _move(self, kept: Any, layer: float) -> list[Any]:
        """Handler of the slider."""
        if kept is None:
            return [gr.skip()] * (4 * len(self._views) + 1)
        return [*self._depth_updates(kept, int(layer)), ""]

    def _tell_of(self, number: int) -> Any:
        def tell(kept: Any, layer: float, event: gr.SelectData) -> str:
            if kept is None or kept[number] is None:
                return ""
            name, way = kept[number]
            width, height = way.at(0).patches.size
            return escape(f"{name}: {way.story(event.index[0] / width, event.index[1] / height, min(int(layer), way.depth - 1))}")

        return tell


def _settings(method: str) -> str:
    try:
        own = [field.name for field in fields(duet_vlm.get_method(method)) if not field.metadata.get("file")]  # type: ignore[arg-type]
    except ValueError:
        return "key=value, one to a line"
    return f"key=value, one to a line: {', '.join(own)}"


def _facts(answer: StreamedText, full: StreamedText, more: str = "") -> str:
    """Time and tokens of one answer."""
    if answer.error:
        return "stopped"
    if answer.first is None:
        return "waits"
    parts = [f"{answer.first:.3g} s to the first token", f"{answer.tokens} tokens"]
    if answer.done and full.done and answer is not full:
        parts.append("the same answer" if answer.text == full.text else "another answer")
        parts.append(f"first token {full.first / answer.first:.2f}x as fast" if full.first else "")
    return escape(" · ".join(filter(None, [*parts, more])))


def _alert(words: str) -> str:
    return f"<div role='alert'>{escape(words)}</div>"


def _wrong(error: Exception, file: Path | None) -> Any:
    return gr.update(value=_alert(sentence(error, file)), visible=True)


def _nothing_wrong() -> Any:
    return gr.update(value="", visible=False)
