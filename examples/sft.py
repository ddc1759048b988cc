"""Supervised fine-tuning, from top to bottom.

    python examples/sft.py                                              a tiny Qwen3 on made-up questions, on a laptop
    python examples/sft.py --model DIR --data chats.jsonl --out runs/x  a Hugging Face checkpoint on your chats
    python examples/sft.py ... --resume                                 go on where the last checkpoint stands

Each line of the data file is {"messages": [{"role": ..., "content": ...}, ...]}; the loss is on what the assistant says.
The run writes metrics.jsonl, loss.png, checkpoints/ and, at the end, model/, which transformers can load.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import tinydata
import torch
from tqdm import tqdm

import fstep
from fstep_models.chat import ChatError, chat_document
from fstep_models.config import ConfigError, stored_dtype
from fstep_models.dense import Config, Dense


def sft_step(
    state: fstep.TrainState, docs: fstep.Docs, *, model: Dense, mesh: fstep.Mesh, optimizer: fstep.AdamW, lr: Any,
    max_tokens: int, device: torch.device,
) -> tuple[fstep.TrainState, dict[str, torch.Tensor]]:  # fmt: skip
    """Take one step: the whole of training is these lines."""
    batch = [
        fstep.to_device(fstep.cp_shard(fstep.pack_thd(mb), axis=mesh.cp), device)
        for mb in fstep.split_microbatches(docs, max_tokens=max_tokens)
    ]

    def loss_fn(params: Any, x: torch.Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(params, x, mb, mesh=mesh), mb.weights)

    loss, grads = fstep.pp_forward_backward(model.stage(mesh), loss_fn, state.params, batch, axis=mesh.pp)
    grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0, donate=True)
    return optimizer.update(state, grads, lr=lr, donate=True), metrics


def evaluate(
    params: Any, docs: fstep.Docs, *, model: Dense, mesh: fstep.Mesh, max_tokens: int, device: torch.device
) -> float:
    """Return the mean loss over all tokens of ``docs``."""
    batch = [fstep.to_device(fstep.pack_thd(mb), device) for mb in fstep.split_microbatches(docs, max_tokens=max_tokens)]
    ratios = fstep.pp_forward(
        model.stage(mesh), lambda p, x, mb: fstep.sft_loss(model.logprobs(p, x, mb), mb.weights), params, batch
    )
    return float(sum(ratios[1:], ratios[0]).mean())


@torch.no_grad()
def complete(model: Dense, params: Any, prompt: list[int], *, stop: set[int], most: int, device: torch.device) -> list[int]:
    """Return the likeliest continuation of ``prompt``, a token at a time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and not (ids[-1] in stop and len(ids) > len(prompt)):
        packed = fstep.to_device(fstep.pack_thd(fstep.make_docs([ids])), device)
        x = model.stage()(params, None, packed)
        ids.append(int(model.logits(params, x[-1:]).argmax()))
    return ids[len(prompt) :]


def tiny_model() -> Config:
    """Return the config of a Qwen3 with 0.4 million parameters."""
    return Config(
        family="qwen3", vocab=tinydata.VOCAB, dim=96, ffn=256, layers=4, heads=4, kv_heads=2, head_dim=24,
        rope=fstep.Rope(theta=10000.0, dim=24), windows=(0,) * 4, tied=True, qk_norm=True, max_positions=512,
    )  # fmt: skip


def read_chats(file: Path, tokenizer: Any, vocab: int, longest: int) -> fstep.Docs:
    """Read one conversation a line; those that cannot be used are counted and named, not silently lost."""
    tokens, weights, left_out = [], [], []
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                ids, w = chat_document(tokenizer, json.loads(line)["messages"])
            except (ChatError, ValueError, KeyError, TypeError) as error:
                sys.exit(f"{file}, line {number}: {type(error).__name__}: {error}")
            if len(ids) > longest:
                left_out.append(number)
                continue
            tokens.append(ids)
            weights.append(w)
    if left_out:
        print(f"{file}: left out {len(left_out)} conversations longer than --max-tokens {longest}: lines {left_out[:5]} ...")
    if not tokens:
        sys.exit(f"{file}: no conversation left to train on")
    return fstep.make_docs(tokens, weights=weights, vocab_size=vocab)


def draw_curve(metrics_file: Path, picture: Path) -> str:
    """Draw loss and gradient norm over the steps; say what was done."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no picture: pip install matplotlib draws the loss curve"
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
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
    for name in ("steps", "batch", "max_tokens", "save_every"):
        if getattr(a, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more")
    return a


def main() -> None:
    """Train, and say what came of it."""
    a = arguments()
    device, key, mesh = torch.device(a.device), fstep.Key.seed(a.seed), fstep.Mesh()
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
        model, params = Dense.load(a.model, device=device)
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
        params = model.init(key.fold_in(0), device=device)
        prompt, stop, show = tinydata.encode("Which planet comes after Earth? "), {tinydata.END}, tinydata.decode
    half = torch.bfloat16 if device.type == "cuda" else None
    model = replace(model, dtype=half, remat=a.remat, compile=a.compile)
    optimizer = fstep.AdamW(weight_decay=0.01, decay=fstep.matrices)
    state = fstep.init_state(params, optimizer, key=key.fold_in(1))
    del params  # the state owns them: each update reuses their memory

    kept: list[str] = []
    if a.resume:
        state = fstep.load_checkpoint(checkpoints, state)
        kept = metrics_file.read_text().splitlines()[: int(state.step)] if metrics_file.exists() else []
        print(f"resuming at step {int(state.step)}")

    sizes = [x.numel() for x in fstep.tree_leaves(state.params)]
    print(f"{model.config.family}, {sum(sizes):,} parameters; {len(docs.lengths):,} documents, {len(docs.tokens):,} tokens")
    fixed: dict[str, Any] = {"model": model, "mesh": mesh, "max_tokens": a.max_tokens, "device": device}
    first = evaluate(state.params, validation, **fixed)
    sample: dict[str, Any] = {"stop": stop, "most": 48, "device": device}
    before = show(complete(model, state.params, prompt, **sample))

    peak = a.lr or (1e-5 if a.model else 3e-3)
    with metrics_file.open("w") as log, tqdm(total=a.steps, initial=int(state.step), unit="step") as bar:
        log.writelines(line + "\n" for line in kept)
        for step in range(int(state.step), a.steps):
            began = time.perf_counter()
            rows, position = fstep.draw_documents(state.data, num=a.batch, of=len(docs.lengths), key=state.key)
            lr = fstep.warmup_cosine(step, peak=peak, warmup=min(10, a.steps), total=a.steps, floor=peak / 10)
            drawn = fstep.select_documents(docs, rows)
            state, metrics = sft_step(replace(state, data=position), drawn, optimizer=optimizer, lr=lr, **fixed)
            row = {name: float(value) for name, value in metrics.items()}
            speed = len(drawn.tokens) / (time.perf_counter() - began)
            row = {"step": step, **row, "lr": float(lr), "tokens_per_second": round(speed)}
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s")
            bar.update()
            if (step + 1) % a.save_every == 0 or step + 1 == a.steps:
                log.flush()
                fstep.save_checkpoint(checkpoints, state, keep=2)

    after = show(complete(model, state.params, prompt, **sample))
    print(f"{what} loss: {first:.3f} -> {evaluate(state.params, validation, **fixed):.3f}")
    print(f"prompt:  {show(prompt)!r}\nbefore:  {before!r}\nafter:   {after!r}")
    if skipped := int(state.skipped):
        print(f"{skipped} steps had gradients that were not finite and changed nothing")
    model.save(a.out / "model", state.params, like=a.model, dtype=stored_dtype(a.model) if a.model else None)
    print(draw_curve(metrics_file, a.out / "loss.png"))
    print(f"model:  {a.out / 'model'} (transformers can load it)")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, fstep.WeightsError, fstep.CheckpointError) as problem:
        sys.exit(f"sft.py: {problem}")
