"""`auto` is the best device that works; it is said once, resolved before anything is recorded, and refused if wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trackstar
from pretended_devices import pretended_devices
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.cli.options import chosen_device
from trackstar.errors import ModelError, OptionError
from trackstar.model import devices, placement
from trackstar.model.devices import announced_device, float64_device, in_float64, resolved_device
from trackstar.model.language_model import load_model


@pytest.mark.parametrize(("machine", "best"), [({"gpus": 2}, "cuda:0"), ({"mps": True}, "mps:0"), ({}, "cpu")])
def test_auto_is_the_best_device(machine: dict[str, Any], best: str):
    with pretended_devices(**{"gpus": 0, "mps": False, **machine}):
        assert resolved_device() == torch.device(best)
        assert resolved_device("cpu") == torch.device("cpu")


def test_a_gpu_that_cannot_compute_is_left_with_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices.torch, "zeros", broken)
    assert resolved_device() == torch.device("cpu")
    assert capsys.readouterr().err == (
        "device: cuda cannot be used (CUDA error: no kernel image is available for execution on the device)\n"
    )
    with pytest.raises(OptionError, match=r"^`device`: expected auto, cpu or an .*, found 'cuda' \(CUDA error: no "):
        resolved_device("cuda")


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:x", ""])
def test_other_devices_are_one_line(device: str):
    with pytest.raises(OptionError, match=r"^`device`: expected auto, cpu or an available cuda or mps device, found '"):
        resolved_device(device)


def test_the_device_is_described_if_the_user_named_none():
    def notes(device: str = "auto", device_map: str | None = None, **options: Any) -> tuple[str, list[str]]:
        lines: list[str] = []
        return announced_device(device, device_map, lines.append, **options), lines

    assert notes("cpu") == ("cpu", [])
    name, (line,) = notes()
    assert name == "cpu"
    assert line.startswith("device: cpu, ")
    assert line.endswith(" GiB")
    _, (line,) = notes(device_map="auto")
    assert line.endswith("; `device_map` needs two GPUs or more, found 0")
    with pretended_devices(1, mps=False):
        assert notes() == ("cuda:0", ["device: cuda:0, a pretended GPU with 16.0 GiB"])
    with pretended_devices(0, mps=True):
        _, (line,) = notes()
        assert line.startswith("device: mps:0, which shares the machine's ")
    with pretended_devices(3, mps=False):
        assert notes(device_map="auto") == ("auto", ["device: one model spread over 3 GPUs"])
        _, (line,) = notes(has_workers=True)
        assert line.endswith(
            '; of 3 GPUs one is used: `device_map="auto"` spreads the model over all, `address="local"` runs a process '
            "on each"
        )


def test_the_leading_process_of_a_cluster_leaves_the_gpus_to_the_workers():
    with pretended_devices(2, mps=False):
        assert chosen_device("auto", ray="local") == "cpu"
        assert chosen_device("cuda:1", ray="local") == "cuda:1"
        assert chosen_device("auto") == "cuda:0"


def test_a_command_says_its_device_once_unless_it_was_asked_for(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"fact_id": "f", "prompt0": "The capital of Peru is"}) + "\n", encoding="utf-8")
    command = ["generate", "--model", str(tiny_model_folder), "--queries", str(prompts), "--out", str(out)]
    command += ["--samples", "1", "--max-new-tokens", "1"]
    for options, count in (([], 1), (["--device", "cpu", "--force"], 0)):
        assert framework.run(command_group, [*command, *options]) == 0
        assert sum(line.startswith("device: ") for line in capsys.readouterr().err.splitlines()) == count


def test_float64_is_computed_on_the_cpu_where_the_device_has_none_and_it_is_said_once(
    capsys: pytest.CaptureFixture[str],
):
    devices._say_without_float64.cache_clear()
    with pretended_devices(0, mps=True):
        values = torch.arange(3.0, device="mps")
        with pytest.raises(TypeError, match="float64"):
            values.double()
        for _ in range(2):
            assert in_float64(values).tolist() == [0, 1, 2]
            assert in_float64(values).dtype is torch.float64
        assert in_float64(values).device == float64_device("mps") == torch.device("cpu")
    assert capsys.readouterr().err == (
        "device: mps has no float64, so sums and factorizations in it are computed on the cpu\n"
    )
    with pretended_devices(1, mps=False):
        assert in_float64(torch.ones(1, device="cuda")).device == torch.device("cuda:0")
    assert capsys.readouterr().err == ""


def test_a_model_that_does_not_fit_on_the_device_is_one_line(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pretended_devices(1, mps=False):
        monkeypatch.setattr(placement.nn.Module, "to", full)
        with pytest.raises(ModelError, match=r'does not fit on cuda:0, a pretended GPU .*`device="cpu"`'):
            load_model(tiny_model_folder)


# ---- Device maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "abacus"}, r"^`device`: expected auto, cpu or .*, found 'abacus'"),
        ({"": "cpu", "trunk": "cpu"}, r"^`device_map`: expected names of the model's modules, .*, found 'trunk'"),
        ({"model": "cpu"}, r"^`device_map`: expected a device for every parameter, found none for lm_head.weight"),
        ({"model": "cuda:0", "lm_head": "cpu"}, r"^`device_map`: expected devices of one kind, found cpu and cuda; "),
    ],
)
def test_a_device_map_that_cannot_be_used_is_one_line(device_map: Any, message: str, tiny_model_folder: Path):
    with pretended_devices(2, mps=False), pytest.raises(OptionError, match=message):
        load_model(tiny_model_folder, device_map=device_map)


def test_a_device_and_a_device_map_contradict_each_other(tiny_model_folder: Path):
    with pytest.raises(OptionError, match=r"^`device_map`: found 'auto' and the device 'cpu', which contradict"):
        load_model(tiny_model_folder, device="cpu", device_map="auto")


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_without_gpus_a_spread_model_is_on_the_cpu(device_map: Any, tiny_model_folder: Path):
    assert load_model(tiny_model_folder, device_map=device_map).device_names == "cpu"


def test_accelerate_is_only_needed_for_device_maps(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = placement.importlib.util.find_spec

    def missing(name: str) -> Any:
        return None if name == "accelerate" else found(name)

    monkeypatch.setattr(placement.importlib.util, "find_spec", missing)
    assert load_model(tiny_model_folder, device="cpu").device_names == "cpu"
    with pytest.raises(
        OptionError, match=r"^`device_map`: needs Accelerate, .*; pip install 'trackstar-tda\[device-map\]'"
    ):
        load_model(tiny_model_folder, device_map="auto")


def test_a_model_too_large_for_all_gpus_is_refused(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pretended_devices(2, mps=False):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1000))
        with pytest.raises(ModelError, match=r'does not fit on this machine.s 2 GPUs; .*`dtype="bfloat16"`'):
            load_model(tiny_model_folder, device_map="auto")


def test_every_public_function_computes_on_the_best_device_by_default():
    import inspect

    functions = (
        trackstar.load_model, trackstar.build_index, trackstar.answer_queries, trackstar.stream_queries,
        trackstar.add_examples, trackstar.pretrain,
    )  # fmt: skip
    assert {inspect.signature(function).parameters["device"].default for function in functions} == {"auto"}
