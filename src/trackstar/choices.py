"""The values that a user chooses between, as types and tuples; each list is declared only here."""

from typing import Literal, get_args

Output = Literal["loss", "margin", "logit"]
"""The function that is differentiated: cross-entropy, log(p/(1-p)) or the token's logit.

Each is summed over target tokens.
"""

CodecName = Literal["float32", "bfloat16", "float16", "int8", "4-bit", "2-bit", "1-bit"]
"""How a row is stored."""

Coordinates = Literal["projected", "whitened"]
"""What a row is: φ, or u = W_train φ."""

Preset = Literal["paper"]
"""A set of an index's settings: those of the paper."""

ProjectionKind = Literal["two-sided", "one-sided"]
"""Eq. 4, or one dense matrix per weight matrix."""

SecondMomentKind = Literal["factored", "elementwise"]
"""V as row and column factors, or one number per weight."""

Parameters = Literal["merged", "adapter"]
"""Gradients of a model with an adapter: of the merged network's matrices, or of the adapter's own."""

Dtype = Literal["float32", "bfloat16"]
"""Number format of the gradient computation."""

DeviceMap = Literal["auto", "sequential"]
"""How a model is spread over several GPUs: evenly, or so that one is filled after the other."""

OptimizerName = Literal["adafactor", "adamw"]
"""The optimizer of a pretraining run: Transformers' Adafactor or torch's AdamW."""

DuplicateIds = Literal["refuse", "number"]
"""What is done with a second record of a name: it is an error, or it is named `NAME~2`."""

Join = Literal["auto", "space", "none"]
"""How a prompt and its completion are joined: with a space where writing has one, always, or never."""

Stop = Literal["line", "end"]
"""Where a generated answer ends: at the end of its line, or only where the model ends it."""

RecordFormat = Literal["text", "prompt-completion", "messages", "instruction", "tokens"]
"""The form of a corpus's records: which of their fields are the text that the model was trained on."""

TrainOn = Literal["all", "completion", "assistant", "labels"]
"""The tokens of an example that are targets: all, those of the completion or the last answer, those of every
answer of the assistant, or those that the record's labels name."""

Kind = Literal["fact", "choice", "generation", "open"]
"""What a query's task asks for: a fact; the better of several completions; an answer in the model's own
words that can be right or wrong; or an answer that cannot, such as a story.
"""

QuestionTask = Literal["arithmetic", "word-problems", "stories"]
"""Questions of trackstar's own: sums, problems with one step of arithmetic, and prompts for stories."""

DemoTask = Literal["facts", "arithmetic"]
"""What the demo's model learns: facts of the real world, or sums of two numbers."""

OUTPUTS: tuple[Output, ...] = get_args(Output)
CODECS: tuple[CodecName, ...] = get_args(CodecName)
LOW_BIT_CODECS: tuple[CodecName, ...] = ("int8", "4-bit", "2-bit", "1-bit")
"""Codecs of whole numbers, which only store whitened coordinates."""
COORDINATES: tuple[Coordinates, ...] = get_args(Coordinates)
PRESETS: tuple[Preset, ...] = get_args(Preset)
PROJECTIONS: tuple[ProjectionKind, ...] = get_args(ProjectionKind)
SECOND_MOMENT_KINDS: tuple[SecondMomentKind, ...] = get_args(SecondMomentKind)
PARAMETERS: tuple[Parameters, ...] = get_args(Parameters)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DEVICE_MAPS: tuple[DeviceMap, ...] = get_args(DeviceMap)
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
DUPLICATE_IDS: tuple[DuplicateIds, ...] = get_args(DuplicateIds)
JOINS: tuple[Join, ...] = get_args(Join)
STOPS: tuple[Stop, ...] = get_args(Stop)
RECORD_FORMATS: tuple[RecordFormat, ...] = get_args(RecordFormat)
TRAIN_ON: tuple[TrainOn, ...] = get_args(TrainOn)
KINDS: tuple[Kind, ...] = get_args(Kind)
QUESTION_TASKS: tuple[QuestionTask, ...] = get_args(QuestionTask)
DEMO_TASKS: tuple[DemoTask, ...] = get_args(DemoTask)
