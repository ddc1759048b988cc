"""Answers to prompts, drawn token by token with a cache: documents that a training step takes as they are.

    prompts   a a a | b            decode(params, None, row)      the prompts, packed; the cache is made
              │
    samples   a0 a1 | b0 b1        rows of the cache repeated     answers to one prompt share its prefill
              │
    answers   x     | y            decode(params, cache, row)     one token a document, at its position
              x x   | y .                                         done at a stop token; done rows are dropped
              │
    Docs      a a a x x x | a a a x x | b y y | b y               weights 0 on prompts, 1 on answers

Of the model it knows `decode` only: `fstep_models.dense.Dense.decode`, or yours.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fstep.batch.batch import Docs
from fstep.batch.pack import pack_thd
from fstep.batch.packed import IGNORE, Packed
from fstep.key import Key
from fstep.rollout.sample import check_sampling, sample_tokens
from fstep.tree import check_callable, check_type, to_device, tree_leaves, tree_map, tree_paths

Decode = Callable[[Any, Any, Packed], tuple[Tensor, Any]]

BLOCK = 16  # numbers drawn at a time, for each answer


@torch.no_grad()
def generate(
    decode: Decode,
    params: Any,
    prompts: Docs,
    key: Key,
    *,
    most: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    samples: int = 1,
) -> Docs:
    """Answer each prompt ``samples`` times, with up to ``most`` tokens each, and return prompts with answers as documents.

    ``decode(params, cache, packed) -> (logits [documents, vocab], cache)`` says what may follow each document's last token.
    It is called with ``cache=None`` and the packed prompts, then with one token a document, ``packed.positions`` its place.
    A cache is a tree of tensors with a row for each document, along their first dimension, so that rows can be repeated
    and dropped. It is donated: ``decode`` may write into the one it is given, which nobody reads again. Params and prompts
    stay as they are.

    An answer ends with a token of ``stop``, which it includes. How tokens are drawn is told by `sample_tokens`. The draw of
    an answer's n-th token depends on ``key``, the prompt's ``index``, which of its samples it is, and n: not on which
    other prompts there are, so that ranks that divide the prompts give the answers that one would.

    The documents are in the prompts' order, all samples of one together, with

    - ``weights``: 1 on the tokens of answers, 0 on those of prompts;
    - ``targets["generator"]``: the log probability of each answer's token in the whole distribution at this temperature (at
      1 for temperature 0), 0 on prompts;
    - ``per_document``: the prompts' values, ``"prompt"`` (its prompt's ``index``: groups for `group_advantages`) and
      ``"finished"`` (whether it ended with a stop token);
    - ``index``: ``samples * prompt + sample``. Which is 0, 1, ... if the prompts' is.

    Nothing is communicated: each rank answers its own prompts, and one that has none asks ``decode`` about a single token,
    for the dtype. On the CPU finished rows are dropped at once when they are half of all, on a GPU every few tokens.

    Raises ValueError for prompts that are empty, have one index twice, or values for each token, which answers have not;
    for options out of range, for logits or a cache without a row for each document, and for logits that make no distribution
    (NaN, or all -inf); TypeError for stop tokens that are no ids.

    >>> import torch, fstep
    >>> def decode(params, cache, mb):  # a model that sees one token: after n comes n + 1
    ...     last = mb.tokens[mb.cu_seqlens_padded[1:] - 1]
    ...     return torch.nn.functional.one_hot((last + 1) % 10, 10) * params["sure"], {}
    >>> prompts = fstep.make_docs([[1, 2], [5]])
    >>> docs = fstep.generate(decode, {"sure": torch.tensor(50.0)}, prompts, fstep.Key.seed(0), most=3, stop=[6])
    >>> docs.tokens, docs.lengths, docs.weights
    (tensor([1, 2, 3, 4, 5, 5, 6]), tensor([5, 2]), tensor([0., 0., 1., 1., 1., 0., 1.]))
    >>> docs.per_document
    {'prompt': tensor([0, 1]), 'finished': tensor([False,  True])}
    """
    _check(decode, prompts, key, most, stop, samples)
    check_sampling("generate", temperature, top_k, top_p)
    prompt = torch.arange(len(prompts.index), device=prompts.index.device).repeat_interleave(samples)
    sample = torch.arange(samples, device=prompt.device).repeat(len(prompts.index))
    answers = _Answers(prompts, prompt, prompts.index[prompt] * samples + sample)
    if not len(prompt):
        # A rank that has no prompts asks the model what dtype the other ranks get.
        logits, _ = decode(params, None, pack_thd(_one(prompts)))
        wide = torch.promote_types(logits.dtype, torch.float32)
        return answers.documents([], torch.zeros_like(prompt), torch.zeros_like(prompt, dtype=torch.bool), wide)
    here = to_device(key, prompt.device)
    keys = torch.func.vmap(lambda i, s: here.fold_in(i).fold_in(s))(prompts.index[prompt], sample)
    ends = torch.tensor([operator.index(x) for x in stop], dtype=torch.int64, device=prompt.device)
    every = _every(prompt.device)

    rows = torch.arange(len(prompt), device=prompt.device)  # the answers that go on, and some that are done
    counts, done = torch.zeros_like(prompt), torch.zeros_like(prompt, dtype=torch.bool)
    broken, drawn = torch.zeros_like(done), []
    logits, cache = decode(params, None, pack_thd(prompts))
    _check_decoded(logits, cache, len(prompts.index))
    logits, cache = tree_map(lambda x: x if samples == 1 else x[prompt], (logits, cache))
    for n in range(most):
        if n % BLOCK == 0:
            uniform = _uniform(keys, n // BLOCK)
        numbers = uniform[rows, n % BLOCK]
        ids, logprobs = sample_tokens(logits, numbers, temperature=temperature, top_k=top_k, top_p=top_p)
        drawn.append((rows, ids, logprobs))
        going = ~done[rows]
        counts[rows] += going
        broken[rows] |= going & ~logprobs.isfinite()
        done[rows] |= torch.isin(ids, ends)
        if n + 1 == most or (n + 1) % every == 0:
            if broken.any():
                where = int(prompts.index[prompt[broken]][0])
                raise ValueError(
                    f"generate: logits for prompt {where} make no distribution (NaN, +inf, or all -inf) within {n + 1} "
                    "tokens; look at the params and at what decode returns"
                )
            left = (~done[rows]).nonzero()[:, 0]
            if not len(left):
                break
            if 2 * len(left) <= len(rows):
                rows, ids, cache = tree_map(operator.itemgetter(left), (rows, ids, cache))
        if n + 1 < most:
            logits, cache = decode(params, cache, answers.one_each(rows, ids, n))
    return answers.documents(drawn, counts, done)


@dataclasses.dataclass(frozen=True)
class _Answers:
    """Which answers there are: the row of each one's prompt, and its number."""

    prompts: Docs
    prompt: Tensor
    index: Tensor

    def one_each(self, rows: Tensor, ids: Tensor, n: int) -> Packed:
        """Make a row of one token a document: the n-th of each answer, at its place."""
        ends = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
        return Packed(
            tokens=ids,
            labels=torch.full_like(ids, IGNORE),
            weights=torch.zeros_like(ids, dtype=self.prompts.weights.dtype),
            positions=self.prompts.lengths[self.prompt[rows]] + n,
            targets={},
            inputs={},
            cu_seqlens=ends,
            cu_seqlens_padded=ends,
            index=self.index[rows],
            per_document={},
            shared=self.prompts.shared,
            max_seqlen=1,
        )

    def documents(
        self, drawn: list[tuple[Tensor, Tensor, Tensor]], counts: Tensor, done: Tensor, wide: torch.dtype = torch.float32
    ) -> Docs:
        """Lay each prompt and what was drawn after it end to end."""
        old, prompt = self.prompts, self.prompt
        before = old.lengths[prompt]
        lengths = before + counts
        document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        place = torch.arange(len(document), device=lengths.device) - (lengths.cumsum(0) - lengths)[document]
        ours = place >= before[document]  # tokens of answers
        tokens = old.tokens.new_zeros(len(document))
        start = (old.lengths.cumsum(0) - old.lengths)[prompt]
        tokens[~ours] = old.tokens[(start[document] + place)[~ours]]
        logprobs = old.weights.new_zeros(len(document), dtype=drawn[0][2].dtype if drawn else wide)
        if drawn:
            shape = len(prompt), len(drawn)
            table, scores = drawn[0][1].new_zeros(shape), logprobs.new_zeros(shape)
            for n, (rows, ids, found) in enumerate(drawn):
                table[rows, n], scores[rows, n] = ids, found
            at = document[ours], (place - before[document])[ours]
            tokens[ours], logprobs[ours] = table[at].to(tokens.dtype), scores[at]
        per_document = tree_map(lambda x: x[prompt.to(x.device)], old.per_document)
        return Docs(
            tokens=tokens,
            weights=ours.to(old.weights.dtype),
            lengths=lengths,
            index=self.index,
            targets={"generator": logprobs},
            inputs={},
            per_document={**per_document, "prompt": old.index[prompt], "finished": done},
            shared=old.shared,
        )


def _one(prompts: Docs) -> Docs:
    """Make a prompt of one token, with the fields of these."""
    return dataclasses.replace(
        prompts,
        tokens=prompts.tokens.new_zeros(1),
        weights=prompts.weights.new_zeros(1),
        lengths=prompts.lengths.new_ones(1),
        index=prompts.index.new_zeros(1),
        per_document=tree_map(lambda x: x.new_zeros((1, *x.shape[1:])), prompts.per_document),
    )


def _every(device: torch.device) -> int:
    """Return after how many tokens to look who is done: on a GPU that waits for the device."""
    return 1 if device.type == "cpu" else BLOCK


def _uniform(keys: Key, block: int) -> Tensor:
    """Draw the next numbers of each answer, [answers, BLOCK]: in float64, to be compared with sums of probabilities."""
    draw = torch.func.vmap(lambda key: key.fold_in(block).uniform((BLOCK,), dtype=torch.float64))
    numbers: Tensor = draw(keys)
    return numbers


def _check(decode: Decode, prompts: Docs, key: Key, most: int, stop: Sequence[int], samples: int) -> None:
    """Refuse what cannot be answered."""
    check_callable("generate", "decode", decode)
    check_type("generate", "prompts", prompts, Docs, "what make_docs returns")
    check_type("generate", "key", key, Key, "a key, e.g. Key.seed(0)")
    for name, number in (("most", most), ("samples", samples)):
        check_type("generate", name, number, int, "a whole number")
        if number < 1:
            raise ValueError(f"generate: {name} is {number}; pass 1 or more")
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise TypeError(f"generate: stop is {stop!r}; pass a sequence of token ids, e.g. [tokenizer.eos_token_id]")
    if wrong := [x for x in stop if not hasattr(x, "__index__") or isinstance(x, bool | Tensor)]:
        raise TypeError(f"generate: stop has {wrong[0]!r}; pass token ids, whole numbers")
    if len(prompts.lengths) and int(prompts.lengths.min()) < 1:
        raise ValueError(f"generate: prompt {int(prompts.lengths.argmin())} is empty; give it a token to begin with")
    if len(torch.unique(prompts.index)) < len(prompts.index):
        raise ValueError(
            "generate: two prompts have one index, and would be given the same answers; pass samples= for several answers "
            "to a prompt, or number them with dataclasses.replace(prompts, index=torch.arange(len(prompts.index)))"
        )
    for name in ("targets", "inputs"):
        if held := getattr(prompts, name):
            raise ValueError(
                f"generate: prompts have {name} {next(iter(held))!r} for each token, and answers would have none; leave "
                f"them out with dataclasses.replace(prompts, {name}={{}})"
            )
    for name in ("prompt", "finished"):
        if name in prompts.per_document:
            raise ValueError(f"generate: prompts have per_document[{name!r}], which is a result; give it another name")


def _check_decoded(logits: Tensor, cache: Any, documents: int) -> None:
    """Refuse what has no row for each document: repeating it for samples would take other rows, and say nothing."""
    if logits.dim() != 2 or len(logits) != documents:
        raise ValueError(
            f"generate: decode returned logits {tuple(logits.shape)} for {documents} documents; return [documents, vocab], "
            "what may follow each document's last token"
        )
    for path, x in zip(tree_paths(cache), tree_leaves(cache), strict=True):
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        if shape[:1] != (documents,):
            raise ValueError(
                f"generate: decode returned a cache with {path or 'a leaf'} of shape {shape} for {documents} documents; "
                "give each of its tensors a row for each document, along the first dimension"
            )
