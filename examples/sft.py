"""Supervised fine-tuning, from top to bottom.

    python examples/sft.py                                              a tiny Qwen3 on made-up questions, on a laptop
    python examples/sft.py --model DIR --data chats.jsonl --out runs/x  a Hugging Face checkpoint on your chats
    python examples/sft.py ... --resume                                 go on where the last checkpoint stands
    torchrun --nproc-per-node 4 examples/sft.py --pp 2 --cp 2           the same run on 4 ranks: --pp, --cp, --tp, --zero

Each line of the data file is {"messages": [{"role": ..., "content": ...}, ...]}; the loss is on what the assistant says.
The run writes metrics.jsonl, loss.png, checkpoints/ and, at the end, model/, which transformers can load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import tinydata
import torch
from tqdm import tqdm

import fstep
from fstep_models.chat import ChatError, chat_documents
from fstep_models.config import ConfigError, stored_dtype
from fstep_models.dense import Config, Dense


def microbatches(docs: fstep.Docs, *, mesh: fstep.Mesh, max_tokens: int, device: torch.device) -> list[fstep.Packed]:
    """Cut the step's documents for this rank: its share of them over dp, and its chunks of each over cp."""
    multiple = 2 * mesh.cp.size
    parts = fstep.split_microbatches(docs, max_tokens=max_tokens, multiple_of=multiple, axis=mesh.dp)
    packed = [fstep.cp_shard(fstep.pack_thd(part, multiple_of=multiple), axis=mesh.cp) for part in parts]
    return [fstep.to_device(mb, device) for mb in packed]


def sft_step(
    state: fstep.TrainState, docs: fstep.Docs, *, model: Dense, mesh: fstep.Mesh, optimizer: fstep.AdamW, lr: Any,
    schedule: str, max_tokens: int, device: torch.device,
) -> tuple[fstep.TrainState, dict[str, torch.Tensor]]:  # fmt: skip
    """Take one step: the whole of training is these lines."""
    batch = microbatches(docs, mesh=mesh, max_tokens=max_tokens, device=device)

    def loss_fn(params: Any, x: torch.Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.Ratio(-model.logprob_sum(params, x, mb, mesh=mesh), mb.weights.sum())

    stage = model.stage(mesh)
    loss, grads = fstep.pp_forward_backward(stage, loss_fn, state.params, batch, axis=mesh.pp, schedule=schedule)
    grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0, donate=True)
    return optimizer.update(state, grads, lr=lr, skip=metrics["nonfinite"], donate=True), metrics


def evaluate(
    params: Any, docs: fstep.Docs, *, model: Dense, mesh: fstep.Mesh, schedule: str, max_tokens: int, device: torch.device
) -> float:
    """Return the mean loss over all tokens of ``docs``."""
    batch = microbatches(docs, mesh=mesh, max_tokens=max_tokens, device=device)

    def loss_fn(params: Any, x: torch.Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.Ratio(-model.logprob_sum(params, x, mb, mesh=mesh), mb.weights.sum())

    ratios = fstep.pp_forward(model.stage(mesh), loss_fn, params, batch, axis=mesh.pp, schedule=schedule)
    return float(fstep.psum(sum(ratios[1:], ratios[0]), axis=mesh.over("dp", "cp")).mean())


def complete(
    params: Any, prompt: list[int], *, model: Dense, mesh: fstep.Mesh, schedule: str, stop: set[int], most: int,
    device: torch.device,
) -> list[int]:  # fmt: skip
    """Return the likeliest continuation of ``prompt``, a token at a time."""
    mesh = replace(mesh, cp=fstep.Axis("cp"))  # a prompt is short: every rank of cp reads all of it

    def likeliest(params: Any, x: torch.Tensor, mb: fstep.Packed) -> torch.Tensor:
        last = fstep.tp_gather(x, axis=mesh.tp, tokens=len(mb.tokens))[-1:]
        return model.logits(params, last, mesh=mesh, tokens=1).argmax()

    ids = list(prompt)
    while len(ids) < len(prompt) + most and not (ids[-1] in stop and len(ids) > len(prompt)):
        packed = fstep.to_device(fstep.pack_thd(fstep.make_docs([ids])), device)
        (token,) = fstep.pp_forward(model.stage(mesh), likeliest, params, [packed], axis=mesh.pp, schedule=schedule)
        ids.append(int(token))
    return ids[len(prompt) :]


def tiny_model() -> Config:
    """Return the config of a Qwen3 with 0.4 million parameters."""
    return Config(
        family="qwen3", vocab=tinydata.VOCAB, dim=96, ffn=256, layers=4, heads=4, kv_heads=2, head_dim=24,
        rope=fstep.Rope(theta=10000.0, dim=24), windows=(0,) * 4, tied=True, qk_norm=True, max_positions=512,
    )  # fmt: skip


def read_chats(file: Path, tokenizer: Any, vocab: int, longest: int) -> fstep.Docs:
    """Read one conversation a line; those that cannot be used are counted and named, not silently lost."""
    tokens: list[list[int]] = []
    weights: list[list[float]] = []
    left_out: list[str] = []
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or "messages" not in record:
                    raise ValueError('a line is an object with "messages"')
            except ValueError as error:
                sys.exit(f"{file}, line {number}: {error}")
            try:
                found = chat_documents(tokenizer, record["messages"])
            except ChatError as error:
                left_out.append(f"line {number}: {error}")
                continue
            for ids, w in found:
                if len(ids) > longest:
                    left_out.append(f"line {number}: {len(ids)} tokens are more than --max-tokens {longest}")
                else:
                    tokens.append(ids)
                    weights.append(w)
    if left_out:
        print(f"{file}: left out {len(left_out)} conversations:", *left_out[:5], sep="\n  ", file=sys.stderr)
    if not tokens:
        sys.exit(f"{file}: no conversation is left to train on")
    return fstep.make_docs(tokens, weights=weights, vocab_size=vocab)


def check_same_run(a: argparse.Namespace, docs: fstep.Docs, write: bool) -> None:
    """Refuse to resume with what would not be the same run: other data, another seed, other steps."""
    file, crc = a.out / "run.json", zlib.crc32(docs.tokens.numpy().tobytes())
    names = ("model", "seed", "batch", "steps", "lr", "max_tokens")
    run = {**{n: str(getattr(a, n)) for n in names}, "documents": len(docs.lengths), "checksum of the tokens": crc}
    if a.resume and file.exists():
        before = json.loads(file.read_text())
        if changed := [f"{n} was {before.get(n)}, is {v}" for n, v in run.items() if before.get(n) != v]:
            sys.exit(f"--resume: {file} is another run: {'; '.join(changed)}; give the same arguments, or another --out")
    elif write:
        file.write_text(json.dumps(run, indent=2) + "\n")


def draw_curve(metrics_file: Path, picture: Path) -> str:
    """Draw loss and gradient norm over the steps; say what was done."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no picture: pip install matplotlib draws the loss curve"
    # A value that was not finite is null in the file, and a gap in the picture.
    rows = [
        {k: math.nan if v is None else v for k, v in json.loads(x).items()} for x in metrics_file.read_text().splitlines()
    ]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1))
    top.plot([r["step"] for r in rows], [r["loss"] for r in rows], color="tab:blue")
    top.set(ylabel="loss a token", yscale="log", title="training loss")
    bottom.plot([r["step"] for r in rows], [r["grad_norm"] for r in rows], color="tab:gray")
    bottom.set(ylabel="gradient norm", xlabel="step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return f"curve: {picture}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="folder of a Hugging Face checkpoint (Llama, Qwen2, Qwen3, Mistral)")
    p.add_argument("--data", type=Path, help="JSON lines with 'messages'; needs --model")
    p.add_argument("--out", type=Path, default=Path("runs/sft"), help="where results go")
    p.add_argument("--steps", type=int, default=200, help="how many updates")
    p.add_argument("--batch", type=int, default=64, help="documents an update")
    p.add_argument("--max-tokens", type=int, default=2048, help="tokens a microbatch")
    p.add_argument("--lr", type=float, help="peak learning rate (default 3e-3 tiny, 1e-5 with --model)")
    p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    for axis, what in (("pp", "pipeline stages"), ("cp", "chunks of each document"), ("tp", "slices of each weight")):
        p.add_argument(f"--{axis}", type=int, default=1, help=f"ranks for {what}; the rest divide the documents")
    p.add_argument("--schedule", default="1f1b", help="of the pipeline: gpipe, 1f1b, interleaved, zbv, ...")
    p.add_argument("--zero", action="store_true", help="shard params and optimizer state over dp and cp (ZeRO-3)")
    p.add_argument("--remat", choices=["none", "full"], default="none", help="compute blocks again in the backward pass")
    p.add_argument("--compile", action="store_true", help="torch.compile the block")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    a = p.parse_args()
    if (a.model is None) != (a.data is None):
        p.error("--model and --data go together; give both, or neither for the tiny default")
    for name, path, there in (("model", a.model, Path.is_dir), ("data", a.data, Path.is_file)):
        if path is not None and not there(path):
            p.error(f"--{name} {path}: no such {'folder' if name == 'model' else 'file'}")
    if a.lr is not None and not 0 <= a.lr < math.inf:
        p.error(f"--lr {a.lr}: pass a number of 0 or more")
    try:
        torch.zeros(1, device=a.device)
    except (RuntimeError, AssertionError) as error:
        p.error(f"--device {a.device}: {error}")
    try:
        fstep.stage_ranks(a.schedule, max(a.pp, 1))
    except ValueError as error:
        p.error(f"--schedule: {error}")
    for name in ("steps", "batch", "max_tokens", "save_every", "pp", "cp", "tp"):
        if getattr(a, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more")
    return a


def train(a: argparse.Namespace, mesh: fstep.Mesh) -> None:
    """Train, and say what came of it. Every rank runs this; the first one speaks and writes."""
    lead = mesh.rank == 0
    say = print if lead else lambda *_: None
    device = torch.device(a.device, torch.cuda.current_device()) if a.device == "cuda" else torch.device(a.device)
    key = fstep.Key.seed(a.seed)
    checkpoints, metrics_file = a.out / "checkpoints", a.out / "metrics.jsonl"
    if fstep.latest_step(checkpoints) is not None and not a.resume:
        sys.exit(f"{checkpoints} holds a run already: add --resume to go on with it, or give another --out")
    a.out.mkdir(parents=True, exist_ok=True)

    # What to train, on what: a checkpoint and chats, or the tiny default.
    if a.model:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(a.model)
        except (OSError, ValueError) as error:
            sys.exit(f"{a.model}: transformers finds no tokenizer there: {error}")
        model, params = Dense.load(a.model, mesh=mesh, schedule=a.schedule, device=device)
        docs = read_chats(a.data, tokenizer, model.config.vocab, a.max_tokens)
        what, count = "validation", len(docs.lengths)
        validation = fstep.select_documents(docs, range(0, count, 20))
        docs = fstep.select_documents(docs, [i for i in range(count) if i % 20] or [0])
        prompt = docs.tokens[: int((docs.weights > 0).nonzero()[0])].tolist()
        stop = {tokenizer.eos_token_id}
        show: Any = tokenizer.decode
    else:
        tokens, weights = tinydata.documents()
        docs = validation = fstep.make_docs(tokens, weights=weights, vocab_size=tinydata.VOCAB)
        what = "training"  # there is nothing to hold out: the questions are facts to be learnt by heart
        model = Dense(tiny_model())
        params = model.init(key.fold_in(0), mesh=mesh, schedule=a.schedule, device=device)
        prompt, stop, show = tinydata.encode("Which planet comes after Earth? "), {tinydata.END}, tinydata.decode
        if device.type == "cpu":
            torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much on a busy machine
    check_same_run(a, docs, write=lead)
    half = torch.bfloat16 if device.type == "cuda" else None
    model = replace(model, dtype=half, remat=a.remat, compile=a.compile)
    if a.zero:
        params = fstep.shard_params(params, mesh.over("dp", "cp"), dtype=half)
    optimizer = fstep.AdamW(weight_decay=0.01, decay=fstep.matrices)
    state = fstep.init_state(params, optimizer, key=key.fold_in(1))
    del params  # the state owns them: each update reuses their memory

    kept: list[str] = []
    if a.resume:
        state = fstep.load_checkpoint(checkpoints, state, mesh=mesh)
        kept = metrics_file.read_text().splitlines()[: int(state.step)] if metrics_file.exists() else []
        say(f"resuming at step {int(state.step)}")

    size = sum(math.prod(leaf.shape) for leaf in fstep.tree_leaves(model.spec()))
    say(f"{model.config.family}, {size:,} parameters; {len(docs.lengths):,} documents, {len(docs.tokens):,} tokens")
    if mesh.size > 1:
        say(mesh.draw())
    where: dict[str, Any] = {"model": model, "mesh": mesh, "schedule": a.schedule, "device": device}
    fixed = {**where, "max_tokens": a.max_tokens}
    longest = int(torch.cat([docs.lengths, validation.lengths]).max())
    if longest > a.max_tokens:
        sys.exit(f"sft.py: --max-tokens is {a.max_tokens} and a document has {longest} tokens; pass as many at least")
    first = evaluate(state.params, validation, **fixed)
    if not math.isfinite(first):
        sys.exit(f"the {what} loss is {first} before any step: the weights are not usable")
    before = show(complete(state.params, prompt, stop=stop, most=48, **where))

    peak = (1e-5 if a.model else 3e-3) if a.lr is None else a.lr
    if lead:  # what was logged after the checkpoint happens again; replaced whole, so that a kill loses no line
        fresh = metrics_file.with_suffix(".tmp")
        fresh.write_text("".join(line + "\n" for line in kept))
        fresh.replace(metrics_file)
    with (
        (metrics_file if lead else Path(os.devnull)).open("a", buffering=1) as log,
        tqdm(total=a.steps, initial=int(state.step), unit="step", disable=not lead) as bar,
    ):
        for step in range(int(state.step), a.steps):
            began = time.perf_counter()
            rows, position = fstep.draw_documents(state.data, num=a.batch, of=len(docs.lengths), key=state.key)
            lr = fstep.warmup_cosine(step, peak=peak, warmup=min(10, a.steps), total=a.steps, floor=peak / 10)
            drawn = fstep.select_documents(docs, rows)
            state, metrics = sft_step(replace(state, data=position), drawn, optimizer=optimizer, lr=lr, **fixed)
            row = {name: float(value) for name, value in metrics.items()}
            speed = len(drawn.tokens) / (time.perf_counter() - began)
            line = {"step": step, **row, "lr": float(lr), "tokens_per_second": round(speed)}
            log.write(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s")
            bar.update()
            if (step + 1) % a.save_every == 0 or step + 1 == a.steps:
                fstep.save_checkpoint(checkpoints, state, mesh=mesh, keep=2)

    after = show(complete(state.params, prompt, stop=stop, most=48, **where))
    say(f"{what} loss: {first:.3f} -> {evaluate(state.params, validation, **fixed):.3f}")
    dtype = stored_dtype(a.model) if a.model else None
    model.save(a.out / "model", state.params, mesh=mesh, like=a.model, dtype=dtype)
    say(f"prompt:  {show(prompt)!r}\nbefore:  {before!r}\nafter:   {after!r}")
    if skipped := int(state.skipped):
        say(f"{skipped} steps had gradients that were not finite and changed nothing")
    if lead:
        print(draw_curve(metrics_file, a.out / "loss.png"))
    say(f"model:  {a.out / 'model'} (transformers can load it)")


def main() -> None:
    """Train on the mesh that the arguments ask for."""
    a = arguments()
    with contextlib.ExitStack() as stack:
        try:
            mesh = stack.enter_context(fstep.mesh_from_env(pp=a.pp, cp=a.cp, tp=a.tp))
        except ValueError as problem:
            sys.exit(f"sft.py: {problem}")
        train(a, mesh)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, fstep.WeightsError, fstep.CheckpointError, OSError) as problem:
        sys.exit(f"sft.py: {problem}")
