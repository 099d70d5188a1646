"""Every block of docs/migration.md runs; before and after are one network, checkpoints load, stripped nets deploy."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbf

TEXT = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
BLOCKS = {title: re.findall(r"```python\n(.+?)```", part, flags=re.DOTALL) for title, part in SECTIONS.items()}
PATTERNS = [title for title, part in SECTIONS.items() if "\nBefore:\n" in part]
SINGLE = [(title, i) for title, blocks in BLOCKS.items() if title not in PATTERNS for i in range(len(blocks))]
N, L, C = 6, 5, 32


def run(code):
    for package in ("lightning", "accelerate", "torchmetrics"):
        if re.search(rf"^(import|from) {package}\b", code, flags=re.MULTILINE):
            pytest.importorskip(package)
    names = {"__name__": "migration"}
    exec(compile(code, "docs/migration.md", "exec"), names)
    return names


RENAMED = run(BLOCKS["Checkpoints"][0])["renamed"]


def prefixes(title):
    """(theirs, ours), as the section's line on checkpoints says."""
    line = re.search(r"^Checkpoint: (.+?)\n\n", SECTIONS[title], flags=re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"`(\S+)` → `(\S+)`", line)


def backwards(title):
    return [(ours, theirs) for theirs, ours in prefixes(title)]


def build(code):
    """The block's network in fp64, without dropout."""
    net = run(code)["Net"]().double()
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0
    return net


def pair(title, change=("", "")):
    before, after = BLOCKS[title]
    assert change[0] in after
    before, after = build(before), build(after.replace(*change))
    after.load_state_dict(RENAMED(before.state_dict(), *prefixes(title)))
    return before, after


def inputs(title):
    y = torch.arange(N)
    if "DETR" in title:
        padding = torch.arange(L) >= torch.arange(N)[:, None] % 3 + 3
        x, pos = torch.randn(2, L, N, C, dtype=torch.float64)
        return x, padding, pos, [{"label": label} for label in y]
    return torch.randn(*((N, L, C) if "ViT" in title else (N, 64)), dtype=torch.float64), y


def outputs_and_gradients(net, args):
    out = net(*args)
    torch.manual_seed(1)
    (out[0] * torch.randn_like(out[0])).sum().backward()
    return out, {name: p.grad for name, p in net.named_parameters()}


def assert_same(before, after, title):
    args = inputs(title)
    expected, their_gradients = outputs_and_gradients(before, args)
    actual, gradients = outputs_and_gradients(after, args)
    torch.testing.assert_close(actual, expected)
    their_gradients = RENAMED(their_gradients, *prefixes(title))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name])
    return actual, gradients


def test_the_patterns_are_there():
    assert len(PATTERNS) >= 6
    assert all(len(BLOCKS[title]) == 2 for title in PATTERNS)
    assert len(SINGLE) >= 6


@pytest.mark.parametrize(("title", "i"), SINGLE)
def test_block(title, i):
    run(BLOCKS[title][i])


@pytest.mark.parametrize("title", PATTERNS)
def test_before_and_after_train_alike(title):
    (out, *_), gradients = assert_same(*pair(title), title)
    doubled = out.shape[1 if "DETR" in title else 0] == 2 * N
    assert doubled == ("not concatenate" not in title)
    assert all(g is not None and g.any() for g in gradients.values())


@pytest.mark.parametrize("title", PATTERNS)
def test_before_and_after_predict_alike(title):
    before, after = pair(title)
    (out, *_), _ = assert_same(before.eval(), after.eval(), title)
    assert N in out.shape[:2]


WRONG = [
    ("The function", ("BatchFormer(dim)", "BatchFormer(dim, num_heads=2)")),
    ("A wrapper that does not concatenate", ("self.former.mix(x) if", "x if")),
    ("BatchFormerV2 in a ViT", ("forked=i > 0", "forked=i > 0, batch_dim=1, channel_dim=2")),
    ("BatchFormerV2 in a ViT", ("forked=i > 0", "forked=False")),
    ("BatchFormerV2 in a DETR encoder", ("stream(x, padding, pos, targets)", "stream(x, padding, pos, targets[::-1])")),
    ("BatchFormerV2 in a DETR encoder", ("self.again if i else", "self.again if i > 1 else")),
    ("Evaluation that runs the module: eval_global", ("x = self.former.mix(x)", "pass")),
]


@pytest.mark.parametrize(("title", "change"), WRONG)
def test_the_comparison_notices_a_mistake(title, change):
    before, after = pair(title, change)
    train = "eval_global" not in title
    with pytest.raises((AssertionError, ValueError)):
        assert_same(before.train(train), after.train(train), title)


@pytest.mark.parametrize("title", PATTERNS)
def test_convert_of_the_code_as_it_was(title):
    before, converted = build(BLOCKS[title][0]), build(BLOCKS[title][0])
    converted.load_state_dict(before.state_dict())
    layers = sum(type(m) is nn.TransformerEncoderLayer for m in before.modules())
    assert fastbf.convert(converted) == layers > 0
    assert list(converted.state_dict()) == list(before.state_dict())
    args = inputs(title)
    for net in (before, converted):
        net.zero_grad()
    expected, actual = outputs_and_gradients(before, args), outputs_and_gradients(converted, args)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("title", PATTERNS)
def test_checkpoints_go_both_ways(title, tmp_path):
    before, after = pair(title)
    nn.init.normal_(next(iter(after.parameters())))
    torch.save(after.state_dict(), tmp_path / "ours.pth")
    before.load_state_dict(RENAMED(torch.load(tmp_path / "ours.pth"), *backwards(title)))
    assert_same(before, after, title)


def test_a_wrong_prefix_is_refused():
    before, after = (build(code) for code in BLOCKS["The function"])
    with pytest.raises(RuntimeError, match=r"Missing key.* \"former\.layers\.0"):
        after.load_state_dict(before.state_dict())


class Deployed(nn.Module):
    """A pattern's network of images, padding and positions alone: labels are not part of what is deployed."""

    def __init__(self, net, rest):
        super().__init__()
        self.net, self.rest = net, rest

    def forward(self, *tensors):
        return self.net(*tensors, self.rest)[0]


def operations(graph):
    """How often every ATen operation of an exported program runs, but for transposes, which are views."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return Counter(name for name in names if name != "aten.transpose.int")


def traced_operations(traced):
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    return Counter(kind for kind in kinds if kind.startswith("aten::") and kind != "aten::transpose")


@pytest.mark.parametrize("title", PATTERNS)
@torch.no_grad()
def test_stripped_export_and_trace_hold_nothing_of_the_module(title):
    _, net = pair(title)
    if "eval_global" in title:
        net.eval_global = False
    *tensors, rest = inputs(title)
    tensors = tuple(tensors)
    expected = Deployed(net.eval(), rest)(*tensors)
    ours = {name for name, m in net.named_modules() if isinstance(m, fastbf.BatchFormer)}
    never_there = Deployed(build(BLOCKS[title][0]).eval(), rest)  # the original, which skips its layers in evaluation
    if "eval_global" in title:
        never_there.net.eval_global = False

    stripped = Deployed(fastbf.strip(net), rest).eval()
    exported = torch.export.export(stripped, tensors)
    traced = torch.jit.trace(stripped, tensors)
    for out in (stripped(*tensors), exported.module()(*tensors), traced(*tensors)):
        torch.testing.assert_close(out, expected)
    for kept in (stripped.state_dict(), exported.state_dict, traced.state_dict()):
        assert kept
        assert not [key for key in kept if key.removeprefix("net.").startswith(tuple(f"{name}." for name in ours))]
    assert operations(exported.graph) == operations(torch.export.export(never_there, tensors).graph)
    assert traced_operations(traced) == traced_operations(torch.jit.trace(never_there, tensors))
    assert not re.search("BatchFormer", str(exported.graph) + str(traced.inlined_graph))


def test_the_module_would_be_seen():
    """Without ``strip``, and with evaluation that runs it, the same checks find parameters and operations."""
    title = "Evaluation that runs the module: eval_global"
    _, net = pair(title)
    x, y = inputs(title)
    net.eval()
    on = torch.export.export(Deployed(net, y), (x,))
    assert any("former" in key for key in on.state_dict)
    traced = traced_operations(torch.jit.trace(Deployed(net, y), (x,)))
    net.eval_global = False
    assert operations(on.graph) != operations(torch.export.export(Deployed(net, y), (x,)).graph)
    assert traced != traced_operations(torch.jit.trace(Deployed(net, y), (x,)))
