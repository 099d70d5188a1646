"""Keywords that a function does not know, and the one that was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

#: The default of an argument that must be given, where ``**unknown`` takes the keyword that stands for it. Checks of
#: arguments call it by its type: "target must be a torch.Tensor, got nothing".
NOTHING: Any = type("nothing", (), {})()

#: Names that libraries have for the same thing. A function has at most one name of a row, but for its result's.
_SYNONYMS = (
    "dim d_model in_features embed_dim hidden_size hidden_dim channels in_channels in_dim feature_dim feat_dim",
    "features input x feats inputs embeddings logits",
    "target targets label labels y",
    "module model net network what",
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


def suggesting(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a TypeError of ``function`` for an unknown keyword say which one was probably meant."""
    known = names_of(function)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(unexpected(function.__qualname__, name, known))
        return function(*args, **kwargs)

    return checked


def hiding_unknown(function: F) -> F:
    """Shows a function without its ``**unknown``, and what must be given without its default NOTHING.

    A function that is called in every step takes ``**unknown`` and hands it to :func:`unexpected`, because a wrapper
    takes 0.2 µs a call.
    """
    whole = inspect.signature(function)
    shown = [p for p in whole.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shown = [p.replace(default=p.empty) if p.default is NOTHING else p for p in shown]
    marked: Any = function
    marked.__signature__ = whole.replace(parameters=shown)
    return function


def names_of(function: Callable[..., Any]) -> list[str]:
    """The keywords that a function takes."""
    parameters = inspect.signature(function).parameters
    return [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n != "self"]


def unexpected(function: str, name: str, known: list[str], others: Sequence[str] = ()) -> str:
    """The message for a keyword that a function does not know.

    Args:
        function: its name.
        name: the keyword.
        known: those that it knows.
        others: those that the constructor of its module knows.
    """
    rows = [row.split() for row in _SYNONYMS if name.lower() in row.split()]
    meant, of_constructor = ([n for row in rows for n in row if n in names] for names in (known, others))
    if not meant and (name in others or of_constructor):
        advice = f"{(name if name in others else of_constructor[0])}= is an argument of the constructor"
    else:
        meant = meant or get_close_matches(name.lower(), known, n=1)
        advice = f"did you mean {meant[0]}=?" if meant else f"it takes {', '.join(known)}"
    return f"{function}() got an unexpected keyword argument {name!r}: {advice}"
