"""The first mistake anyone makes is passing the wrong thing; each answer names function, argument and what to pass."""

import dataclasses
import re

import pytest
import torch

import fstep
from fstep_models.dense import Dense

DOCS = fstep.make_docs([[1, 2, 3]])
PACKED = fstep.pack_thd(DOCS)
X = torch.zeros(3, 2)
RATIO = fstep.Ratio(torch.tensor(1.0), torch.tensor(1.0))


def identity(params, x, mb):
    return mb


CALLS = {
    "pack_thd: batch is a list; pass what make_docs returns": lambda: fstep.pack_thd([[1, 2, 3]]),
    "pack_thd: length is a float": lambda: fstep.pack_thd(DOCS, length=8.0),
    "pack_thd: multiple_of is a float": lambda: fstep.pack_thd(DOCS, multiple_of=2.0),
    "pack_thd: tokens are torch.uint8; pass int64 ids": lambda: fstep.pack_thd(
        dataclasses.replace(DOCS, tokens=DOCS.tokens.to(torch.uint8))
    ),
    "init_state: optimizer is <class 'fstep.update.adamw.AdamW'>; pass a value": lambda: fstep.init_state(
        {"w": X}, fstep.AdamW
    ),
    "adamw.init: params is a Linear, a module; make params of it with fstep.lift": lambda: fstep.init_state(
        torch.nn.Linear(1, 1), fstep.adamw
    ),
    "adamw.init: trainable is a list": lambda: fstep.init_state({"w": X}, fstep.adamw, trainable=["w"]),
    "split_trainable: params is a Linear, a module": lambda: fstep.pp_forward_backward(
        identity, identity, torch.nn.Linear(1, 1), [X]
    ),
    "split_trainable: trainable is a list": lambda: fstep.split_trainable({"w": X}, ["w"]),
    "unpack_thd: packed is a Docs": lambda: fstep.unpack_thd(DOCS),
    "split_documents: packed is a Docs": lambda: fstep.split_documents(X, DOCS),
    "split_documents: values is a list": lambda: fstep.split_documents([1, 2, 3], PACKED),
    "split_microbatches: batch is a list": lambda: fstep.split_microbatches([[1]], num=1),
    "divide_documents: axis is a Mesh": lambda: fstep.divide_documents(DOCS, axis=fstep.Mesh()),
    "a batch is a list": lambda: fstep.select_documents([[1]], [0]),
    "a batch is a int": lambda: fstep.join_documents([1, 2]),
    "draw_documents: position is a int": lambda: fstep.draw_documents(3, num=1, of=2),
    "make_docs: tokens are no numbers": lambda: fstep.make_docs([["a", "b"]]),
    "make_docs: tokens are no numbers that": lambda: fstep.make_docs([[1, None]]),
    "make_docs: tokens are no numbers that fit": lambda: fstep.make_docs([[2**63]]),
    "sft_loss: logprobs is a list": lambda: fstep.sft_loss([0.0], X),
    "clipped_loss: log_ratio is a list": lambda: fstep.clipped_loss([0.0], X, X),
    "kl_loss: weights is a Docs": lambda: fstep.kl_loss(X, X, DOCS),
    "weigh: values is a float": lambda: fstep.weigh(0.0, X),
    "gae: batch is a Tensor": lambda: fstep.gae(X, X, X),
    "group_advantages: groups is a list": lambda: fstep.group_advantages(X[:, 0], [0, 0, 1]),
    "spread_documents: values is a list": lambda: fstep.spread_documents([1.0], DOCS),
    "dpo_loss: the first argument is a Tensor; pass what cp_sequence_sums returns": lambda: fstep.dpo_loss(X, None, beta=1),
    "dpo_loss: pairs is a tuple; pass what find_pairs returns": lambda: fstep.dpo_loss(RATIO, (X, X), beta=1),
    "kto_loss: ratios is a Tensor": lambda: fstep.kto_loss(X, X, beta=1, kl=0.0),
    "find_pairs: chosen is a list": lambda: fstep.find_pairs(X, [True, False]),
    "bradley_terry_loss: rewards is a list": lambda: fstep.bradley_terry_loss([1.0], None),
    "distill_loss: teacher_weight is a dict": lambda: fstep.distill_loss(X, X, X, {}, X[:, 0]),
    "topk_distill_loss: ids is a list": lambda: fstep.topk_distill_loss(X, X, [[1]], X, X[:, 0]),
    "split_microbatches: together is a list": lambda: fstep.split_microbatches(DOCS, num=1, together=[0]),
    "token_logprobs: labels is a list": lambda: fstep.token_logprobs(X, X, [0, 1, 1]),
    "token_top_logprobs: weight is a list": lambda: fstep.token_top_logprobs(X, [0.0], 1),
    "token_logprob_sum: weights is a list": lambda: fstep.token_logprob_sum(X, X, torch.zeros(3).long(), [0.0, 1, 1]),
    "finalize_grads: mesh is a NoneType": lambda: fstep.finalize_grads({"w": X}, RATIO, mesh=None),
    "adamw.update: state is a dict": lambda: fstep.adamw.update({}, {"w": X}, lr=0.1),
    "muon.update: state is a dict": lambda: fstep.muon.update({}, {"w": X}, lr=0.1),
    "sgd.update: state is a dict": lambda: fstep.sgd.update({}, {"w": X}, lr=0.1),
    "init_state: optimizer is 'adamw'": lambda: fstep.init_state({"w": X}, "adamw"),
    "value_and_grad: f is a NoneType": lambda: fstep.value_and_grad(None),
    "vjp: f is a Tensor": lambda: fstep.vjp(X, X),
    "pp_forward_backward: loss_fn is a NoneType": lambda: fstep.pp_forward_backward(identity, None, {"w": X}, [X]),
    "pp_forward_backward: stage_fn is a dict": lambda: fstep.pp_forward_backward({}, identity, {"w": X}, [X]),
    "pp_forward: axis is a str": lambda: fstep.pp_forward(identity, identity, {"w": X}, [X], axis="pp"),
    "stage_ranks: ranks is a Axis": lambda: fstep.stage_ranks("1f1b", fstep.Mesh().pp),
    "Tied: to is a int": lambda: fstep.Tied(3),
    "Dense.stage: mesh is a str": lambda: Dense.stage(None, "mesh"),
    "Mesh: dp is a int": lambda: fstep.Mesh(dp=2),
}

# A name, or the whole mesh, in place of one of its axes.
ROW = torch.zeros(3, 1, 8)
OF_AN_AXIS = {
    "psum": lambda axis: fstep.psum(X, axis=axis),
    "pvary": lambda axis: fstep.pvary(X, axis=axis),
    "pmax": lambda axis: fstep.pmax(X, axis=axis),
    "as_partial": lambda axis: fstep.as_partial(X, axis=axis),
    "all_gather": lambda axis: fstep.all_gather(X, axis=axis, grad="sum"),
    "reduce_scatter": lambda axis: fstep.reduce_scatter(X, axis=axis),
    "take_shard": lambda axis: fstep.take_shard(X, axis=axis),
    "all_to_all": lambda axis: fstep.all_to_all(X, axis=axis, split_dim=0, concat_dim=1),
    "ppermute": lambda axis: fstep.ppermute(X, 1, axis=axis),
    "broadcast": lambda axis: fstep.broadcast(X, axis=axis, src=0, grad="sum"),
    "cp_shard": lambda axis: fstep.cp_shard(PACKED, axis=axis),
    "cp_unshard": lambda axis: fstep.cp_unshard(X, PACKED, axis=axis, grad="sum"),
    "cp_gather_logprobs": lambda axis: fstep.cp_gather_logprobs(X[:, 0], PACKED, axis=axis, grad="sum"),
    "cp_sequence_log_ratio": lambda axis: fstep.cp_sequence_log_ratio(X[:, 0], PACKED, axis=axis),
    "whiten": lambda axis: fstep.whiten(X, X, axis=axis),
    "cp_attention": lambda axis: fstep.cp_attention(ROW, ROW, ROW, PACKED.cu_seqlens_padded, axis=axis, max_seqlen=3),
    "tp_gather": lambda axis: fstep.tp_gather(X, axis=axis),
    "tp_scatter": lambda axis: fstep.tp_scatter(X, axis=axis),
    "tp_row_linear": lambda axis: fstep.tp_row_linear(X, X, axis=axis),
    "tp_embed": lambda axis: fstep.tp_embed(PACKED.tokens, X, axis=axis),
    "tp_local": lambda axis: fstep.tp_local({"w": X}, axis=axis),
    "tp_head_logits": lambda axis: fstep.tp_head_logits(X, X, axis=axis),
    "tp_token_logprobs": lambda axis: fstep.tp_token_logprobs(X, X, PACKED.labels, axis=axis),
    "tp_token_top_logprobs": lambda axis: fstep.tp_token_top_logprobs(X, X, 1, axis=axis),
    "tp_token_logprob_sum": lambda axis: fstep.tp_token_logprob_sum(X, X, PACKED.labels, X[:, 0], axis=axis),
    "cp_sequence_sums": lambda axis: fstep.cp_sequence_sums(X[:, 0], PACKED, axis=axis),
    "cp_sequence_last": lambda axis: fstep.cp_sequence_last(X[:, 0], PACKED, axis=axis),
    "tp_distill_loss": lambda axis: fstep.tp_distill_loss(X, X, X, X, X[:, 0], axis=axis),
    "tp_topk_distill_loss": lambda axis: fstep.tp_topk_distill_loss(X, X, PACKED.labels[:, None], X, X[:, 0], axis=axis),
    "shard_params": lambda axis: fstep.shard_params({"w": X}, axis),
}


@pytest.mark.parametrize("wrong", ["dp", fstep.Mesh()], ids=["name", "mesh"])
@pytest.mark.parametrize("name", OF_AN_AXIS)
def test_what_is_no_axis_is_named(name: str, wrong: object) -> None:
    with pytest.raises(TypeError, match=f"^{name}: axis is a {type(wrong).__name__}; pass "):
        OF_AN_AXIS[name](wrong)


@pytest.mark.parametrize("said", CALLS)
def test_a_wrong_type_is_named(said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        CALLS[said]()
