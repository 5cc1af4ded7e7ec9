"""The page, made with Gradio: what stands where, and what happens when. What is said and shown comes from the other
files."""

from __future__ import annotations

import re
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
from duet_vlm.app.generate import AppSide, RunRecord, StreamedText, answers
from duet_vlm.utils.field_types import flattened

EACH = len(fields(Controls))  # controls of a method
WAITING = 20  # questions in the queue; more are refused
KEPT = 3600  # seconds that an upload, and what a page remembers, are kept
NO_BUDGET = "none"
LEGEND = (
    "Left: what is alive (clear), merged (tinted, with the number of the outlined patch that stands for it), asleep (blue) "
    "and dropped (dark); click a patch to read what became of it. Right: the scores that decided, light is high; there is no such "
    "picture where no score decided token by token."
)
SPEEDS = (
    "<b>Two figures of speed.</b> <i>Measured</i>: the full model's seconds to the first token, over this method's, "
    "in this one call on this machine, with the vision tower and all else that is not the decoder. One call varies; "
    "<code>duet-vlm bench</code> takes medians. <i>By FLOPs</i>: how much less the decoder computes for the prompt. "
    "A large decoder and a long prompt come near to it; where the tower or fixed costs take the time, as in a tiny "
    "model, they do not."
)
OPENED = (
    "The first example, asked when the page was started: move the slider, click a patch, or ask a question of your own."
)
HINT = "Drop a picture or take an example, write a question, and click Ask."
STARTS = "Working: the question waits for its turn, or the prompt is read."
DONE = "Done: move the slider, click a patch, or ask again."
CSS = """
#problem { color: #7d1a06; background: #fdeee9; border-left: 4px solid #c8350f; padding: 0.6em 0.9em; border-radius: 4px; font-weight: 600 }
#status { min-height: 1.6em }
#status .busy { font-weight: 600; padding-left: 1.5em; position: relative }
#status .busy::before { content: ""; position: absolute; left: 0; top: 0.15em; width: 0.8em; height: 0.8em;
  border: 2px solid currentColor; border-right-color: transparent; border-radius: 50%; animation: round 0.9s linear infinite }
@keyframes round { to { transform: rotate(360deg) } }
#head h1 { display: inline; font-size: 1.3em } #head p { display: inline; margin-left: 0.8em }
#file .wrap { font-size: 12px; line-height: 1.3; padding-top: 1.6em } #file .wrap svg { display: none }
#file td.download { display: none }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)) !important; height: auto }
#examples .caption-label { display: none }
#speeds { font-size: 13px; opacity: 0.85 }
.facts { min-height: 1.6em }
.report { font-size: 12px; overflow-x: auto }
.report td { padding: 0.1em 0.5em; text-align: right; white-space: nowrap; border: 0 }
.report td:first-child { padding-left: 0; text-align: left; white-space: normal }
.report p { margin: 0.2em 0; overflow-wrap: anywhere }
@media (prefers-reduced-motion: reduce) { #status .busy::before { animation: none } }
"""
# Said by the browser itself, at once: the question may wait in the queue. On a narrow window answers come into sight.
AT_ONCE = """() => {
  const line = document.querySelector("#status"), place = line.getBoundingClientRect();
  if (place.top < 0 || place.bottom > 0.6 * innerHeight) line.scrollIntoView();
  return %r;
}"""


def theme() -> Any:
    """Fonts of the reader's machine; Gradio's own are fetched from a server."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class AppPage:
    """The page for one loaded model; ``blocks`` is what Gradio serves. It opens with the first of ``shown_first`` asked
    and answered, which is done once, here."""

    def __init__(
        self, loaded: LoadedModel, first: Controls, second: Controls, shown_first: Sequence[tuple[Path, str]]
    ) -> None:
        self._loaded = loaded
        self._files = first.files | second.files
        with gr.Blocks(title="duet-vlm", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as self.blocks:
            clips = "or clip " if loaded.takes_clips else ""
            words = f"Fewer visual tokens, same model: `{loaded.name}` on {loaded.model.device}."
            gr.Markdown(f"# duet-vlm\n{words}", elem_id="head")
            with gr.Row():
                with gr.Column(scale=3, min_width=320, elem_id="asking"):
                    with gr.Row():
                        there: dict[str, Any] = {"height": 110, "min_width": 120}
                        bare: dict[str, Any] = {"interactive": False, "format": "png", "buttons": []}
                        self._file = gr.File(label=f"Picture {clips}(drop it here)", scale=3, elem_id="file", **there)
                        self._preview = gr.Image(label="Shown", scale=2, elem_id="preview", **bare, **there)
                    # the first one, until a file is dropped: its place stays free for that
                    self._example = gr.State(None, time_to_live=KEPT)
                    self._question = gr.Textbox(label="Question", lines=1, max_lines=6, elem_id="question")
                    with gr.Row():
                        self._ask = gr.Button("Ask", variant="primary", min_width=100, elem_id="ask")
                        self._stop = gr.Button("Stop", min_width=100, elem_id="stop")
                    controls = [self._controls(0, first, "Method")]
                    self._shown_first = list(shown_first)
                    if self._shown_first:
                        looks = [
                            (open_uploads(path, loaded).preview[0], question) for path, question in self._shown_first
                        ]
                        gr.HTML("Examples: click one")
                        self._examples = gr.Gallery(
                            looks, show_label=False, elem_id="examples", columns=len(looks), height=112, container=False,
                            object_fit="cover", format="png", allow_preview=False, interactive=False, buttons=[],
                        )  # fmt: skip
                    self._compare = gr.Checkbox(label="Compare two methods", elem_id="compare")
                    with gr.Column(visible=False) as self._other:
                        controls.append(self._controls(1, second, "Second method"))
                    self._longest = gr.Slider(1, 512, 32, step=1, label="Longest answer, tokens", elem_id="longest")
                with gr.Column(scale=7, min_width=320, elem_id="answering"):
                    self._status = gr.HTML(_status(HINT), elem_id="status")
                    self._problem = gr.HTML(visible=False, elem_id="problem")
                    with gr.Row():
                        self._columns = [self._column(number) for number in range(3)]
                    self._walks = gr.State(None, time_to_live=KEPT)
                    self._depth = gr.Slider(
                        FIRST, 1, 0, step=1, visible=False, elem_id="depth",
                        label="Depth: -1 is the vision tower, 0 the entry to the decoder, then in front of each layer",
                    )  # fmt: skip
                    with gr.Row():
                        self._views = [self._view(number) for number in range(2)]
                    self._story = gr.HTML(elem_id="story")
                    self._legend = gr.Markdown(LEGEND, visible=False)
                    self._speeds = gr.HTML(SPEEDS, visible=False, elem_id="speeds")
                    with gr.Row(elem_id="reports"):
                        self._reports = [self._report(number) for number in range(2)]
            everything = [control for group in controls for control in group]
            self._events(everything)
        self._opening = self._first_answer(everything) if self._shown_first else {}

    def _controls(self, number: int, start: Controls, title: str) -> list[Any]:
        """The controls of one method: in the order of the fields of ``Controls``, then the slider of the budget."""
        share, exact = _on_slider(start.budget)
        values, name = astuple(start), f"method-{number}"
        with gr.Group():
            method = gr.Dropdown(
                sorted({*other_methods(), *tower_methods(), values[0]}), value=values[0], label=title, allow_custom_value=True,
                info="several with a + between: frames+duet", elem_id=name,
            )  # fmt: skip
            slider = gr.Slider(1, 100, share, step=1, label="Budget, % of the visual tokens", elem_id=f"share-{number}")
            opened_ = any((exact, values[2], values[5], values[3] != NO_TOWER))
            with gr.Accordion("More settings", open=opened_):
                budget = gr.Textbox(
                    exact, label="Budget, exactly", placeholder="64", elem_id=f"budget-{number}",
                    info="visual tokens per layer (64) or a share (0.225), in place of the slider; "
                    f"{NO_BUDGET}: the settings alone say how many",
                )  # fmt: skip
                schedule = gr.Textbox(
                    values[2], label="Schedule", info="((layer, keep), ...): what is left in front of layers, of what entered; in place of a budget",
                    placeholder="((6, 0.5), (9, 0))", elem_id=f"schedule-{number}",
                )  # fmt: skip
                tower = gr.Dropdown(
                    [NO_TOWER, *tower_methods()],
                    value=values[3],
                    label="In the vision tower",
                    elem_id=f"tower-{number}",
                )
                keep = gr.Textbox(
                    values[4], label="Share of the patches that go through it", info="left out: by the budget", placeholder="0.56",
                    elem_id=f"keep-{number}",
                )  # fmt: skip
                rest = gr.Textbox(
                    values[5], label="Other settings", info=_settings(values[0]), lines=2, elem_id=f"settings-{number}"
                )
        method.change(
            lambda name: gr.update(info=_settings(name)),
            method,
            rest,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        light: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slider.input(lambda: "", None, budget, **light)  # a slider that was moved is meant
        return [method, budget, schedule, tower, keep, rest, slider]

    def _column(self, number: int) -> tuple[Any, Any, Any]:
        with gr.Column(visible=number < 2, min_width=220) as column:
            label = ("Full model", "Reduced", "Second method")[number]
            text = gr.Textbox(label=label, lines=2, interactive=False, elem_id=f"answer-{number}")
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

    def _report(self, number: int) -> Any:
        with gr.Column(min_width=320):
            return gr.HTML(elem_id=f"report-{number}")

    def _events(self, controls: list[Any]) -> None:
        light: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self._file.change(self._look, self._file, [self._preview, self._problem, self._example], **light)
        self._compare.change(
            lambda on: [gr.update(visible=on)] * 2, self._compare, [self._other, self._columns[2][0]], **light
        )
        parts = [part for column in self._columns for part in column] + [part for view in self._views for part in view]
        words = [self._status, self._problem, self._legend, self._speeds, self._story]
        outputs = [*words, self._walks, self._depth, *self._reports, *parts]
        begins: list[Any] = [self._ask.click, self._question.submit]
        gr.on(begins, None, None, self._status, js=AT_ONCE % _status(STARTS, busy=True), **light)
        question_event = gr.on(
            begins,
            self._answer,
            [self._file, self._example, self._question, self._longest, self._compare, *controls],
            outputs,
            concurrency_limit=1,  # one question at a time, so that times are its own
            trigger_mode="once",
            show_progress="minimal",
            show_progress_on=self._columns[0][1],  # the place in the queue
            api_visibility="private",
        )
        self._stop.click(None, None, self._status, js=AT_ONCE % _status("Stopped."), **light)
        ended = self._stop.click(None, None, None, cancels=[question_event], queue=False, api_visibility="private")
        # what was on its way may have come in between
        ended.then(lambda: _status("Stopped."), None, self._status, **light)
        if self._shown_first:
            self._examples.select(self._take, None, [self._file, self._question], **light)
            self.blocks.load(self._open, None, [self._example, self._preview, self._question, *outputs], **light)
        moved = [part for view in self._views for part in view] + [self._story]
        self._depth.change(self._move, [self._walks, self._depth], moved, trigger_mode="always_last", **light)
        for number, (_, _, patches, _) in enumerate(self._views):
            patches.select(self._tell_of(number), [self._walks, self._depth], self._story, **light)

    def _first_answer(self, controls: Sequence[Any]) -> dict[Any, Any]:
        """All that the first example changes on the page, with the controls as they stand."""
        path, question = self._shown_first[0]
        preview, *_ = self._look(str(path))
        updates: dict[Any, Any] = {self._example: str(path), self._preview: preview, self._question: question}
        for update in self._answer(
            None,
            str(path),
            question,
            self._longest.value,
            self._compare.value,
            *(control.value for control in controls),
        ):
            updates |= update
        return updates | {self._status: _status(OPENED)}

    def _open(self) -> dict[Any, Any]:
        """The first answer, for one visitor: Gradio takes updates apart when it sends them."""
        return {part: dict(value) if isinstance(value, dict) else value for part, value in self._opening.items()}

    def _take(self, event: gr.SelectData) -> list[str]:
        """An example was clicked."""
        path, question = self._shown_first[event.index]
        return [str(path), question]

    def _look(self, path: str | None) -> list[Any]:
        """The file that was dropped, as the model is shown it, or what is wrong with it; and no example in place of it."""
        if path is None:
            return [None, _nothing_wrong(), None]
        try:
            return [tiled(open_uploads(Path(path), self._loaded).preview), _nothing_wrong(), None]
        except Exception as error:  # whatever it is, the page says it
            return [None, _wrong(error, Path(path)), None]

    def _answer(
        self, path: str | None, example: str | None, question: str | None, longest: float, comparing: bool, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """One question: answers as they are written, then what the slider shows, and the reports."""
        yield self._cleared()
        given = path or example
        file = None if given is None else Path(given)
        groups = [_budgeted(values[: EACH + 1]), _budgeted(values[EACH + 1 :])][: 1 + bool(comparing)]
        try:
            chosen = [Controls(*(value or "" for value in group)).read(self._files) for group in groups]
            shown, text = open_uploads(file, self._loaded), check_question(question)
            with ExitStack() as ending:
                sides = []
                for each in [None, *chosen]:
                    sides.append(AppSide(self._loaded, each, shown, text))
                    ending.callback(sides[-1].close)
                said: list[StreamedText] = []
                for said in answers(sides, int(longest)):
                    yield self._written(said)
                if failed := [f"{one.name}: {one.error}" for one in said if one.error]:
                    yield {self._problem: gr.update(value=_alert("; ".join(failed)), visible=True)}
                yield {self._status: _status("Working: the prompt is read once more, to see what decided.", busy=True)}
                done = {number: side.seen() for number, side in enumerate(sides) if number and not said[number].error}
            update: dict[Any, Any] = {}
            walks: list[tuple[str, DepthView] | None] = [None, None]
            for number, seen in done.items():
                update |= {self._columns[number][2]: _facts(said[number], said[0], seen)}
                told = f"<h3>{escape(sides[number].name)}</h3>{_laid_out(seen.report)}"
                update |= {self._reports[number - 1]: told, self._speeds: gr.update(visible=True)}
                try:
                    way = depth_view(shown, sides[number].inputs, self._loaded.processor, seen)
                    way.at(0)
                    walks[number - 1] = sides[number].name, way
                except ValueError as error:  # tokens that form no grid: there are answers and reports all the same
                    update |= {self._story: f"{escape(sides[number].name)}: {escape(sentence(error))}"}
            deep = max((way.depth for _, way in filter(None, walks)), default=0)
            if deep:
                start = max(way.first_loss for _, way in filter(None, walks))  # so that each has something to show
                update |= {self._depth: gr.update(maximum=deep - 1, value=start, visible=True)}
                update |= {self._legend: gr.update(visible=True)}
                places = [part for view in self._views for part in view]
                update |= dict(zip(places, self._shown(walks, start), strict=True))
            update |= {self._walks: walks, self._status: _status("" if failed else DONE)}
            yield update
        except Exception as error:  # whatever it is, the page says it
            yield {self._problem: _wrong(error, file), self._status: _status("")}

    def _cleared(self) -> dict[Any, Any]:
        hidden = {part: gr.update(visible=False) for part in (self._depth, self._legend, self._speeds)}
        hidden |= {self._problem: _nothing_wrong(), self._walks: None, self._status: _status(STARTS, busy=True)}
        texts = {part: "" for _, text, facts in self._columns for part in (text, facts)}
        return (
            hidden
            | texts
            | {self._story: ""}
            | dict.fromkeys(self._reports, "")
            | {view[0]: gr.update(visible=False) for view in self._views}
        )

    def _written(self, said: Sequence[StreamedText]) -> dict[Any, Any]:
        waits = [one.name for one in said if one.first is None and not one.done]
        words = f"{waits[0]} reads the prompt" if waits else "answers are written"
        updates: dict[Any, Any] = {self._status: _status(f"Working: {words}.", busy=True)}
        for (_, text, facts), one in zip(self._columns, said, strict=False):
            updates |= {text: gr.update(value=one.text, label=one.name), facts: _facts(one, said[0])}
        return updates

    def _shown(self, walks: Sequence[tuple[str, DepthView] | None], layer: int) -> list[Any]:
        """Content of the views of both methods, each a name and a walk."""
        updates: list[Any] = []
        for one in walks:
            if one is None:
                updates += [gr.update(visible=False), "", None, None]
            else:
                step = one[1].at(min(layer, one[1].depth - 1))
                words = f"<b>{escape(one[0])}, {escape(step.title)}</b><br>{escape(step.note)}"
                updates += [
                    gr.update(visible=True),
                    words,
                    step.patches,
                    gr.update(value=step.scores, visible=step.scores is not None),
                ]
        return updates

    def _move(self, kept: Any, layer: float) -> list[Any]:
        """The slider was moved."""
        if kept is None:
            return [gr.skip()] * (4 * len(self._views) + 1)
        return [*self._shown(kept, int(layer)), ""]

    def _tell_of(self, number: int) -> Any:
        def tell(kept: Any, layer: float, event: gr.SelectData) -> str:
            if kept is None or kept[number] is None:
                return ""
            name, way = kept[number]
            width, height = way.at(0).patches.size
            return escape(
                f"{name}: {way.story(event.index[0] / width, event.index[1] / height, min(int(layer), way.depth - 1))}"
            )

        return tell


def _settings(method: str) -> str:
    try:
        made = duet_vlm.make_method(method)
        own = [name for name in flattened(made.settings()) if name not in made.file_settings()]
    except ValueError:
        return "key=value, one to a line"
    return f"key=value, one to a line: {', '.join(own)}"


def _facts(said: StreamedText, full: StreamedText, seen: RunRecord | None = None) -> str:
    """Time and tokens of one answer, and both figures of speed once they are known."""
    if said.error:
        return "stopped"
    if said.first is None:
        return "waits"
    parts = [f"{said.first:.3g} s to the first token", f"{said.tokens} tokens"]
    if said.done and full.done and said is not full:
        parts.append("the same answer" if said.text == full.text else "another answer")
        parts.append(f"first token {full.first / said.first:.2f}x as fast, measured" if full.first else "")
    if seen is not None:
        parts.append(f"{seen.bound:.2f}x by FLOPs of the decoder")
        parts.append(f"{seen.mean:.1f} of {seen.tokens} visual tokens per layer")
    return escape(" · ".join(filter(None, parts)))


def _status(words: str, busy: bool = False) -> str:
    return f'<div role="status" aria-live="polite"{" class=busy" if busy else ""}>{escape(words)}</div>'


def _on_slider(budget: str) -> tuple[int, str]:
    """Position of a budget's slider, and the text of the box beside it: empty where the slider says all."""
    try:
        percent = 100 * float(budget) if "." in budget else 22.0
    except ValueError:
        percent = 22.0
    share = min(max(round(percent), 1), 100)
    return share, "" if "." in budget and abs(percent - share) < 1e-9 else budget or NO_BUDGET


def _budgeted(values: Sequence[Any]) -> list[Any]:
    """The values of ``Controls``: the budget from its box, or else from the slider."""
    *own, share = values
    if own:
        text = (own[1] or "").strip()
        own[1] = "" if text == NO_BUDGET else text or f"{share:g}%"
    return own


def _laid_out(report: str) -> str:
    """A report as a table and lines, which a narrow window can show; lines of columns become rows."""
    lines = [re.split(r"\s{2,}", line) for line in report.splitlines()]
    rows = [cells for cells in lines if len(cells) > 3]
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    words = [f"<p>{escape(' '.join(cells))}</p>" for cells in lines if len(cells) <= 3]
    return f"<div class='report'>{''.join(words[:1])}<table>{cells}</table>{''.join(words[1:])}</div>"


def _alert(words: str) -> str:
    return f"<div role='alert'>{escape(words)}</div>"


def _wrong(error: Exception, file: Path | None) -> Any:
    return gr.update(value=_alert(sentence(error, file)), visible=True)


def _nothing_wrong() -> Any:
    return gr.update(value="", visible=False)
