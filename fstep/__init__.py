"""Training steps as pure functions, on PyTorch: ``step(state, batch) -> (state, metrics)``."""

from fstep.batch.batch import Docs, cut, join_documents, select_documents
from fstep.batch.loader import DataPosition, draw_documents
from fstep.batch.make import make_docs
from fstep.batch.microbatch import divide_documents, split_microbatches
from fstep.batch.pack import pack_thd, split_documents, unpack_thd
from fstep.batch.packed import Packed, with_targets
from fstep.batch.plan import plan_balanced, plan_first_fit
from fstep.grad.autodiff import split_trainable, value_and_grad, vjp
from fstep.grad.by_name import stage_ranks
from fstep.grad.fold import fold_layers
from fstep.grad.lift import lift
from fstep.grad.pieces import Pieces
from fstep.grad.pipeline import pp_forward, pp_forward_backward
from fstep.grad.remat import remat
from fstep.grad.schedule import Action, Schedule, ScheduleStats, Span
from fstep.grad.schedules import dualpipev, gpipe, interleaved, interleaved_zero_bubble, one_f_one_b, zbv
from fstep.grad.shard import gather_params, scatter_grads, shard_params, unshard_params
from fstep.key import Key
from fstep.loss.advantage import group_advantages, whiten
from fstep.loss.distill import distill_loss, topk_distill_loss, tp_distill_loss, tp_topk_distill_loss
from fstep.loss.documents import document_weights, spread_documents
from fstep.loss.importance import cp_sequence_log_ratio, importance_weights, ratio_extremes
from fstep.loss.kl import kl_loss
from fstep.loss.kto import kto_kl, kto_loss
from fstep.loss.pairs import Pairs, find_pairs
from fstep.loss.policy import cispo_loss, clipped_loss, reinforce_loss
from fstep.loss.preference import chosen_nll, dpo_loss, ipo_loss, orpo_loss, simpo_loss
from fstep.loss.reward import bradley_terry_loss
from fstep.loss.sequence import cp_sequence_last, cp_sequence_sums
from fstep.loss.sft import sft_loss
from fstep.loss.value import gae, value_loss
from fstep.loss.weigh import weigh
from fstep.mesh.axis import Axis, Mesh, require_single
from fstep.mesh.collectives import (
    all_gather,
    all_to_all,
    as_partial,
    broadcast,
    pmax,
    ppermute,
    psum,
    pvary,
    reduce_scatter,
    take_shard,
)
from fstep.mesh.launch import mesh_from_env
from fstep.mesh.place import Copied, Place, Shard, Stages, bare, cut_like, places
from fstep.mesh.simulate import simulate
from fstep.mesh.transport import MeshError
from fstep.ops.attention import packed_attention
from fstep.ops.context import cp_attention, cp_gather_logprobs, cp_shard, cp_unshard
from fstep.ops.factors import split_weights
from fstep.ops.head import head_logits, token_logprob_sum, token_logprobs
from fstep.ops.layers import embed, linear, rms_norm, rotate
from fstep.ops.rope import Rope, rope_tables
from fstep.ops.tensor import tp_embed, tp_gather, tp_local, tp_row_linear, tp_scatter
from fstep.ops.top import token_top_logprobs, tp_token_top_logprobs
from fstep.ops.vocab import tp_head_logits, tp_token_logprob_sum, tp_token_logprobs
from fstep.ratio import Ratio
from fstep.rollout.gather import gather_documents
from fstep.rollout.generate import generate
from fstep.rollout.sample import sample_tokens
from fstep.state.checkpoint import CheckpointError, latest_step, load_checkpoint, save_checkpoint
from fstep.state.state import DonatedError, TrainState, init_state
from fstep.state.weights import HFTensor, WeightsError, load_hf, save_hf, stream_hf
from fstep.trace import in_transform, is_recording
from fstep.tree import (
    Tied,
    cast,
    pytree,
    static,
    to_device,
    tree_leaves,
    tree_map,
    tree_map_with_path,
    tree_merge,
    tree_paths,
    tree_replace_leaves,
)
from fstep.update.adamw import AdamW, AdamWState, adamw
from fstep.update.finalize import finalize_grads
from fstep.update.lr import constant, warmup_cosine, warmup_linear, wsd
from fstep.update.muon import Muon, MuonState, hidden_matrices, muon
from fstep.update.rows import matrices
from fstep.update.sgd import SGD, SGDState, sgd

__all__ = [
    "SGD",
    "Action",
    "AdamW",
    "AdamWState",
    "Axis",
    "CheckpointError",
    "Copied",
    "DataPosition",
    "Docs",
    "DonatedError",
    "HFTensor",
    "Key",
    "Mesh",
    "MeshError",
    "Muon",
    "MuonState",
    "Packed",
    "Pairs",
    "Pieces",
    "Place",
    "Ratio",
    "Rope",
    "SGDState",
    "Schedule",
    "ScheduleStats",
    "Shard",
    "Span",
    "Stages",
    "Tied",
    "TrainState",
    "WeightsError",
    "adamw",
    "all_gather",
    "all_to_all",
    "as_partial",
    "bare",
    "bradley_terry_loss",
    "broadcast",
    "cast",
    "chosen_nll",
    "cispo_loss",
    "clipped_loss",
    "constant",
    "cp_attention",
    "cp_gather_logprobs",
    "cp_sequence_last",
    "cp_sequence_log_ratio",
    "cp_sequence_sums",
    "cp_shard",
    "cp_unshard",
    "cut",
    "cut_like",
    "distill_loss",
    "divide_documents",
    "document_weights",
    "dpo_loss",
    "draw_documents",
    "dualpipev",
    "embed",
    "finalize_grads",
    "find_pairs",
    "fold_layers",
    "gae",
    "gather_documents",
    "gather_params",
    "generate",
    "gpipe",
    "group_advantages",
    "head_logits",
    "hidden_matrices",
    "importance_weights",
    "in_transform",
    "init_state",
    "interleaved",
    "interleaved_zero_bubble",
    "ipo_loss",
    "is_recording",
    "join_documents",
    "kl_loss",
    "kto_kl",
    "kto_loss",
    "latest_step",
    "lift",
    "linear",
    "load_checkpoint",
    "load_hf",
    "make_docs",
    "matrices",
    "mesh_from_env",
    "muon",
    "one_f_one_b",
    "orpo_loss",
    "pack_thd",
    "packed_attention",
    "places",
    "plan_balanced",
    "plan_first_fit",
    "pmax",
    "pp_forward",
    "pp_forward_backward",
    "ppermute",
    "psum",
    "pvary",
    "pytree",
    "ratio_extremes",
    "reduce_scatter",
    "reinforce_loss",
    "remat",
    "require_single",
    "rms_norm",
    "rope_tables",
    "rotate",
    "sample_tokens",
    "save_checkpoint",
    "save_hf",
    "scatter_grads",
    "select_documents",
    "sft_loss",
    "sgd",
    "shard_params",
    "simpo_loss",
    "simulate",
    "split_documents",
    "split_microbatches",
    "split_trainable",
    "split_weights",
    "spread_documents",
    "stage_ranks",
    "static",
    "stream_hf",
    "take_shard",
    "to_device",
    "token_logprob_sum",
    "token_logprobs",
    "token_top_logprobs",
    "topk_distill_loss",
    "tp_distill_loss",
    "tp_embed",
    "tp_gather",
    "tp_head_logits",
    "tp_local",
    "tp_row_linear",
    "tp_scatter",
    "tp_token_logprob_sum",
    "tp_token_logprobs",
    "tp_token_top_logprobs",
    "tp_topk_distill_loss",
    "tree_leaves",
    "tree_map",
    "tree_map_with_path",
    "tree_merge",
    "tree_paths",
    "tree_replace_leaves",
    "unpack_thd",
    "unshard_params",
    "value_and_grad",
    "value_loss",
    "vjp",
    "warmup_cosine",
    "warmup_linear",
    "weigh",
    "whiten",
    "with_targets",
    "wsd",
    "zbv",
]
