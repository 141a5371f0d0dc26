"""Every setting of every stage: one frozen model a stage, and where each value came from.

The flags of the command line, the `P2D_*` variables and the tables of a recipe are all made from these
models, so that a setting has one name, one default and one description. Torch-free.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUndefined, core_schema

from p2d_cli.errors import UsageError
from p2d_cli.registry import HEAD_METHODS, ROW_METHODS, Registry

Origin = Literal["flag", "variable", "recipe", "preset", "default"]
Scope = Literal["heads", "attention", "lora", "full"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
LONGEST_SHOWN = 200
"""Characters of a wrong value that a message shows."""
MetricName = Literal["exact_match", "token_f1", "number_match", "rougeL", "accuracy", "perplexity"]
PathSpec = str
"""A file, a folder, an artifact, or a hub id `owner/name[@revision]`."""


def _split_commas(value: Any) -> Any:
    """Take `"a,b"`, and lists of such texts, as `("a", "b")`."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(word for part in value for word in _split_commas(part))
    return value


def _json_object(value: Any) -> Any:
    """Take a JSON text for what it says, as a flag or a variable gives it; a recipe gives a table."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f'expected a JSON object such as {{"enable_thinking": false}}: {problem}') from None


@dataclass(frozen=True)
class Choice:
    """Allows the names of methods, and a few words more, as they are when a value is checked."""

    methods: Registry
    more: tuple[str, ...] = ()

    def words(self) -> tuple[str, ...]:
        """Return all words that are allowed."""
        return (*self.more, *self.methods)

    def __call__(self, value: str) -> str:
        """Return the word.

        Raises:
            PydanticCustomError: it is none of those; the message is that of a `Literal`.
        """
        words = self.words()
        if value in words:
            return value
        named = ", ".join(f"'{word}'" for word in words[:-1]) + f" or '{words[-1]}'"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": named})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check a value's type before this."""
        return core_schema.no_info_after_validator_function(self, handler(source))


HeadMethodName = Annotated[str, Choice(HEAD_METHODS, ("auto",))]
RowMethodName = Annotated[str, Choice(ROW_METHODS)]
FLOOR_QUANTILE = 0.05
FORMER_BACKGROUND = 1000
"""Rows of the background by default, before other heads read rows than are trained; not part of an identity."""
FORMER_NAMES = {"perf": "answer_weight", "perf_metric": "answer_metric"}
"""Names that settings once had; flags, variables, recipes and manifests may still call them so."""


def _none_or_some(value: Any) -> Any:
    """Take `none` for an empty list."""
    return () if value in ("none", ["none"], ("none",)) else _split_commas(value)


CommaList = BeforeValidator(_split_commas)
TemplateArguments = Annotated[dict[str, JsonValue] | None, BeforeValidator(_json_object)]
Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Epochs = Annotated[float, Field(gt=0, le=1e6)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def setting(default: Any, description: str, *, identity: bool = True, panel: str = "Method", neutral: Any = ...) -> Any:
    """Declare one setting.

    Args:
        default: its value where none is given.
        description: its help text.
        identity: whether a change of it changes the result.
        panel: the part of the help that it is shown in.
        neutral: for a setting that schema 1 did not begin with: the value, in JSON, that does what p2d did without it.
            An identity leaves the setting out at this value, so that adding it makes no finished work stale. It stays
            as it is if the default changes.
    """
    extra: dict[str, JsonValue] = {"identity": identity, "panel": panel}
    if neutral is not ...:
        extra["neutral"] = neutral
    return Field(default, description=description, json_schema_extra=extra)


def input_setting(default: Any, description: str, *, panel: str = "Input and output") -> Any:
    """Declare a setting that names something on disk; it enters an artifact's identity by digest, never by name."""
    extra: dict[str, JsonValue] = {"identity": False, "panel": panel, "input": True}
    return Field(default, description=description, json_schema_extra=extra)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError("a NUL character has no place here")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("this is no valid UTF-8") from None


def checked_path(text: str) -> str:
    """Return the path as it was given, but for `~`, which a shell leaves in `--out=~/runs` and in a recipe.

    Raises:
        ValueError: it is empty, cannot be a path, or is in a home folder that is not known.
    """
    _check_text(text)
    if not text.strip():
        raise ValueError("the path is empty; is a variable of the shell not set?")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise ValueError(f"the home folder of {text.split('/')[0]} is not known") from None


REQUIRED: Any = PydanticUndefined

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "score-heads": {"method": "pad", "selection": "top"},
        "mine-data": {"affinity": "attention", "answer_weight": "likelihood", "normalise": "pooled"},
    }
}
"""For each preset, what it sets in a stage where neither flag, variable nor recipe says otherwise."""


def declared(field: FieldInfo) -> dict[str, Any]:
    """Return what `setting` declared of a field beside its default and its help text."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


class StageConfig(BaseModel):
    """What every stage has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    out: Path = setting(REQUIRED, "Folder to write the artifact to.", identity=False, panel="Input and output")
    seed: Seed = setting(0, "The one seed; each stage derives its own from it.", panel="Run")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps.", identity=False, panel="Run")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision; auto is bfloat16 where the hardware is fast at it.", panel="Run"
    )
    max_length: Positive | None = setting(
        None, "Longest sequence in tokens; by default the model's context, at most 2048.", panel="Run"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse texts that no file name or manifest can hold, and take `~` in a path for what it stands for."""
        if isinstance(value, str | Path):
            _check_text(str(value))
            if info.field_name == "out" or declared(cls.model_fields[str(info.field_name)]).get("input"):
                return type(value)(checked_path(str(value)))
        return value

    def identity(self) -> dict[str, Any]:
        """Return the settings that change the result, resolved, without those at their neutral value."""
        extras = {name: declared(field) for name, field in type(self).model_fields.items()}
        chosen = {name for name, extra in extras.items() if extra.get("identity")}
        values = self.model_dump(mode="json", include=chosen) | self.resolved()
        return {name: value for name, value in values.items() if value != extras[name].get("neutral", ...)}

    def resolved(self) -> dict[str, Any]:
        """Return what the settings that are `auto` or not given come to, where that follows from the others."""
        return {}


_ATTENTION = re.compile(r"auto|sdpa|eager|flash_attention_[2-4]|[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?", re.ASCII)


def _attention(text: str) -> str:
    """Take the names that transformers has for attention, and those of kernels on the hub."""
    if not _ATTENTION.fullmatch(text):
        raise ValueError(
            "expected auto, sdpa, eager, flash_attention_2 (3, 4), or a kernel of the hub such as"
            " kernels-community/flash-attn2"
        )
    return text


class RowOptions(StageConfig):
    """How rows are read and shown to the model."""

    split: str | None = setting(None, "Split of a hub data set, or of a folder or glob with several.", panel="Rows")
    revision: str | None = setting(None, "Revision of a hub data set.", panel="Rows")
    prompt_column: str | None = setting(None, "Column with the prompt, if not found by itself.", panel="Rows")
    completion_column: str | None = setting(None, "Column with the answer, likewise.", panel="Rows")
    messages_column: str | None = setting(None, "Column with a conversation, likewise.", panel="Rows", neutral=None)
    system_column: str | None = setting(
        None, "Column with a system prompt; by default system.", panel="Rows", neutral=None
    )
    choices_column: str | None = setting(
        None, "Column with answers to choose from; by default choices.", panel="Rows", neutral=None
    )
    id_column: str | None = setting(None, "Column with the row's name; by default id.", panel="Rows", neutral=None)
    skip_bad_rows: bool = setting(
        False, "Leave out rows that cannot be read or shown, counted, instead of stopping.", panel="Rows"
    )
    template: Literal["auto", "chat", "plain"] = setting(
        "auto", "How a row becomes text; auto is the tokenizer's chat template if it has one.", panel="Rows"
    )
    chat_template: PathSpec | None = input_setting(
        None, "A file with a Jinja chat template, instead of the tokenizer's.", panel="Rows"
    )
    chat_template_kwargs: TemplateArguments = setting(
        None,
        'Values of the chat template\'s own variables, as JSON such as {"enable_thinking": false}.',
        identity=False,
        panel="Rows",
    )
    system: str | None = setting(None, "System prompt of the rows that bring none.", panel="Rows", neutral=None)
    token_budget: Positive = setting(
        8192, "Tokens of one forward batch, padding included (not for train).", identity=False, panel="Run"
    )

    device_map: Literal["auto"] | None = setting(
        None,
        "auto: divide a model that is too large for one device over all there are, then main memory, then the disk "
        "(for stages that read; train has FSDP for that).",
        identity=False,
        panel="Run",
    )
    # Like the device it moves results by no more than rounding, so it stays outside the identity.
    attn_implementation: Annotated[str, AfterValidator(_attention)] = setting(
        "auto",
        "auto, sdpa, eager, flash_attention_2, or a hub id such as kernels-community/flash-attn2, whose code is run; "
        "auto is sdpa, or eager for families without it.",
        identity=False,
        panel="Run",
    )

    @property
    def asks_for_flash(self) -> bool:
        """Whether attention is computed by a kernel for rows of several lengths; transformers tells it by the name."""
        return "flash" in self.attn_implementation

    @model_validator(mode="after")
    def _readable(self) -> RowOptions:
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"--device-map auto chooses the devices itself and excludes --device {self.device}: give one of them"
            )
        if self.template == "plain" and self.chat_template is not None:
            raise ValueError("--template plain and --chat-template exclude each other: give one of them")
        if self.template == "plain" and self.chat_template_kwargs:
            raise ValueError("--template plain and --chat-template-kwargs exclude each other: give one of them")
        if self.messages_column is not None and (self.prompt_column or self.completion_column):
            raise ValueError("--messages-column excludes --prompt-column and --completion-column: a row has one shape")
        return self


def _layer_span(text: str) -> str:
    if text not in {"auto", "all"} and not re.fullmatch(r"\d{1,6}-\d{1,6}", text, re.ASCII):
        raise ValueError("expected auto, all, or the first and the last layer, from 0, such as 15-29")
    return text


def _depths(text: str) -> str:
    """Take two numbers of layers, of which the second is not the smaller one."""
    if text in {"auto", "trained"}:
        return text
    found = re.fullmatch(r"(\d{1,6}),(\d{1,6})", text.replace(" ", ""), re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError("expected auto, trained, or two numbers of layers, such as 3,15")
    return found[0]


class ScoreHeadsConfig(RowOptions):
    """Settings of `p2d score-heads`."""

    model: PathSpec = input_setting(REQUIRED, "Base model: folder or hub id.")
    target: PathSpec | None = input_setting(None, "Rows of the target task.")
    pool: PathSpec | None = input_setting(None, "Pool rows, for contrast and readout.")
    scores: PathSpec | None = input_setting(
        None, "heads artifact of this model, to select anew by its scores; nothing is scored."
    )
    preset: Literal["paper"] | None = setting(None, "paper: the published recipe, pad.", identity=False)
    method: HeadMethodName = setting(
        "auto", "How heads are scored; auto is readout with a pool and no --task-model, else pad."
    )
    ratio: Ratio = setting(0.1, "Share of all heads to select.")
    selection: Literal["auto", "top", "spread"] = setting(
        "auto",
        "top: the highest scores; spread: the highest with an even share of each layer and one head a KV group; auto: "
        "spread for readout and contrast, top for the others.",
        neutral="top",
    )
    layers: Annotated[str, AfterValidator(_layer_span)] | None = setting(
        "auto",
        "Layers among which heads are selected for training, from 0, such as 15-29, or all; auto: the upper half where "
        "other heads read rows (--depth), else all.",
        neutral=None,
    )
    depth: Annotated[str, AfterValidator(_depths)] = setting(
        "auto",
        "Layers that mine-data reads of all rows, and of the best of them, such as 3,15, by heads of their own; auto: "
        "a tenth and two thirds of all (for pad: trained); trained: the heads that are trained read all rows.",
        neutral="trained",
    )
    repeats: Positive = setting(1, "Re-draw the samples this often and record how the ranking repeats.")
    task_model: PathSpec | None = input_setting(
        None, "A fine-tuned model to compare with (pad); otherwise p2d tunes a proxy."
    )
    weights: Literal["product", "qkv"] = setting("product", "pad: what of a head's weights is compared.", panel="pad")
    distance: Literal["w1", "kl", "js", "cosine", "l2", "relative-l2"] = setting(
        "w1", "pad: distance between the two.", panel="pad"
    )
    temperature: Annotated[float, Field(gt=0)] = setting(1.0, "pad: softmax temperature.", panel="pad")
    proxy_samples: Positive = setting(
        100, "Rows that the proxy is tuned on; also the target rows of taylor and readout.", panel="pad"
    )
    proxy_epochs: Positive = setting(1, "pad: epochs of the proxy.", panel="pad")
    proxy_lr: Annotated[float, Field(gt=0)] = setting(1e-4, "pad: learning rate of the proxy.", panel="pad")
    proxy_batch_size: Positive = setting(8, "pad: rows a step of the proxy.", panel="pad")
    episodes: Positive = setting(192, "contrast: few-shot episodes to look at.", panel="contrast")
    demos: Annotated[int, Field(ge=2)] = setting(
        5, "contrast: demos an episode, one from the target.", panel="contrast"
    )
    background: Annotated[int, Field(ge=4)] = setting(
        250, "readout: pool rows that the target's rows are told from.", panel="readout", neutral=FORMER_BACKGROUND
    )

    @property
    def resolved_method(self) -> str:
        """The method given, or the one that follows from the inputs."""
        if self.method != "auto":
            return self.method
        return "readout" if self.pool is not None and self.task_model is None else "pad"

    @property
    def resolved_selection(self) -> str:
        """The selection given, or the one that goes with the method."""
        if self.selection != "auto":
            return self.selection
        return "spread" if HEAD_METHODS[self.resolved_method].spreads else "top"

    @property
    def reads_apart(self) -> bool:
        """Whether other heads read rows than those that are trained."""
        return self.depth != "trained" and bool(HEAD_METHODS[self.resolved_method].reads_apart)

    @property
    def pool_readings(self) -> int:
        """Of how many pool rows the artifact keeps what the reading heads put out; 0 if it keeps none."""
        return self.background if self.reads_apart and self.resolved_method == "readout" else 0

    @property
    def resolved_layers(self) -> str | None:
        """The layers given, `upper`, or None for all."""
        if self.layers == "auto":
            return "upper" if self.reads_apart else None
        return None if self.layers in {"all", None} else self.layers

    def resolved(self) -> dict[str, Any]:
        """Return the method, the selection and its layers, and how deep rows are read."""
        return {
            "method": self.resolved_method,
            "selection": self.resolved_selection,
            "layers": self.resolved_layers,
            "depth": self.depth if self.reads_apart else "trained",
        }


class MineDataConfig(RowOptions):
    """Settings of `p2d mine-data`."""

    model: PathSpec = input_setting(REQUIRED, "Model that the rows are for, and that reads them: folder or hub id.")
    heads: PathSpec | None = input_setting(None, "heads artifact (for p2d), of the model that reads the rows.")
    scorer_model: PathSpec | None = input_setting(
        None, "A smaller model that reads the rows in the place of --model, which they are meant for (weak to strong)."
    )
    allow_other_tokenizer: bool = setting(
        False, "Let a --scorer-model read the rows with another tokenizer than --model's.", identity=False, panel="Run"
    )
    pool: PathSpec = input_setting(REQUIRED, "Rows to choose from.")
    scores: PathSpec | None = input_setting(
        None, "subset artifact of this pool, to choose anew by the scores it keeps of all rows; nothing is scored."
    )
    target: PathSpec | None = input_setting(
        None,
        "Rows of the target task. Without them attention lets two halves of the pool query each other, embedding and "
        "lexical take the pool's mean.",
    )
    relevance: PathSpec | None = input_setting(
        None,
        'JSON file {"relevant": [ids]}: pool rows known to be of the target\'s task, for measuring; the choice is made'
        " without it.",
    )
    method: RowMethodName = setting("p2d", "How rows are scored.")
    ratio: Ratio | None = setting(None, "Share of the pool to keep (0.1 if --count is not given).")
    count: Positive | None = setting(None, "Number of rows to keep, instead of --ratio.")
    count_of: PathSpec | None = input_setting(
        None, "subset artifact: keep as many rows as it has, by whatever it chose them.", panel="Method"
    )
    answer_weight: Literal["likelihood", "generate", "none"] = setting(
        "likelihood", "How well an episode answers: likelihood of the reference, a generated answer's metric, or 1."
    )
    answer_metric: Literal["exact_match", "token_f1", "rougeL", "number_match"] = setting(
        "token_f1", "Metric of a generated answer (with --answer-weight generate)."
    )
    draws: Positive = setting(2, "Episodes that each pool row is a demo of.")
    demos: Positive = setting(5, "Demos an episode.")
    queries: Positive = setting(1, "Target rows an episode.")
    normalise: Literal["pooled", "per-head"] = setting(
        "pooled", "Share of attention: of the heads' sum, or the mean of each head's own."
    )
    layer: Annotated[int, Field(ge=0)] | None = setting(
        None, "data-whisperer: the layer to read, from 0; the middle one by default."
    )
    max_new_tokens: Positive = setting(64, "Longest generated answer (with --answer-weight generate).")

    preset: Literal["paper"] | None = setting(
        None, "paper: the published recipe, attention from target queries to few-shot demos.", identity=False
    )
    affinity: Literal["auto", "readout", "attention"] = setting(
        "auto",
        "p2d: how heads respond to a row. readout: their outputs are like those on the target's rows; attention: "
        "target queries look at it among demos. auto is readout where target rows are given.",
        neutral="attention",
    )
    background: Annotated[int, Field(ge=2)] | None = setting(
        None,
        "Random pool rows that the readout tells the target's rows from; by default 250, and 1,000 where all rows are "
        "read by the same heads.",
        panel="readout",
        neutral=FORMER_BACKGROUND,
    )
    refine: Ratio | None = setting(
        None,
        "Share of the pool that is read on by deeper heads: the best by the first ones (score-heads --depth); "
        "by default 0.02 to 0.04, and more as long as rows of the task are found, up to three times what may be kept.",
        panel="readout",
        neutral=None,
    )
    index: Path | None = setting(
        None,
        "Folder that keeps what the first layers' heads make of the pool, and for embedding and rds its hidden states, "
        "so that a further target does not read it again; made if it is not there, and rows that it lacks are added.",
        identity=False,
        panel="readout",
    )
    pick: Literal["auto", "top", "cover"] = setting(
        "auto",
        "Which of the rows above the floor are kept where they are more than may be. cover: rows that are like the "
        "others in their words; top: those of the highest scores; auto: cover, where there is a floor.",
        panel="readout",
        neutral="top",
    )
    shortlist: Ratio = setting(
        1.0,
        "Share of the pool, most like the target rows in its words (TF-IDF), that the model reads and chooses from "
        "(for p2d, data-whisperer, embedding and rds).",
        neutral=1.0,
    )
    floor_quantile: Annotated[float, Field(ge=0, lt=1)] | None = setting(
        None,
        "Keep no row below the score that so small a share of the task's rows falls short of, as target rows tell that "
        "a readout was fitted without; --ratio or --count is then the most that is kept. 0 keeps all; by default 0.05, "
        "or as for --scores.",
        panel="readout",
        neutral=0.0,
    )

    @property
    def resolved_floor(self) -> float:
        """The quantile given, or the one that goes with the method; 0 where none sets a floor."""
        sets_floor = bool(ROW_METHODS[self.method].sets_floor) and (
            self.scores is not None or self.resolved_affinity == "readout"
        )
        default = FLOOR_QUANTILE if self.scores is None else 0.0
        return (default if self.floor_quantile is None else self.floor_quantile) if sets_floor else 0.0

    @property
    def keeps_floor(self) -> bool:
        """Whether the floor is the one that `scores` were found with, if they were found with any."""
        return self.scores is not None and self.floor_quantile is None and bool(ROW_METHODS[self.method].sets_floor)

    @property
    def has_floor(self) -> bool:
        """Whether rows that are less like the target than its own are left out."""
        return self.resolved_floor > 0

    @property
    def has_shortlist(self) -> bool:
        """Whether words choose which rows the model reads."""
        return self.scores is None and self.shortlist < 1 and bool(ROW_METHODS[self.method].takes_shortlist)

    @property
    def resolved_affinity(self) -> Literal["readout", "attention"]:
        """The affinity given, or the one that follows from the inputs."""
        if self.affinity == "auto":
            return "readout" if self.target is not None else "attention"
        return self.affinity

    def resolved(self) -> dict[str, Any]:
        """Return the affinity and the floor, and the background of a readout; neutral ones where none is used."""
        is_used = ROW_METHODS[self.method].takes_heads and self.scores is None
        affinity = self.resolved_affinity if is_used else "attention"
        return {
            "affinity": affinity,
            "background": self.background if affinity == "readout" else FORMER_BACKGROUND,
            "floor_quantile": None if self.keeps_floor else self.resolved_floor,
            "pick": self.pick if affinity == "readout" or self.scores is not None else "top",
        }

    @model_validator(mode="after")
    def _consistent(self) -> MineDataConfig:
        ROW_METHODS[self.method].check_settings(self)
        if self.pick == "cover" and self.floor_quantile == 0:
            raise ValueError(
                "--pick cover chooses among the rows above the floor, and --floor-quantile 0 sets none; --method"
                " coverage covers a whole pool"
            )
        if self.has_shortlist and self.target is None:
            raise ValueError("--shortlist needs --target: rows that the pool's rows are compared with")
        if self.has_shortlist and self.count is None and (share := self.ratio or 0.1) > self.shortlist:
            raise ValueError(f"--shortlist {self.shortlist:g} is less than the share of rows to keep, {share:g}")
        sizes = {"--ratio": self.ratio, "--count": self.count, "--count-of": self.count_of}
        if len(given := [flag for flag, size in sizes.items() if size is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
        return self


LoraTarget = Literal["all-linear", "attention", "q", "k", "v", "o"]


class TrainConfig(RowOptions):
    """Settings of `p2d train`."""

    model: PathSpec = input_setting(REQUIRED, "Base model: folder or hub id.")
    data: PathSpec = input_setting(REQUIRED, "subset artifact, file, folder, glob in quotes, or hub id.")
    heads: PathSpec | None = input_setting(None, "heads artifact (for --scope heads).")
    scope: Scope | None = setting(None, "heads, attention, lora or full; heads if --heads is given, else lora.")
    loss_on: Literal["all", "last"] = setting(
        "all", "Learn every answer of a conversation, or the last alone.", panel="Rows", neutral="all"
    )
    projections: Annotated[tuple[Literal["q", "k", "v", "o"], ...], BeforeValidator(_none_or_some)] = setting(
        ("q", "k", "v", "o"), "Projections of the selected heads to train, of q,k,v,o; none trains --channels alone."
    )
    channels: Annotated[float, Field(ge=0, le=1)] = setting(
        0.0,
        "Share of the MLPs' channels to train as well, evenly spread over the layers from the lowest selected head on.",
        neutral=0.0,
    )
    epochs: Epochs = setting(3.0, "Passes over the rows.", panel="Optimisation")
    max_steps: Positive | None = setting(
        None, "Stop after so many updates; a reference cut short is extrapolated by report-aer.", panel="Optimisation"
    )
    lr: Annotated[float, Field(gt=0)] | Literal["probe"] | None = setting(
        None,
        "Peak learning rate, or probe: the best of a third of the default, the default and three times as much, by a "
        "few updates each. By default it falls with the model's hidden size and the share of the heads: a tenth of "
        "them has 3e-3 in a model of 135M parameters, 4.2e-4 in one of 8B.",
        panel="Optimisation",
    )
    batch_size: Positive | Literal["auto"] = setting(
        "auto",
        "Rows an update, over all devices' micro-batches; auto: the largest of 16, 8, 4, 2 with 60 updates or more.",
        panel="Optimisation",
    )
    accumulation: Positive = setting(1, "Micro-batches an update; batch-size is divided by it.", panel="Optimisation")
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "Learning-rate schedule after warm-up.", panel="Optimisation"
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.03, "Share of the updates that warm up, from above 0 to the peak rate.", panel="Optimisation"
    )
    weight_decay: Annotated[float, Field(ge=0)] = setting(0.0, "AdamW weight decay.", panel="Optimisation")
    max_grad_norm: Annotated[float, Field(gt=0)] = setting(1.0, "Clip gradients to this norm.", panel="Optimisation")
    eval_data: PathSpec | None = input_setting(
        None,
        "Held-out rows; the weights with the lowest loss on them are kept. The untrained model is looked at as well.",
    )
    eval_steps: Positive | None = setting(
        None, "Updates between looks at --eval-data; by default once an epoch.", panel="Optimisation", neutral=None
    )
    patience: Positive | None = setting(
        None,
        "Stop after so many looks at --eval-data in a row without a lower loss.",
        panel="Optimisation",
        neutral=None,
    )
    lora_targets: Annotated[tuple[LoraTarget, ...], CommaList] | None = setting(
        None,
        "What a LoRA adapts: all-linear (every linear layer but the output embedding, routers and what PEFT does not "
        "take), attention, or some of q,k,v,o; by default all-linear, or what --projections names.",
        panel="LoRA",
        neutral=None,
    )
    lora_rank: Positive = setting(16, "Rank (for --scope lora).", panel="LoRA")
    lora_alpha: Positive = setting(8, "Alpha (for --scope lora).", panel="LoRA")
    lora_scaling: Literal["rslora", "plain"] = setting(
        "rslora",
        "What the update is scaled by: rslora alpha / sqrt(rank), plain alpha / rank.",
        panel="LoRA",
        neutral="plain",
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = setting(0.0, "Dropout (for --scope lora).", panel="LoRA")
    checkpointing: bool = setting(
        False, "Recompute activations in the backward pass to save memory.", identity=False, panel="Run"
    )
    packing: bool | None = setting(
        None,
        "Lay the rows of a micro-batch one after the other instead of padding them; the loss is the same. By default "
        "with flash attention, if the model keeps the rows apart.",
        identity=False,
        panel="Run",
    )
    cache_frozen: bool = setting(
        True,
        "Compute the layers below the lowest trained one once a row, and keep their outputs for later epochs.",
        identity=False,
        panel="Run",
    )
    base_quantization: Literal["none", "4bit"] = setting(
        "none",
        "4bit: keep the frozen base model in 4 bits, for scopes heads and lora (needs bitsandbytes).",
        panel="Run",
        neutral="none",
    )
    checkpoint_minutes: Annotated[float, Field(ge=0)] = setting(
        10.0,
        "Minutes between checkpoints, from which the same command goes on after an interruption; 0: every update.",
        identity=False,
        panel="Run",
    )
    tracker: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], CommaList] = setting(
        (), "Send the loss to these trackers too.", identity=False, panel="Run"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.device_map is not None:
            raise ValueError(
                "--device-map divides a model for reading, one part waiting for the other, and keeps no gradients of "
                "parts that are put aside: train a model that is too large for one device with FSDP, under torchrun or "
                "accelerate launch"
            )
        if self.scope == "heads" and self.heads is None:
            raise ValueError("--scope heads needs --heads: the artifact that score-heads wrote")
        if self.batch_size != "auto" and self.batch_size % self.accumulation:
            raise ValueError(f"--batch-size {self.batch_size} is not a multiple of --accumulation {self.accumulation}")
        if self.base_quantization != "none" and not self.makes_adapter:
            raise ValueError(f"--base-quantization 4bit freezes the weights that --scope {self.resolved_scope} trains")
        for name in ("eval_steps", "patience"):
            if getattr(self, name) is not None and self.eval_data is None:
                raise ValueError(f"{flag_name(name)} needs --eval-data: rows to look at")
        if not self.projections and not self.channels:
            raise ValueError("--projections is empty: name some of q,k,v,o, or train --channels alone")
        whole = {"all-linear", "attention"} & set(self.lora_targets or ())
        if self.lora_targets == () or (whole and len(self.lora_targets or ()) > 1):
            raise ValueError("--lora-targets: expected all-linear, attention, or some of q,k,v,o")
        return self

    @property
    def resolved_scope(self) -> Scope:
        """The scope given, or the one that follows from the inputs."""
        return self.scope or ("heads" if self.heads is not None else "lora")

    @property
    def tries_packing(self) -> bool:
        """Whether rows are packed, if the model keeps them apart."""
        return self.asks_for_flash if self.packing is None else self.packing

    @property
    def makes_adapter(self) -> bool:
        """Whether what is written is an adapter, and not the whole model."""
        return self.resolved_scope in {"heads", "lora"}

    @model_validator(mode="before")
    @classmethod
    def _lora_targets_named(cls, values: Any) -> Any:
        """Take LoRA's targets from `projections`, which version 0.1.0 called them by, or else all linear layers."""
        if isinstance(values, dict) and values.get("lora_targets") is None:
            return values | {"lora_targets": _none_or_some(values.get("projections", "none")) or ("all-linear",)}
        return values

    @property
    def resolved_lora_targets(self) -> tuple[LoraTarget, ...]:
        """What a LoRA adapts, `attention` being all of q, k, v and o."""
        targets = self.lora_targets or ("all-linear",)
        return ("q", "k", "v", "o") if targets == ("attention",) else targets

    def resolved(self) -> dict[str, Any]:
        """Return the scope, and what a LoRA adapts, which once was called its projections."""
        scope, targets = self.resolved_scope, self.resolved_lora_targets
        if scope != "lora":
            # As version 0.1.0 recorded what it did not use.
            unused = {"lora_targets": None, "lora_scaling": "plain", "lora_rank": 16, "lora_alpha": 32}
            return {"scope": scope, "lora_dropout": 0.0} | unused | ({} if scope == "heads" else {"channels": 0.0})
        is_all = targets == ("all-linear",)
        named: dict[str, Any] = {"projections": [], "lora_targets": [*targets]}
        adapted = named if is_all else {"projections": [*targets], "lora_targets": None}
        return {"scope": scope, "channels": 0.0} | adapted


class EvalConfig(RowOptions):
    """Settings of `p2d eval`."""

    model: PathSpec = input_setting(REQUIRED, "Model: folder, fully trained artifact or hub id.")
    data: PathSpec | None = input_setting(None, "Rows to be scored on (required without --lm-eval).")
    adapter: PathSpec | None = input_setting(None, "adapter artifact or PEFT folder.")
    metric: Annotated[tuple[MetricName, ...], CommaList] = setting(
        ("exact_match", "token_f1"),
        "exact_match, token_f1, number_match, rougeL, accuracy or perplexity; repeat or separate by commas.",
    )
    limit: Positive | None = setting(None, "Only the first so many rows.")
    max_new_tokens: Positive = setting(128, "Longest answer to generate.")
    stop: tuple[str, ...] = setting((), "Cut answers at this string; can be repeated.")
    choices: PathSpec | None = input_setting(
        None,
        "JSON list of the answers to choose from (for accuracy), where rows bring none of their own.",
        panel="Method",
    )
    allow_template_mismatch: bool = setting(
        False, "Evaluate with other prompts than the model was trained with.", identity=False, panel="Rows"
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = setting(0.95, "Level of the intervals.")

    lm_eval: Annotated[tuple[str, ...], CommaList] = setting(
        (),
        "Run these tasks of lm-eval, with its prompts, metrics and seeds, instead of --metric on --data; repeat or "
        "separate by commas.",
        panel="lm-eval",
        neutral=[],
    )
    lm_eval_tasks: PathSpec | None = input_setting(
        None, "Folder with task files of your own; lm-eval runs the code they name.", panel="lm-eval"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        if not self.metric:
            raise ValueError("--metric is empty: name at least one metric")
        if self.data is None and not self.lm_eval:
            raise ValueError("--data is required (or --lm-eval TASKS, which bring their own rows)")
        if self.data is not None and self.lm_eval:
            raise ValueError("--data and --lm-eval exclude each other: the tasks of lm-eval bring their own rows")
        if self.lm_eval_tasks is not None and not self.lm_eval:
            raise ValueError("--lm-eval-tasks needs --lm-eval: the names of the tasks to run")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that change the result; those of the way that is not taken do not."""
        unused = {"metric", "max_new_tokens", "stop"} if self.lm_eval else set()
        return {name: value for name, value in super().identity().items() if name not in unused}


class ReportAerConfig(StageConfig):
    """Settings of `p2d report-aer`."""

    evaluations: tuple[PathSpec, ...] = input_setting(REQUIRED, "evaluation artifacts to compare.")
    reference: PathSpec = input_setting(REQUIRED, "evaluation artifact of the full fine-tuning.")
    recipe: PathSpec | None = input_setting(None, "Recipe that made the runs, to be shown.")
    allow_mixed: bool = setting(
        False, "Compare runs of another model, hardware, precision or number of epochs too, flagged."
    )


class ExportConfig(StageConfig):
    """Settings of `p2d export`."""

    adapter: PathSpec = input_setting(REQUIRED, "adapter artifact or PEFT folder.")
    model: PathSpec | None = input_setting(None, "Base model, if it is no longer where the adapter was trained.")


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "score-heads": ScoreHeadsConfig,
    "mine-data": MineDataConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "report-aer": ReportAerConfig,
    "export": ExportConfig,
}
SEED_MARK = "{seed}"
"""In a path of a recipe: the seed of the stage that reads it."""
INPUT_FIELDS = frozenset(
    name
    for config in STAGE_CONFIGS.values()
    for name, field in config.model_fields.items()
    if declared(field).get("input")
)


ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class Resolved(Generic[ConfigT]):
    """A config together with where each of its values came from."""

    config: ConfigT
    origins: dict[str, Origin]
    aimed: frozenset[str] = frozenset()
    """Settings given for this work alone: by flags of its own command, or by a recipe's table of its scope."""

    def provenance(self) -> dict[str, dict[str, Any]]:
        """Return `{field: {"value": ..., "origin": ...}}` in plain JSON types, for the manifest."""
        values = self.config.model_dump(mode="json")
        return {name: {"value": value, "origin": self.origins[name]} for name, value in values.items()}


def resolve(
    model: type[ConfigT],
    *,
    flags: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Resolved[ConfigT]:
    """Merge flag > `P2D_*` variable > recipe > preset > default into a checked config.

    Raises:
        UsageError: for unknown keys, with the nearest known one, and for all bad values together.
    """
    fields = model.model_fields
    sources: dict[Origin, dict[str, Any]] = {
        "recipe": known_keys(recipe or {}, fields, where="recipe"),
        "variable": _variables(os.environ if environ is None else environ, fields),
        "flag": dict(flags),
    }
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(fields, "default")
    for origin, settings in sources.items():
        values |= settings
        origins |= dict.fromkeys(settings, origin)
    stage = next((stage for stage, config in STAGE_CONFIGS.items() if config is model), "")
    # An unknown preset sets nothing, and is refused when the config is made.
    presets = [known.get(stage, {}) for name, known in PRESETS.items() if name == values.get("preset")]
    preset = {key: value for known in presets for key, value in known.items() if key not in values}
    values |= preset
    origins |= dict.fromkeys(preset, "preset")
    values |= _seeded({name: value for name, value in values.items() if origins[name] == "recipe"}, values)
    try:
        return Resolved(model(**values), origins, frozenset(flags))
    except ValidationError as problems:
        raise UsageError(_explain(problems, origins)) from None


def _seeded(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's inputs that are named after the seed, as `target-{seed}.jsonl`, for the seed in `values`."""
    return {
        name: value.replace(SEED_MARK, str(values.get("seed", 0)))
        for name, value in recipe.items()
        if name in INPUT_FIELDS and isinstance(value, str) and SEED_MARK in value
    }


def known_keys(table: Mapping[str, Any], fields: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return a table under the names of fields, which are its keys with `_` for `-`.

    Raises:
        UsageError: a key is no field's name; the message says `where` it stands.
    """
    known: dict[str, Any] = {}
    for key, value in table.items():
        name = field_name(key)
        if name not in fields:
            raise UsageError(f"unknown key '{key}' in the {where}", hint=suggestion(name, sorted(_with_former(fields))))
        if name in known:
            raise UsageError(f"the {where} has '{name}' twice, once as '{key}'", hint="give it once")
        known[name] = value
    return known


def field_name(key: str) -> str:
    """Return the field that a key of a recipe, or a former name, means."""
    name = key.replace("-", "_")
    return FORMER_NAMES.get(name, name)


def _with_former(fields: Iterable[str]) -> set[str]:
    """Return the names of fields, with those that some of them once had."""
    known = set(fields)
    return known | {former for former, name in FORMER_NAMES.items() if name in known}


def _variables(environ: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    every_field = _with_former({name for config in STAGE_CONFIGS.values() for name in config.model_fields})
    found: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith("P2D_"):
            continue
        name = field_name(variable.removeprefix("P2D_").lower())
        if name in found:
            raise UsageError(f"{variable} and P2D_{name.upper()} are one setting", hint="set one of them")
        if name in fields:
            found[name] = value
        elif name not in every_field and (near := difflib.get_close_matches(name, every_field, n=1, cutoff=0.8)):
            raise UsageError(f"unknown variable {variable}", hint=f"did you mean P2D_{near[0].upper()}?")
    return found


def suggestion(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return `did you mean ...?`, or the whole list where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else "known are: " + ", ".join(sorted(known))


def flag_name(field: str) -> str:
    """Return the flag of a field: `max_length` is `--max-length`."""
    return "--" + field.replace("_", "-")


def shown(value: Any) -> str:
    """Return a value as a message shows it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} that is too large to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _explain(problems: ValidationError, origins: Mapping[str, Origin]) -> str:
    lines: list[str] = []
    kinds: dict[str, list[str]] = {}
    for problem in problems.errors():
        field = str(problem["loc"][0]) if problem["loc"] else ""
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            lines.append(f"{flag_name(field)} is required")
        elif not field:
            lines.append(text)
        else:
            found = f"got {shown(problem['input'])} ({origins.get(field, 'flag')})"
            kinds.setdefault(f"{flag_name(field)}: {{}}; {found}", []).append(f"{text[0].lower()}{text[1:]}")
    # A setting that takes a number or a word has a problem of each kind.
    lines += [line.replace("{}", " or ".join(texts), 1) for line, texts in kinds.items()]
    if len(lines) == 1:
        return lines[0]
    return "several settings are wrong:\n" + "\n".join(f"  {line}" for line in lines)
