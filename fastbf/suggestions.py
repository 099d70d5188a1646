"""Keywords that a constructor does not know, and the one that was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Names that libraries have for the same thing. A constructor has at most one name of a row, but for the last two.
_SYNONYMS = (
    "dim d_model in_features embed_dim hidden_size hidden_dim channels in_channels in_dim feature_dim feat_dim",
    "features input x feats inputs embeddings",
    "num_heads nhead n_heads n_head heads num_attention_heads",
    "dim_feedforward d_ff d_ffn ffn_dim ff_dim mlp_dim mlp_hidden_dim intermediate_size feedforward_dim",
    "dropout dropout_p dropout_rate drop drop_rate p hidden_dropout_prob attn_drop attention_dropout",
    "num_layers n_layers depth layers num_hidden_layers",
    "activation act act_layer activation_fn hidden_act",
    "norm_first pre_norm prenorm normalize_before",
    "layer_norm_eps eps norm_eps",
    "bias use_bias",
    "process_group group pg",
    "num_classes out_features n_classes nb_classes num_labels classes out_dim out_channels",
    "class_weight class_weights weight weights",
    "class_counts class_count counts cls_num_list samples_per_class num_per_class class_frequency prior priors",
    "label_smoothing smoothing smooth eps",
    "scale logit_scale temperature",
    "ignore_index ignore_label ignore_idx",
    "batch_dim batch_first batch_axis",
)


def suggesting(constructor: Callable[P, R]) -> Callable[P, R]:
    """Makes a TypeError of ``constructor`` for an unknown keyword say which one was probably meant."""
    known = [name for name, p in inspect.signature(constructor).parameters.items() if p.kind is not p.VAR_KEYWORD][1:]

    @wraps(constructor)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(unexpected(constructor.__qualname__, name, known))
        return constructor(*args, **kwargs)

    return checked


def unexpected(function: str, name: str, known: list[str]) -> str:
    """The message for a keyword that a function does not know.

    Args:
        function: its name.
        name: the keyword.
        known: those that it knows.
    """
    rows = [row.split() for row in _SYNONYMS]
    meant = [other for row in rows if name.lower() in row for other in row if other in known]
    meant = meant or get_close_matches(name.lower(), known, n=1)
    advice = f"did you mean {meant[0]}=?" if meant else f"it takes {', '.join(known)}"
    return f"{function}() got an unexpected keyword argument {name!r}: {advice}"
