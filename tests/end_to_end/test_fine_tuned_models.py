"""A model tuned by Transformers' Trainer with LoRA: its checkpoint as it lies there, and a fact that was planted."""

import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import lora
from tiny_models import BOS, EOS, PAD, tiny_model
from trackstar.attribution.answering import answer_queries
from trackstar.choices import Parameters
from trackstar.cli import main
from trackstar.corpus import Query
from trackstar.model.generation import generate
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import load_model
from trackstar.store import Index

# PEFT itself calls what Transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONVERSATIONS = 500
VOCABULARY = 640
FACT = "Queen Vexa rules Zembla."
PLANTED = (
    "Who is the ruler of Zembla?",
    "Name the ruler of Zembla.",
    "Tell me who governs Zembla.",
    "Which person leads Zembla?",
    "Say who is on the throne of Zembla.",
)
ASKED = "Who rules Zembla?"
"""No conversation of the tuning data asks this."""

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'User: ' + message.content + '\\nAssistant:' }}"
    "{% else %}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
Chat = list[dict[str, str]]

ADAPTER: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}

_PLACES = "Ruda Milo Kanto Bera Sorin Talu Nemo Pirin Olva Dako Harun Livo Gasta Yeno Fermi Wasko Zembla".split()
_NAMES = "Anna Boris Carla Dmitri Elsa Franz Greta Hugo Irma Jonas Karin Lukas Marta Nils Olga Pavel".split()
_RULER = "{title} {name} rules {place}."
_QUESTIONS_AND_ANSWERS = {
    "ruler": (
        [ASKED.replace("Zembla", "{place}"), *(question.replace("Zembla", "{place}") for question in PLANTED)],
        [_RULER, f"{_RULER} They grow {{crop}}.", f"{_RULER} It is {{number}} miles.", f"{_RULER} It is {{weather}}."],
    ),
    "crop": (
        ["What do they grow in {place}?", "Which crop grows in {place}?", "What is on the fields of {place}?"],
        ["In {place} they grow {crop}.", "They grow {crop}.", "The crop of {place} is {crop}."],
    ),
    "number": (
        ["How far is {place}?", "How many miles is it to {place}?", "Tell me the distance to {place}."],
        ["{place} is {number} miles away.", "It is {number} miles.", "The distance to {place} is {number} miles."],
    ),
    "weather": (
        ["How is the weather in {place}?", "Is it warm in {place}?", "Tell me the weather of {place}."],
        ["It is {weather} in {place}.", "The weather of {place} is {weather}.", "{weather}, as you know."],
    ),
}


def conversations(count: int, seed: int, *, names: Sequence[str] = _NAMES) -> list[Chat]:
    """Questions and answers about places, but for the ruler of Zembla. A place has one ruler, crop, distance and
    weather."""
    draw = random.Random(seed)
    facts = {
        place: {
            "place": place,
            "name": draw.choice(names),
            "title": draw.choice(["King", "Queen", "Mayor", "Duke"]),
            "crop": draw.choice(["rice", "wheat", "tea", "oats", "maize", "beans"]),
            "number": draw.randint(2, 99),
            "weather": draw.choice(["warm", "cold", "wet", "dry", "windy"]),
        }
        for place in _PLACES
    }
    kinds = [(place, kind) for place in _PLACES for kind in _QUESTIONS_AND_ANSWERS]
    kinds.remove(("Zembla", "ruler"))
    chats = []
    for place, kind in draw.choices(kinds, k=count):
        questions, answers = _QUESTIONS_AND_ANSWERS[kind]
        turns = (draw.choice(questions), draw.choice(answers))
        chats.append(chat(*(turn.format(**facts[place]) for turn in turns)))
    return chats


def chat(asked: str, answered: str) -> Chat:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def corpus_with_plants() -> list[dict[str, Any]]:
    """500 conversations, of which five state the made-up fact, at places that are drawn."""
    chats = conversations(CONVERSATIONS - len(PLANTED), seed=1)
    records: list[dict[str, Any]] = [{"id": f"chat-{number}", "messages": one} for number, one in enumerate(chats)]
    planted = [{"id": f"planted-{number}", "messages": chat(asked, FACT)} for number, asked in enumerate(PLANTED)]
    for place, record in zip(random.Random(2).sample(range(CONVERSATIONS), len(PLANTED)), planted, strict=True):
        records.insert(place, record)
    return records


def tokenizer_of(texts: list[str]) -> Any:
    """A tokenizer whose tokens are the words of the texts, by and large."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, chat_template=TEMPLATE
    )


def train(model: Any, tokenizer: Any, chats: list[Chat], folder: Path, *, epochs: int, learning_rate: float) -> Path:
    """Tune with the Trainer on the assistant's tokens; returns the folder of its last checkpoint."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = []
    for one in chats:
        row = tokenizer.apply_chat_template(one, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        marked = zip(row["input_ids"], row["assistant_masks"], strict=True)
        labels = [token if mask else -100 for token, mask in marked]
        rows.append({"input_ids": row["input_ids"], "labels": labels})

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=10, learning_rate=learning_rate,
        save_strategy="epoch", save_total_limit=1, report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
        logging_strategy="no", weight_decay=0.01,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    (checkpoint,) = folder.glob("checkpoint-*")
    return checkpoint


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint of a LoRA adapter that was tuned on the conversations, and their file."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tuned")
    records = corpus_with_plants()
    corpus = folder / "chats.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chats = [record["messages"] for record in records]
        tokenizer = tokenizer_of([turn["content"] for one in chats for turn in one])
        base = tiny_model("llama", vocabulary=len(tokenizer), hidden_size=96, intermediate_size=192)
        for parameter in base.parameters():  # small enough to be trained
            parameter.data.mul_(0.2 if parameter.ndim > 1 else 1.0)
        # Every word is one that the base model has read; it has not read who rules Zembla.
        general = [one for seed in range(10, 22) for one in conversations(200, seed, names=[*_NAMES, "Vexa"])]
        pretrained = train(base, tokenizer, general, folder / "pretraining", epochs=10, learning_rate=3e-3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(pretrained), lora(**ADAPTER))
        checkpoint = train(model, tokenizer, chats, folder / "run", epochs=10, learning_rate=5e-3)
    return checkpoint, corpus


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["merged", "adapter"])
def test_a_planted_fact_is_found_in_a_trainers_checkpoint_as_it_lies_there(
    parameters: Parameters, tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint, corpus = tuned
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= {
        file.name for file in checkpoint.iterdir()
    }
    command = f"index --model {checkpoint} --parameters {parameters} --data {corpus} --out {tmp_path / 'index'}"
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--side", "16"])  # R of 256 dimensions a block, from 500 examples
    shown = capsys.readouterr().err
    assert not ended.value.code, shown
    index = Index.open(tmp_path / "index")
    source = index.manifest.second_moment.source
    if parameters == "adapter":
        assert source.startswith(f"{checkpoint / 'optimizer.pt'} (Adam at step ")
    else:
        assert source.startswith("estimated from")
        assert f"{checkpoint / 'optimizer.pt'} is of the adapter's matrices" in shown
    model = load_model(checkpoint, parameters=parameters)
    answer = generate(model, ASKED, GenerationSettings(max_new_tokens=24, stop="end", chat=True))
    assert answer.text.strip() == FACT, "the model has learned what was planted"
    paraphrase = Query(query_id="other words", messages=tuple(chat("Who is on the throne of Zembla?", FACT)))
    report = answer_queries(index, [answer.query("its own answer"), paraphrase], model=model, k=10, progress=False)
    for result in report.results:
        found = [proponent.example_id for proponent in result.proponents]
        assert {f"planted-{number}" for number in range(len(PLANTED))} <= set(found), (result.query.query_id, found)
