"""What ``tests/aot.py`` compiles: every kernel at every committed configuration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from fastbf.kernels import activation, add_norm, attention, cross_entropy
from fastbf.kernels.attention_configs import TABLE, Config, key_value_passes, transposes
from fastbf.kernels.cross_entropy import REGISTERS, alignment, class_tile
from fastbf.kernels.rng import KEEP_BITS, KEEP_HALVES
from fastbf.kernels.rows import ACTIVATION_TILE, norm_tile

KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        attention.forward_streaming, attention.forward_packed, attention.backward_query, attention.backward_key_value,
        attention.backward_packed, add_norm.add_norm_forward, add_norm.add_norm_backward,
        activation.activation_forward, activation.activation_backward, cross_entropy.cross_entropy_forward,
        cross_entropy.cross_entropy_sums, cross_entropy.cross_entropy_finish, cross_entropy.cross_entropy_backward,
    )
}  # fmt: skip

#: Which GPUs, by compute capability, use the attention table's entries for an architecture.
USERS = {80: (80, 86), 90: (90,), 100: (100,)}
CAPABILITIES = tuple(itertools.chain(*USERS.values()))

FP32_POINTERS = ("p_lse", "p_delta", "p_partials", "p_parts", "p_rows", "p_total", "p_stats", "p_logit_bias", "p_sums")
#: What has the products' 16-bit dtype under autocast, where the rest is fp32.
NARROW_POINTERS = ("p_x", "p_dx", "p_copy", "p_dy2")


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    kind: str  #: dtype, and how it is multiplied
    size: int  #: head dimension or channels
    keep: int
    capability: int
    tiles: str
    elements: dict[str, str]  #: of every pointer
    constants: dict[str, object]
    options: dict[str, int]  #: warps, stages, registers
    tensor_cores: bool  #: whether their instructions are meant to be there
    meant: tuple[str, ...] = ()  #: what else is meant to be in the machine code

    @property
    def sides(self) -> list[int]:
        """Rows and columns of a tile."""
        return [self.constants[side] for side in ("BM", "BN", "BC") if side in self.constants]


#: What attention writes in fp32 where ranks share a batch: what is summed over chunks or ranks.
SUMMED_POINTERS = {
    "forward_streaming": ("p_o",),
    "backward_query": ("p_dq",),
    "backward_key_value": ("p_dk", "p_dv"),
    "backward_packed": ("p_dk", "p_dv"),
}


def _elements(kernel: str, dtype: str, narrow: str | None = None) -> dict[str, str]:
    """The element type of every pointer: ``dtype``, and ``narrow`` where autocast has 16 bits."""
    types = {}
    for name in KERNELS[kernel].arg_names:
        if name in ("p_seed", "p_target"):
            types[name] = "i64"
        elif name.startswith("p_"):
            types[name] = "fp32" if name in FP32_POINTERS else narrow if name in NARROW_POINTERS and narrow else dtype
    return types


def _attention_jobs(full: bool) -> Iterator[Job]:
    """One of an entry's two kinds at its largest head dimension with decisions of one bit, the other at one that fills
    no chunk with decisions of 16; ``full`` both ways of both. The second kind writes what ranks sum in fp32.
    """
    for (kernel, itemsize, architecture), by_head_dim in TABLE.items():
        kinds = [("bf16", "tf32"), ("fp16", "tf32")] if itemsize == 2 else [("fp32", "tf32"), ("fp32", "ieee")]
        for head_dim, configs in by_head_dim.items():
            ways = [(head_dim, KEEP_BITS.value), (head_dim - 8, KEEP_HALVES.value)]
            pairs = list(itertools.product(kinds, ways)) if full else list(zip(kinds, ways, strict=True))
            for config, capability, (kind, way) in itertools.product(configs, USERS[architecture], pairs):
                yield from attention_jobs(kernel, config, *kind, *way, capability)


def attention_jobs(
    kernel: str, config: Config, dtype: str, precision: str, head_dim: int, keep: int, capability: int
) -> Iterator[Job]:
    """What one configuration of an attention kernel is compiled to: a job for each launch that it takes."""
    for needs in key_value_passes(config) if kernel == "backward_key_value" else [(True, True)]:
        constants = {
            "D": head_dim, "BM": config.block_m, "BN": config.block_n, "BD": config.block_d, "KEEP": keep,
            "PRECISION": precision, "RELOAD": config.reload, "TRANSPOSED": transposes(config),
            "NEEDS_DQ": True, "NEEDS_DK": needs[0], "NEEDS_DV": needs[1],
        }  # fmt: skip
        tiles = "{}x{}x{}, {} warps, {}".format(*config) + ", reload" * config.reload
        label = f"{dtype} {precision}" if dtype == "fp32" else dtype
        elements = _elements(kernel, dtype)
        if dtype == "fp16":
            elements |= dict.fromkeys(SUMMED_POINTERS.get(kernel, ()), "fp32")
        yield Job(
            kernel, label, head_dim, keep, capability, tiles, elements, constants,
            {"num_warps": config.num_warps, "num_stages": config.num_stages}, precision == "tf32",
        )  # fmt: skip


WIDTHS = (32, 256, 512, 1024, 2048, 4096, 8192)
#: The flags that each call of an encoder layer sets, post-norm, then pre-norm.
CALLS = {
    "add_norm_forward": {
        "drop, norm": "HAS_X NORM HAS_BIAS STORE_SUM COPY",
        "drop, norm, fork": "HAS_X NORM HAS_BIAS STORE_SUM FORK",
        "norm": "NORM HAS_BIAS",
        "drop, fork": "HAS_X FORK PLAIN_FORKED",
    },
    "add_norm_backward": {
        "fork, norm, drop": "HAS_X NORM STORE_DS PARTIALS DY_FORKED",
        "norm, drop, plain": "HAS_X NORM HAS_DY2 HAS_PLAIN STORE_DS PARTIALS DS_FORKED",
        "fork, drop": "HAS_X PARTIALS DY_FORKED",
        "norm, skip, drop": "HAS_X NORM HAS_SKIP SKIP_FORKED STORE_DS PARTIALS",
        "norm, skip, plain": "NORM HAS_SKIP HAS_PLAIN STORE_DS PARTIALS",
    },
}


def _ways(width: int) -> Iterator[tuple[str, str, str | None, int, int]]:
    """(label, dtype, narrow dtype, channels, keep): one-bit decisions under autocast, those of 16 bits in pure fp16."""
    yield "autocast", "fp32", "bf16", width, KEEP_BITS.value
    yield "fp16", "fp16", None, width - 8, KEEP_HALVES.value


def _norm_jobs() -> Iterator[Job]:
    for kernel, calls in CALLS.items():
        flags = [name for name in KERNELS[kernel].arg_names if name.isupper() and name not in ("C", "BM", "BC", "KEEP")]
        for width, (call, given), capability in itertools.product(WIDTHS, calls.items(), CAPABILITIES):
            tile = norm_tile(kernel, width)
            for label, dtype, narrow, channels, keep in _ways(width):
                constants = {"C": channels, "BM": tile.rows, "BC": tile.channels, "KEEP": keep}
                constants |= {flag: flag in given.split() for flag in flags}
                options = {"num_warps": tile.num_warps}
                if kernel == "add_norm_backward":
                    in_registers = add_norm.sums_in_registers(constants["HAS_X"], constants["NORM"], tile.channels)
                    constants["IN_REGISTERS"] = in_registers
                    options["maxnreg"] = tile.maxnreg()
                yield Job(
                    kernel, label, channels, keep, capability, f"{call}, {tile.num_warps} warps",
                    _elements(kernel, dtype, narrow), constants, options, False,
                )  # fmt: skip


def _activation_jobs() -> Iterator[Job]:
    tile = ACTIVATION_TILE
    for kernel, gelu, capability in itertools.product(
        ("activation_forward", "activation_backward"), (False, True), CAPABILITIES
    ):
        for _, dtype, narrow, channels, keep in _ways(2048):
            dtype = narrow or dtype
            constants = {"F": channels, "BM": tile.rows, "BC": tile.channels, "GELU": gelu, "KEEP": keep}
            if kernel == "activation_backward":
                constants |= {"STORE_U": gelu, "PARTIALS": True}
            yield Job(
                kernel, dtype, channels, keep, capability, f"{'gelu' if gelu else 'relu'}, {tile.num_warps} warps",
                _elements(kernel, dtype), constants, {"num_warps": tile.num_warps}, False,
            )  # fmt: skip


#: Of the classifier: odd, even, a multiple of 8, more than a tile, a row that takes many of them.
CLASSES = (7, 101, 250, 512, 1000, 8142)
#: Loads of 16 bytes, however odd the number of classes, if they are more than the threads.
WIDE = ("LDG.E.128",)
#: The options that a call of the classifier's loss sets: none, all of class indices, all of probabilities.
OPTIONS = {
    "plain": "HAS_BIAS MEAN SUMS",
    "all": "HAS_WEIGHT HAS_BIAS HAS_LOGIT_BIAS SMOOTH COUNT MEAN SUMS PARTS",
    "soft": "HAS_WEIGHT HAS_BIAS HAS_LOGIT_BIAS SMOOTH SOFT COUNT MEAN SUMS",
}


def _classifier_jobs() -> Iterator[Job]:
    sizes = {"cross_entropy_forward": CLASSES, "cross_entropy_backward": CLASSES}
    sizes |= {"cross_entropy_sums": (0,), "cross_entropy_finish": (0,)}
    for kernel, classes in sizes.items():
        sized = ("BM", "BC", "ALIGN", "STREAMS")
        flags = [name for name in KERNELS[kernel].arg_names if name.isupper() and name not in ("K", *sized)]
        for num_classes, (call, given), capability in itertools.product(classes, OPTIONS.items(), CAPABILITIES):
            constants = {flag: flag in given.split() for flag in flags}
            if num_classes == 0:
                if call == "soft":
                    continue
                constants |= {"STREAMS": 2, "BM": 1024}
                options, meant = {"num_warps": 8, "debug": True}, () if constants.get("PARTS") else ("__assertfail",)
            else:
                tile = class_tile(num_classes)
                constants |= {"BM": tile.rows, "BC": tile.channels, "ALIGN": alignment(num_classes)}
                options, meant = {"num_warps": tile.num_warps, "maxnreg": REGISTERS}, WIDE if num_classes > 32 else ()
            for dtype in {"plain": ("bf16",), "all": ("fp32", "bf16"), "soft": ("fp16",)}[call]:
                elements = _elements(kernel, dtype)
                if "p_target" in elements:
                    elements |= {"p_target": dtype if call == "soft" else "i64", "p_weight": "fp32", "p_bias": "fp32"}
                yield Job(
                    kernel, dtype, num_classes, 0, capability, f"{call}, {options['num_warps']} warps", elements,
                    constants, options, False, meant,
                )  # fmt: skip


def jobs(kernels: list[str], capabilities: list[int], full: bool) -> list[Job]:
    """The compilations of these kernels for these GPUs; ``full`` adds to attention's."""
    every = itertools.chain(_attention_jobs(full), _norm_jobs(), _activation_jobs(), _classifier_jobs())
    return [job for job in every if job.kernel in kernels and job.capability in capabilities]
