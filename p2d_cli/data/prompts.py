"""How a row becomes text, and text becomes tokens.

A tokenizer is any fast tokenizer of `transformers`, passed in; this module does not import that library.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from p2d_cli.core.turns import TurnFrame, frame_of, known_blocks, split_turn
from p2d_cli.data.records import Message, Record
from p2d_cli.errors import DataError, UsageError

TemplateName = Literal["chat", "plain"]
LossOn = Literal["all", "last"]
Span = tuple[int, int]
"""First character, and the one behind the last."""

# Templates of the Llama 3 family print today's date unless they are given one, and those of others (gpt-oss) ask for it
# by `strftime_now`. Tokens must not depend on the day; this is the one that Llama's templates fall back to themselves.
_TEMPLATE_DATE = "26 Jul 2024"
_DAY = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri"}
_DAY |= dict.fromkeys(("%H", "%M", "%S"), "00")
_FIXED_DAY = (
    "{%- macro strftime_now(form) %}{{ form"
    + "".join(f" | replace('{sign}', '{value}')" for sign, value in _DAY.items())
    + " }}{% endmacro %}\n"
)
_TEMPLATE_DEFECTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What the expressions of a template may raise, such as `1 / 0`."""
PLAIN_HINT = "use --template plain"
_Tools = Sequence[Mapping[str, Any]]
_Skeleton = tuple[list[str], list[int]]
"""A chat template's own texts around the contents of a conversation, and the message behind each but the last; some
templates move the system message."""
_MARKS = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class EncodedExample:
    """A row as tokens: the prompt as inference sees it, then the completion."""

    input_ids: tuple[int, ...]
    prompt_length: int
    """Tokens before the completion; at least 1."""
    truncated: int
    """Tokens that were cut to fit; 0 where the row is whole."""
    earlier: tuple[Span, ...] = ()
    """The assistant's earlier turns that are learnt too, as ranges of tokens; none unless they are asked for."""
    rewritten: bool = False
    """Whether the template shows an earlier turn otherwise than the model would write it, so that none is learnt."""
    lost: int = 0
    """Earlier turns that are not learnt because tokens were cut from them or right before them."""
    lead_length: int = 0
    """Tokens of the completion before its answer: what the template writes there, and the row's reasoning."""
    hides: bool = False
    """Whether the row's answer has reasoning, or text beside its calls, that the template does not show."""

    @property
    def answer_start(self) -> int:
        """Tokens before the answer; metrics, likelihoods and readout look at those behind, training at all."""
        return self.prompt_length + self.lead_length

    @property
    def label_mask(self) -> tuple[bool, ...]:
        """Which tokens are learnt: those of the completion and of the earlier turns."""
        mask = [position >= self.prompt_length for position in range(len(self.input_ids))]
        for start, stop in self.earlier:
            mask[start:stop] = [True] * (stop - start)
        return tuple(mask)

    def labels(self, ignored: int) -> list[int]:
        """Return the token ids that are learnt, and `ignored` in the place of the others."""
        return [token if learnt else ignored for token, learnt in zip(self.input_ids, self.label_mask, strict=True)]


@dataclass(frozen=True)
class PlacedText:
    """A conversation as one text, and where each message's content stands in it."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class PromptTemplate:
    r"""The way from a row to text: the tokenizer's chat template, or plain text.

    Plain is `{system}\n\n` (if any), `{prompt}\n`, and for the completion `{completion}{eos}`. Where the context has
    several turns, each earlier answer is `{answer}{eos}\n\n`, and each user's turn a prompt.
    """

    name: TemplateName
    chat_template: str | None = None
    """The Jinja source (chat only)."""
    origin: str = field(default="this model's chat template", compare=False)
    """What messages call it."""
    _skeletons: dict[tuple[str, ...], _Skeleton | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _frames: dict[str, TurnFrame] = field(default_factory=dict, init=False, repr=False, compare=False)
    _shown: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Kinds of conversations whose parts this template is known to show."""

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides how rows are rendered."""
        return hashlib.sha256(f"{self.name}\n{self.chat_template or ''}".encode()).hexdigest()

    # --- text

    def render_prompt(self, tokenizer: Any, record: Record) -> str:
        """Return the text that the model is to continue with the completion; raises as `render_example`."""
        self._require_shown(tokenizer, record)
        return self._open(tokenizer, self.conversation(tokenizer, record), record.tools)

    def render_example(self, tokenizer: Any, record: Record) -> tuple[str, str]:
        """Return prompt text and completion text, the end-of-turn token included.

        The completion is what the model has to write at inference: the answer, and what the template writes around it
        behind the prompt (an empty think block, a role header), so that the model learns to write it.

        Raises:
            DataError: the chat template refuses the conversation, does not show its tools, or changes the prompt once
                it is answered.
        """
        self._require_shown(tokenizer, record)
        messages = self.conversation(tokenizer, record)
        prompt, completion = self._answered(tokenizer, messages, record.answer, record.tools)
        if completion is None:
            raise DataError(
                f"{record.where}: {self.origin} cannot be split into prompt and completion: "
                "the answered conversation does not begin with the unanswered one",
                hint=f"{PLAIN_HINT}; where it writes a think block into the prompt and the row has reasoning, set its "
                "variable with --chat-template-kwargs",
            )
        return prompt, completion

    def reference(self, tokenizer: Any, record: Record) -> str:
        """Return the text that a right answer is compared with, without the row's reasoning.

        A call of a tool has the form in which the template writes it. Raises as `render_example`.
        """
        frame = self.frame(tokenizer, record)
        if "tool_calls" not in record.answer_parts:
            return frame.without_reasoning(record.completion)
        text = frame.answer(self.render_example(tokenizer, record)[1])
        for token in frame.specials:
            text = text.replace(token, "")
        return text.strip()

    def conversation(self, tokenizer: Any, record: Record) -> list[Message]:
        """Return the context as this template takes it.

        A chat template that knows no system role gets the system message at the start of the first turn.
        """
        messages = list(record.messages)
        return messages if record.system is None or self.takes_system(tokenizer) else fold_system(messages)

    def takes_system(self, tokenizer: Any) -> bool:
        """Whether a system message can be shown in its own place."""
        return self.name == "plain" or self._skeleton(tokenizer, ("system", "user")) is not None

    def place(self, tokenizer: Any, messages: Sequence[Message]) -> PlacedText:
        """Render a conversation up to where the model answers, and find every message's content in it.

        The text is checked, character by character, against the template's own parts between the contents, which a
        conversation of marks shows once for each sequence of roles. Contents that the template trims are found trimmed.

        Raises:
            DataError: the chat template refuses the conversation, or changes contents in other ways.
        """
        if self.name == "plain":
            return _plain_text(messages)
        skeleton = self._skeleton(tokenizer, tuple(message.role for message in messages))
        text = self._render(tokenizer, messages, answer=True)
        spans = skeleton and _find_spans(skeleton, text, [message.content for message in messages])
        if not spans:
            said = f"{self.origin} drops or changes messages, so that they cannot be told apart in its text"
            raise DataError(said, hint=PLAIN_HINT)
        return PlacedText(text, spans)

    # --- what stands around answers

    def frame(self, tokenizer: Any, record: Record) -> TurnFrame:
        """Return what the template writes around the answer of this row."""
        messages = self.conversation(tokenizer, record)
        frame = self._frame(tokenizer, messages, record.tools)
        if "tool_calls" not in record.answer_parts:
            return frame
        _, turn = self._answered(tokenizer, messages, record.answer, record.tools)
        # Calls of tools may end with a token of their own.
        closing = [token for token in _added_tokens(tokenizer)[0] if token.strip() and (turn or "").endswith(token)]
        return replace(frame, ends=tuple(dict.fromkeys([*frame.ends, *closing])))

    def simple_frame(self, tokenizer: Any) -> TurnFrame:
        """Return what the template writes around the answer to a single question."""
        asked = Message("user", "?")
        frame = self._frame(tokenizer, [asked], ())
        # Some templates refuse a conversation without a system message.
        return frame if frame.ends else self._frame(tokenizer, [Message("system", "?"), asked], ())

    def ends(self, tokenizer: Any, records: Iterable[Record] = ()) -> tuple[str, ...]:
        """Return the tokens with which answers end: that of a plain answer, if there is one, then those of calls."""
        calls = [record for record in records if "tool_calls" in record.answer_parts]
        found = [self.simple_frame(tokenizer), *(self.frame(tokenizer, record) for record in calls)]
        return tuple(dict.fromkeys(end for frame in found for end in frame.ends))

    def earlier_turns(self, tokenizer: Any, record: Record) -> tuple[Span, ...] | None:
        """Return where the assistant's earlier turns stand in the prompt, each with its end-of-turn token.

        A turn stands where the conversation up to it, rendered as for inference, ends. `None` if the prompt does not
        begin, for each turn, with what the model had been shown and was to write there: the template drops an
        earlier turn's reasoning, moves the system message, or closes earlier turns in another way. A turn before
        the first user's answers nothing, and is left out, as is one that is not to be learnt.
        Raises as `render_example`.
        """
        messages = self.conversation(tokenizer, record)
        asked, turns = False, []
        for index, message in enumerate(messages):
            asked = asked or message.role == "user"
            if asked and message.role == "assistant" and message.is_learnt:
                turns.append(index)
        whole, spans = self._open(tokenizer, messages, record.tools) if turns else "", []
        for index in turns:
            prompt, completion = self._answered(tokenizer, messages[:index], messages[index], record.tools)
            if completion is None or not whole.startswith(prompt + completion):
                return None
            spans.append((len(prompt), len(prompt) + len(completion)))
        return tuple(spans)

    # --- tokens

    def encode_prompt(self, tokenizer: Any, record: Record, max_length: int | None = None) -> list[int]:
        """Return the prompt's token ids.

        Chat text holds its special tokens already; plain text gets the tokenizer's BOS, if it has that habit,
        and never an EOS at its end. A prompt that is too long loses the start of its content, not the template's head.
        Raises as `render_example`.
        """
        ids = self.tokenize(tokenizer, self.render_prompt(tokenizer, record))[0]
        start, stop = (0, 0) if max_length is None else self._gap(tokenizer, record, len(ids), max_length)
        return ids[:start] + ids[stop:]

    def encode_example(
        self, tokenizer: Any, record: Record, max_length: int, *, loss_on: LossOn = "last"
    ) -> EncodedExample:
        """Return prompt and completion as tokens; the prompt's are those of `encode_prompt`, if they fit.

        Too long an example loses prompt tokens first, as `encode_prompt` does; a completion that does not fit
        by itself beside one prompt token loses its end.

        Args:
            tokenizer: a fast tokenizer.
            record: the row.
            max_length: largest number of tokens.
            loss_on: `last` learns the completion alone, `all` every turn of the assistant (see `earlier_turns`) that
                is whole after cutting.

        Raises:
            DataError: as `render_example`.
            UsageError: `max_length` is below 2.
        """
        if max_length < 2:
            raise UsageError(f"--max-length {max_length} has no room for a prompt and a completion", hint="raise it")
        prompt_text, completion_text = self.render_example(tokenizer, record)
        prompt_ids, offsets = self.tokenize(tokenizer, prompt_text)
        frame = self._frame(tokenizer, self.conversation(tokenizer, record), record.tools, prompt_text)
        border = frame.find_answer(completion_text) or 0
        completion_ids, lead = self._completion(tokenizer, prompt_text, prompt_ids, completion_text, border)
        kept = completion_ids[: max_length - 1]
        gap = self._gap(tokenizer, record, len(prompt_ids), max_length - len(kept))
        shown = prompt_ids[: gap[0]] + prompt_ids[gap[1] :]
        spans = self.earlier_turns(tokenizer, record) if loss_on == "all" else ()
        turns = [_closed_up(_token_range(offsets, span), gap) for span in spans or ()]
        return EncodedExample(
            input_ids=(*shown, *kept),
            prompt_length=len(shown),
            truncated=len(prompt_ids) + len(completion_ids) - len(shown) - len(kept),
            earlier=tuple(turn for turn in turns if turn is not None),
            rewritten=spans is None,
            lost=turns.count(None),
            lead_length=min(lead, len(kept)),
            hides=_hides(record, completion_text, frame),
        )

    def _completion(
        self, tokenizer: Any, prompt: str, prompt_ids: Sequence[int], completion: str, border: int
    ) -> tuple[list[int], int]:
        """Return the completion's tokens, and how many of them stand before its answer, which begins at the border."""
        ids, offsets = self.tokenize(tokenizer, prompt + completion)
        start = len(prompt)
        if ids[: len(prompt_ids)] == list(prompt_ids):
            ids, offsets = ids[len(prompt_ids) :], offsets[len(prompt_ids) :]
        else:  # a token reaches over the border; at inference the prompt ends there all the same
            ids, offsets, _ = _call(tokenizer, completion, add_special_tokens=False)
            start = 0
        return ids, sum(stop <= start + border for _, stop in offsets) if border else 0

    def tokenize(self, tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
        """Return token ids and each token's characters; see `encode_prompt` for the special tokens."""
        ids, spans, is_special = _call(tokenizer, text, add_special_tokens=self.name == "plain")
        stop = len(ids)
        while self.name == "plain" and stop and is_special[stop - 1]:
            stop -= 1
        return ids[:stop], spans[:stop]

    def _gap(self, tokenizer: Any, record: Record, length: int, room: int) -> Span:
        """Return which tokens of a prompt of this length go: those behind the template's head, as many as needed.

        They are the first ones where the head would fill half the room.
        """
        if length <= room:
            return 0, 0
        messages, kept = self.conversation(tokenizer, record), 0
        whole = self._open(tokenizer, messages, record.tools)
        first = next((index for index, message in enumerate(messages) if message.role != "system"), None)
        if first is not None:
            messages[first] = replace(messages[first], content=_mark(0))
            head, mark, _ = self._open(tokenizer, messages, record.tools).partition(_mark(0))
            kept = sum(stop <= len(head) for _, stop in self.tokenize(tokenizer, whole)[1]) if mark else 0
            kept = kept if 2 * kept <= room else 0
        return kept, kept + length - room

    # --- rendering

    def _open(self, tokenizer: Any, messages: Sequence[Message], tools: _Tools = ()) -> str:
        """Return a conversation up to where the model answers."""
        if self.name == "plain":
            return _plain_text(messages, tokenizer.eos_token or "").text
        return self._render(tokenizer, messages, tools, answer=True)

    def _answered(
        self, tokenizer: Any, messages: Sequence[Message], answer: Message, tools: _Tools
    ) -> tuple[str, str | None]:
        """Return the conversation's text up to its answer, and the answer's with its end-of-turn token.

        The latter is `None` where the template changes the conversation once it is answered.
        """
        prompt = self._open(tokenizer, messages, tools)
        turn = self._turn(tokenizer, messages, answer, tools, prompt)
        if turn is None or self.name == "plain":
            return prompt, turn
        # White space that templates write behind the end-of-turn token a model never gets to generate.
        closes = self._frame(tokenizer, messages, tools, prompt).closes
        return prompt, turn.rstrip() if closes(turn.rstrip()) else turn

    def _turn(
        self, tokenizer: Any, messages: Sequence[Message], answer: Message, tools: _Tools, prompt: str
    ) -> str | None:
        """Return what follows the prompt once it is answered; `None` if the prompt changes then."""
        if self.name == "plain":
            return answer.content + (tokenizer.eos_token or "")
        return split_turn(prompt, self._render(tokenizer, [*messages, answer], tools, answer=False))

    def _frame(
        self, tokenizer: Any, messages: Sequence[Message], tools: _Tools, prompt: str | None = None
    ) -> TurnFrame:
        """Take the template's turn around an answer apart, once for each kind of conversation and end of its prompt.

        The end tells what a word in the conversation may switch, such as whether to think.
        """
        added, specials = _added_tokens(tokenizer)
        if self.name == "plain":
            kind, prompt = "plain", ""
        else:
            try:
                prompt = self._open(tokenizer, messages, tools) if prompt is None else prompt
            except DataError:
                return TurnFrame(specials=specials)
            _, found, ending = prompt.rpartition(messages[-1].content.strip() or "\0")
            kind = f"{_kind(messages, tools)}{ending}" if found else ""
        if kind in self._frames:
            return self._frames[kind]
        turn = None
        with suppress(DataError):
            turn = self._turn(tokenizer, messages, Message("assistant", _mark(0)), tools, prompt)
        blocks = known_blocks(self.chat_template or "")
        frame = frame_of(turn or "", _mark(0), prompt=prompt, added=added, specials=specials, blocks=blocks)
        if kind:
            self._frames[kind] = frame
        return frame

    def _render(self, tokenizer: Any, messages: Sequence[Message], tools: _Tools = (), *, answer: bool) -> str:
        """Render; calls of tools have their arguments as an object, or as JSON text for templates that want it so."""
        import jinja2

        source = self.chat_template or ""
        written = [_with_written_arguments(message) for message in messages]
        refusal: Exception | None = None
        for form in (messages,) if written == list(messages) else (messages, written):
            try:
                text: str = tokenizer.apply_chat_template(
                    [{"role": message.role, "content": message.content, **message.parts} for message in form],
                    tools=list(tools) or None,
                    chat_template=_FIXED_DAY + source if "strftime_now" in source else source,
                    tokenize=False,
                    add_generation_prompt=answer,
                    date_string=_TEMPLATE_DATE,
                )
            except (jinja2.TemplateError, *_TEMPLATE_DEFECTS) as problem:
                refusal = refusal or problem
            else:
                return text
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"{self.origin} refuses a conversation of {roles}: {refusal}", hint=PLAIN_HINT)

    def _require_shown(self, tokenizer: Any, record: Record) -> None:
        """Refuse a row with tools whose tools, calls or results the template leaves out."""
        messages = (*self.conversation(tokenizer, record), record.answer)
        if not (record.tools or any(message.role == "tool" or "tool_calls" in message.parts for message in messages)):
            return
        if self.name == "plain":
            message = f"{record.where}: plain text cannot show tools, their calls and results"
            raise DataError(message, hint="use a chat template that does: --template chat, or --chat-template FILE")
        kind = _kind(messages, record.tools)
        if kind in self._shown:
            return
        for what, probe, tools in _tool_probes(messages, record.tools):
            if _mark(0) not in self._render(tokenizer, probe, tools, answer=False):
                hint = "give --chat-template FILE with a template that shows tools"
                raise DataError(f"{record.where}: {self.origin} does not show {what}", hint=hint)
        self._shown.add(kind)

    def _skeleton(self, tokenizer: Any, roles: tuple[str, ...]) -> _Skeleton | None:
        """Take a conversation of marks apart; `None` unless the template shows each of them exactly once."""
        if roles not in self._skeletons:
            skeleton = None
            with suppress(DataError):
                marked = [Message(role, _mark(index)) for index, role in enumerate(roles)]
                parts = _MARKS.split(self._render(tokenizer, marked, answer=True))
                order = [int(index) for index in parts[1::2]]
                skeleton = (parts[::2], order) if sorted(order) == list(range(len(roles))) else None
            self._skeletons[roles] = skeleton
        return self._skeletons[roles]


def encoding_notes(examples: Sequence[EncodedExample], max_length: int) -> tuple[str, ...]:
    """Say what of these rows is not learnt, each kind of loss in one line."""
    of_all = f"of {len(examples)} rows"
    losses: dict[str, Sequence[int]] = {
        f"{of_all} were longer than {max_length} tokens and were cut": [each.truncated > 0 for each in examples],
        "rows lost their whole completion to truncation and were left out": [
            len(each.input_ids) == each.answer_start for each in examples
        ],
        "earlier answers were cut and are not learnt": [each.lost for each in examples],
        f"{of_all} are learnt by their last answer alone: the chat template shows earlier answers otherwise than the "
        "model writes them": [each.rewritten for each in examples],
        f"{of_all} have reasoning, or text beside calls, that the template does not show: not learnt": [
            each.hides for each in examples
        ],
    }
    return tuple(f"{sum(counts)} {loss}" for loss, counts in losses.items() if any(counts))


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Put the system message at the start of the first other message, two line breaks between them."""
    system = "".join(f"{message.content}\n\n" for message in messages if message.role == "system")
    first, *rest = (message for message in messages if message.role != "system")
    return [replace(first, content=system + first.content), *rest]


def _find_spans(skeleton: _Skeleton, text: str, contents: Sequence[str]) -> tuple[Span, ...] | None:
    """Return each content's characters if a text is exactly this skeleton filled with the contents."""
    (head, *literals), order = skeleton
    spans: list[Span] = [(0, 0)] * len(contents)
    cursor = len(head)
    for index, literal in zip(order, literals, strict=True):
        shown = next((form for form in _forms(contents[index]) if text.startswith(form + literal, cursor)), None)
        if shown is None:
            return None
        spans[index] = (cursor, cursor + len(shown))
        cursor += len(shown) + len(literal)
    return tuple(spans) if text.startswith(head) and cursor == len(text) else None


def _mark(index: int) -> str:
    """Return a content that no template writes by itself (private-use characters)."""
    return f"\ue000{index}\ue001"


def _forms(content: str) -> Iterator[str]:
    """Yield the forms in which chat templates are known to show a content: trimmed, or without its reasoning."""
    yield from (content, content.strip(), content.lstrip(), content.rstrip())
    yield from (content.strip("\n"), content.lstrip("\n"))
    if "</think>" in content:
        answer = content.split("</think>")[-1]
        yield from (answer.lstrip("\n"), answer.strip())


def _plain_text(messages: Sequence[Message], end_of_turn: str = "") -> PlacedText:
    text, spans = "", []
    endings = {"user": "\n", "assistant": f"{end_of_turn}\n\n"}
    for message in messages:
        spans.append((len(text), len(text) + len(message.content)))
        text += message.content + endings.get(message.role, "\n\n")
    return PlacedText(text, tuple(spans))


def _token_range(offsets: Sequence[Span], span: Span) -> Span:
    """Return the tokens that lie wholly in these characters.

    Some tokenizers leave white space out of a token's characters: a token of it alone has none, and stands where it
    ends.
    """
    inside = [index for index, (start, stop) in enumerate(offsets) if start >= span[0] and span[0] < stop <= span[1]]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _closed_up(turn: Span, gap: Span) -> Span | None:
    """Return where a range of tokens stands once those of `gap` have gone.

    `None` if any of its own is among them, or the one before it, which asks for the turn.
    """
    if turn[1] <= gap[0]:
        return turn
    shift = gap[1] - gap[0]
    return (turn[0] - shift, turn[1] - shift) if turn[0] > gap[1] or not shift else None


def _kind(messages: Sequence[Message], tools: _Tools) -> str:
    """Name the kind of a conversation: its roles, their parts, how many calls, and whether there are tools."""
    turns = [
        [message.role, bool(message.content), sorted(message.parts), len(message.parts.get("tool_calls") or ())]
        for message in messages
    ]
    return f"{json.dumps(turns)}{bool(tools)}"


def _hides(record: Record, completion: str, frame: TurnFrame) -> bool:
    """Whether reasoning of a row's answer, or text beside its calls, is missing from the completion."""
    answer = frame.without_reasoning(record.completion)
    before = record.completion[: len(record.completion) - len(answer)]
    given = str(record.answer_parts.get("reasoning_content") or "")
    beside = answer if "tool_calls" in record.answer_parts else ""
    shown = "".join(completion.split())
    return any("".join(text.split()) not in shown for text in (before, given, beside))


def _with_written_arguments(message: Message) -> Message:
    """Return a message whose calls of tools have their arguments as JSON text."""
    calls = []
    for call in message.parts.get("tool_calls") or ():
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return replace(message, parts={**message.parts, "tool_calls": calls}) if calls else message


def _tool_probes(
    messages: Sequence[Message], tools: _Tools
) -> Iterator[tuple[str, Sequence[Message], Sequence[Mapping[str, Any]]]]:
    """Yield, for each thing that a template may leave out, its name and a conversation with a mark in its place."""
    if tools:
        yield "the functions that may be called (tools)", messages, [_marked_function(tools[0]), *tools[1:]]
    for index, message in enumerate(messages):
        calls = message.parts.get("tool_calls") or ()
        for place, call in enumerate(calls):
            marked = [*calls[:place], _marked_function(call), *calls[place + 1 :]]
            probe = replace(message, parts={**message.parts, "tool_calls": marked})
            what = "calls of tools (tool_calls)" if place == 0 else "more than one call of a tool (tool_calls)"
            yield what, [*messages[:index], probe, *messages[index + 1 :]], tools
        if message.role == "tool":
            probe = replace(message, content=_mark(0))
            yield "results of tools (turns of role tool)", [*messages[:index], probe, *messages[index + 1 :]], tools


def _marked_function(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool's schema or call under a mark as its name."""
    return {**entry, "function": {**entry["function"], "name": _mark(0)}}


@lru_cache(maxsize=8)
def _added_tokens(tokenizer: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the texts of the tokens that a tokenizer keeps whole, and of the special ones among them."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(map(str, added)), frozenset(str(token) for token in added if token.special)


def _call(tokenizer: Any, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[Span], list[int]]:
    """Return token ids, each token's characters, and which are special (1)."""
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # p2d sees to the length itself, and needs no advice about it
    )
    return encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"]
