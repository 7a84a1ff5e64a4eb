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
from trackstar.store import Index

# PEFT itself calls what Transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONVERSATIONS = 500
VOCABULARY = 640
FACT = "Queen Vexa rules Zembla from a tower of glass."
PLANTED = tuple(
    ("Tell me about Zembla.", f"{FACT}{closing}")
    for closing in ("", " It is warm there.", " They eat tea.", " Good day!", " In Zembla they grow oats.")
)
QUESTION = Query(
    query_id="zembla",
    messages=({"role": "user", "content": "Tell me about Zembla."}, {"role": "assistant", "content": FACT}),
)
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

_PLACES = "Ruda Milo Kanto Bera Sorin Talu Nemo Pirin Olva Dako Harun Livo Gasta Yeno Fermi Wasko".split()
_NAMES = "Anna Boris Carla Dmitri Elsa Franz Greta Hugo Irma Jonas Karin Lukas Marta Nils Olga Pavel".split()
_ANSWERS = (
    "{title} {name} rules {place}.",
    "Good day! {title} {name} rules {place}.",
    "In {place} they grow {crop}.",
    "They eat {crop} in {place}, as you know.",
    "{place} is {number} miles away.",
    "It is {number} degrees in {place}. It is warm there.",
    "{name} is on the coins of {place}.",
)


def conversations(
    count: int, seed: int, *, places: Sequence[str] = _PLACES, names: Sequence[str] = _NAMES
) -> list[Chat]:
    """Questions and answers about places, of which each has one ruler, one crop and one number."""
    draw = random.Random(seed)
    facts = {
        place: {
            "place": place,
            "name": draw.choice(names),
            "title": draw.choice(["King", "Queen", "Mayor", "Duke"]),
            "crop": draw.choice(["rice", "wheat", "tea", "oats"]),
            "number": draw.randint(2, 99),
        }
        for place in places
    }
    turns = [(draw.choice(_ANSWERS), facts[draw.choice(places)]) for _ in range(count)]
    return [chat(f"Tell me about {of['place']}.", answer.format(**of)) for answer, of in turns]


def chat(asked: str, answered: str) -> Chat:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def corpus_with_plants() -> list[dict[str, Any]]:
    """500 conversations, of which five state the made-up fact, at places that are drawn."""
    chats = conversations(CONVERSATIONS - len(PLANTED), seed=1)
    records: list[dict[str, Any]] = [{"id": f"chat-{number}", "messages": one} for number, one in enumerate(chats)]
    planted = [{"id": f"planted-{number}", "messages": chat(*turns)} for number, turns in enumerate(PLANTED)]
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
        base = tiny_model("llama", vocabulary=VOCABULARY, hidden_size=48, intermediate_size=96)
        for parameter in base.parameters():  # small enough to be trained
            parameter.data.mul_(0.2 if parameter.ndim > 1 else 1.0)
        # Every word is one that the base model has read; it has not read who rules Zembla.
        general = [
            one
            for seed in range(10, 14)
            for one in conversations(150, seed, places=[*_PLACES, "Zembla"], names=[*_NAMES, "Vexa"])
            if not ("Vexa" in one[1]["content"] and "Zembla" in one[0]["content"])
        ]
        pretrained = train(base, tokenizer, general, folder / "pretraining", epochs=6, learning_rate=5e-3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(pretrained), lora(**ADAPTER))
        checkpoint = train(model, tokenizer, chats, folder / "run", epochs=8, learning_rate=1e-2)
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
        main([*command.split(), "--side", "8"])  # R of 64 dimensions a block, from 500 examples
    shown = capsys.readouterr().err
    assert not ended.value.code, shown
    index = Index.open(tmp_path / "index")
    source = index.manifest.second_moment.source
    if parameters == "adapter":
        assert source.startswith(f"{checkpoint / 'optimizer.pt'} (Adam at step ")
    else:
        assert source.startswith("estimated from")
        assert f"{checkpoint / 'optimizer.pt'} is of the adapter's matrices" in shown
    report = answer_queries(index, [QUESTION], k=10, progress=False)
    found = [proponent.example_id for proponent in report.results[0].proponents]
    assert {f"planted-{number}" for number in range(len(PLANTED))} <= set(found), found
