"""The driver as a user runs it: with no arguments, resumed, on a checkpoint of transformers, and wrongly."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.hf_oracle import make_hf
from tests.models.test_chat import PLAIN, make_tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "sft.py"


def run(*arguments: object, fails: bool = False, processes: int = 1) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = (
        ["-W", "error"]
        if processes == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    done = subprocess.run(
        [sys.executable, *launch, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    assert not fails or processes > 1 or "Traceback" not in done.stderr  # torchrun adds its own
    return done.stdout + done.stderr


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("sft") / "run"
    return out, run("--steps", 6, "--save-every", 3, "--batch", 24, "--max-tokens", 300, "--out", out)


def test_the_default_learns_and_leaves_its_results(finished: tuple[Path, str]) -> None:
    out, said = finished
    first, last = re.search(r"training loss: (\S+) -> (\S+)", said).groups()
    assert float(last) < float(first)
    assert all(word in said for word in ("prompt:", "before:", "after:", "6/6"))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [r["step"] for r in rows(out)] == list(range(6))
    assert rows(out)[0].keys() == {"step", "loss", "weight", "grad_norm", "nonfinite", "lr", "tokens_per_second"}


def test_resuming_gives_the_same_bits(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    again = tmp_path / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    shutil.rmtree(again / "model")
    said = run("--steps", 6, "--save-every", 3, "--batch", 24, "--max-tokens", 300, "--out", again, "--resume")
    assert "resuming at step 3" in said
    for file in ("model/model.safetensors", "checkpoints/step-00000006/manifest.json"):
        assert (again / file).read_bytes() == (out / file).read_bytes(), file

    def numbers(folder: Path) -> list[dict]:
        return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows(folder)]

    assert numbers(again) == numbers(out)


def test_a_kill_after_resuming_loses_no_line(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    again = tmp_path / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    arguments = ["--steps", 6, "--save-every", 3, "--batch", 24, "--max-tokens", 300, "--out", again, "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(rows(again)) != 4:  # cut back to the 3 kept, and one new
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert len(rows(again)) >= 4
    run(*arguments)
    assert [r["step"] for r in rows(again)] == list(range(6))


@pytest.mark.parametrize("change", [["--seed", 7], ["--lr", 0.5], ["--steps", 8], ["--batch", 25]])
def test_resuming_another_run_is_refused(change: list, finished: tuple[Path, str]) -> None:
    out, _ = finished
    arguments = ["--steps", 6, "--save-every", 3, "--batch", 24, "--max-tokens", 300, "--out", out, "--resume"]
    said = run(*arguments, *change, fails=True)
    assert "is another run" in said and f"{change[0][2:]} was" in said


def test_a_learning_rate_of_zero_changes_nothing(tmp_path: Path) -> None:
    said = run("--lr", 0, "--steps", 2, "--batch", 8, "--out", tmp_path / "run")
    first, last = re.search(r"training loss: (\S+) -> (\S+)", said).groups()
    assert first == last


def test_an_out_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "sft.py: " in run("--out", tmp_path / "out", fails=True)


MESHES = {"two of data": (2, []), "pp 2 x cp 2": (4, ["--pp", 2, "--cp", 2]), "ZeRO": (2, ["--zero"])}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_trains_the_same_model_and_one_process_goes_on(name: str, finished: tuple[Path, str], tmp_path: Path) -> None:
    out, alone = finished
    again = tmp_path / "mesh"
    processes, axes = MESHES[name]
    same = ["--steps", 6, "--save-every", 3, "--batch", 24, "--max-tokens", 300, "--out", again]
    said = run(*same, *axes, processes=processes)
    assert said.count("prompt:") == 1

    def compare() -> None:
        for one, two in zip(rows(out), rows(again), strict=True):
            assert two["weight"] == one["weight"]
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)

    assert re.findall(r"training loss: .*", said) == re.findall(r"training loss: .*", alone)
    compare()
    # Half of the run was the mesh's; the other half is one process's.
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    assert "resuming at step 3" in run(*same, "--resume")
    compare()


@pytest.mark.parametrize(
    ("processes", "arguments", "said"),
    [
        (2, ["--pp", 3], "sft.py: mesh_from_env: pp 3 = 3 does not divide 2 processes; start a multiple of 3"),
        (1, ["--pp", 2, "--schedule", "zb"], "schedule 'zb' is unknown; pass one of gpipe, 1f1b, interleaved"),
        (1, ["--tp", 0], "--tp must be 1 or more"),
    ],
)
def test_a_mesh_that_cannot_be(processes: int, arguments: list[object], said: str, tmp_path: Path) -> None:
    assert said in run("--out", tmp_path / "out", *arguments, fails=True, processes=processes)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert "holds a run already: add --resume" in run("--out", out, fails=True)


def test_the_model_loads_in_transformers(finished: tuple[Path, str]) -> None:
    out, _ = finished
    module = AutoModelForCausalLM.from_pretrained(out / "model")
    assert module(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def chats(file: Path, count: int) -> Path:
    words = ["up", "down", "left", "right"]
    lines = [
        {
            "messages": [
                {"role": "user", "content": words[i % 4]},
                {"role": "assistant", "content": words[(i + 1) % 4] * (i % 3 + 1)},
            ]
        }
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1
    )
    make_hf(config).float().save_pretrained(folder)
    make_tokenizer(PLAIN).save_pretrained(folder)
    return folder


def test_a_checkpoint_of_transformers_on_chats(checkpoint: Path, tmp_path: Path) -> None:
    data, out = chats(tmp_path / "chats.jsonl", 50), tmp_path / "run"
    said = run(
        "--model", checkpoint, "--data", data, "--out", out, "--steps", 8, "--lr", 3e-3, "--batch", 16, "--remat", "full"
    )
    first, last = re.search(r"validation loss: (\S+) -> (\S+)", said).groups()
    assert float(last) < float(first)
    module = AutoModelForCausalLM.from_pretrained(out / "model")
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not torch.equal(module.lm_head.weight, before.lm_head.weight)
    assert (out / "model" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "x.jsonl"], "--model and --data go together"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--lr", "-1"], "--lr -1.0: pass a number"),
        (["--device", "cuda:9"], "--device cuda:9"),
        (["--model", "{tmp}/none", "--data", "{tmp}/none.jsonl"], "no such"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in run(*(a.format(tmp=tmp_path) for a in arguments), "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 2: Expecting property name"),
        ('{"text": "hello"}', 'line 2: a line is an object with "messages"'),
        ("[1, 2]", 'line 2: a line is an object with "messages"'),
    ],
)
def test_wrong_data_names_file_and_line(line: str, said: str, checkpoint: Path, tmp_path: Path) -> None:
    data = chats(tmp_path / "chats.jsonl", 1)
    data.write_text(data.read_text() + line + "\n")
    assert said in run("--model", checkpoint, "--data", data, "--out", tmp_path / "out", fails=True)


def test_conversations_that_cannot_be_used_are_counted_and_named(checkpoint: Path, tmp_path: Path) -> None:
    data = chats(tmp_path / "chats.jsonl", 3)
    lonely = json.dumps({"messages": [{"role": "user", "content": "only me"}]})
    data.write_text(data.read_text() + lonely + "\n")
    said = run("--model", checkpoint, "--data", data, "--out", tmp_path / "out", "--steps", 1)
    assert "left out 1 conversations" in said and re.search("line 4: .*nothing to learn", said)
    data.write_text(lonely + "\n")
    assert "no conversation is left" in run("--model", checkpoint, "--data", data, "--out", tmp_path / "out2", fails=True)


def test_a_broken_checkpoint_is_named_without_a_traceback(checkpoint: Path, tmp_path: Path) -> None:
    data, broken = chats(tmp_path / "chats.jsonl", 4), tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in run("--model", broken, "--data", data, "--out", tmp_path / "out", fails=True)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    assert "attention_dropout=0.5" in run("--model", broken, "--data", data, "--out", tmp_path / "out", fails=True)
