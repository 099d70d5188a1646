"""What the ranks of ``ranks.py`` run: functions of a rank's part of a batch that every rank makes whole."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastbf
from fastbf import functional
from fastbf.distributed import collectives, process_groups
from fastbf.distributed import gathering as distributed
from fastbf.distributed.process_groups import Batch, Facts, name_of
from fastbf.kernels import launch
from fastbf.kernels.failures import BuildError
from fastbf.triton_backend import attention_across_ranks, encoder_layer
from tests.memory import PeakMemory
from tests.triton_backend.test_encoder_layer import SEED, features, weights

WORLD = object()  # stands for the default group, which the parent process does not have


def group_of(process_group):
    return dist.group.WORLD if process_group is WORLD else process_group


def mine(x, sizes):
    """This rank's samples of x, dense in x's order of memory."""
    own = x.detach().split(list(sizes))[dist.get_rank()]
    position_major = x.dim() > 2 and not x.is_contiguous()
    own = own.movedim(0, -2).contiguous().movedim(-2, 0) if position_major else own.clone()
    return own.requires_grad_(x.requires_grad)


def chunks_of(kind):
    """Whether keys and values are gathered or come in parts."""
    return mock.patch.object(collectives, "GATHER_BYTES", 0) if kind == "in parts" else nullcontext()


def on_cpu(x):
    """Where ranks compute, whatever the parent process has."""
    return x.detach().cpu().requires_grad_()


def layer_inputs(samples, positions, channels, width, dtype, position_major=False, fork=""):
    """x, the weights, and the gradient of the result: the same on every rank."""
    torch.manual_seed(1)
    streams = 2 if fork == "input" else 1
    x = on_cpu(features(streams * samples, positions, channels, dtype, position_major))
    tensors = [on_cpu(t) for t in weights(channels, width, dtype)]
    grad = torch.randn((2 if fork else 1) * samples, *positions, channels).to(dtype)
    return x, tensors, grad


def parts(x, sizes, streams):
    """A rank's samples of a batch of one stream or two."""
    if streams == 1:
        return mine(x, sizes)
    halves = [mine(half, sizes).detach() for half in x.chunk(2)]
    return torch.cat(halves).requires_grad_(x.requires_grad)


def layer(sizes, shape, backend, kind, fork, call):
    """The layer's result, and the gradients of x and of every weight, on a rank's part."""
    x, tensors, grad = layer_inputs(sum(sizes), *shape, fork=fork)
    x, grad = parts(x, sizes, 2 if fork == "input" else 1), parts(grad, sizes, 2 if fork else 1)
    forks = {"": {}, "x": {"plain": x}, "input": {"forked": True}}[fork]
    with chunks_of(kind):
        out = functional.encoder_layer(
            x, *tensors, seed=SEED, backend=backend, process_group=dist.group.WORLD, **forks, **call
        )
        wide = torch.stack([grad, grad], dim=-1)
        found, again = (
            torch.autograd.grad(out, [x, *tensors], wide[..., 0], retain_graph=True) for _ in range(2)
        )  # fmt: skip
    assert torch.equal(wide[..., 1], grad)
    assert torch.equal(wide[..., 0], grad)
    assert all(map(torch.equal, found, again))
    return [out.detach(), *found]


def some_gradients(sizes, shape, backend, kind, call):
    """Whether every tensor's gradient is the same where no other one is wanted."""
    x, tensors, grad = layer_inputs(sum(sizes), *shape)
    x, grad = parts(x, sizes, 1), parts(grad, sizes, 1)
    options = call | {"seed": SEED, "backend": backend, "process_group": dist.group.WORLD}

    def found(wanted):
        given = [t.detach().requires_grad_(i in wanted) for i, t in enumerate([x, *tensors])]
        out = functional.encoder_layer(*given, **options)
        return torch.autograd.grad(out, [given[i] for i in wanted], grad)

    with chunks_of(kind):
        every = found(range(13))
        return [torch.allclose(found([i])[0], every[i], rtol=1e-4, atol=1e-6) for i in range(13)]


def models(backend="torch", process_group=None, dim=16, classes=5, layers=1, dropout=0.5, **options):
    torch.manual_seed(2)
    former = fastbf.BatchFormer(
        dim, 2, dropout=dropout, num_layers=layers, backend=backend, process_group=group_of(process_group), **options
    )
    return nn.ModuleDict(
        {
            "backbone": nn.Linear(dim, dim),
            "former": former,
            "classifier": fastbf.SharedClassifier(dim, classes, backend="torch"),
        }
    )


class Loss(nn.Module):
    """A network whose forward is a step's loss."""

    def __init__(self, parts, checkpointed=False, total=None):
        super().__init__()
        self.parts, self.checkpointed, self.total = parts, checkpointed, total

    def forward(self, x, y):
        x, former = self.parts["backbone"](x), self.parts["former"]
        reentrant = self.checkpointed == "reentrant"
        x = checkpoint(former, x, use_reentrant=reentrant) if self.checkpointed else former(x)
        x = x.flatten(1, -2).mean(1) if x.dim() > 2 else x
        if self.total is None:
            return self.parts["classifier"].loss(x, y)
        return self.parts["classifier"].loss(x, y, reduction="sum") * (dist.get_world_size() / (2 * self.total))


def batch(samples, positions=(), dim=16, classes=5):
    torch.manual_seed(3)
    return torch.randn(samples, *positions, dim), torch.arange(samples) % classes


def gradients(net):
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


def step(net, samples, positions=(), steps=1, autocast=None):
    """Gradients of one step, or of several that are added up, on the whole batch in one process."""
    dtype = next(net.parameters()).dtype
    for i in range(steps):
        x, y = batch(samples, positions)
        torch.manual_seed(4 + i)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            (net(x.to(dtype), y) / steps).backward()
    return gradients(net)


def data_parallel(sizes, positions, backend, kind, options):
    """Gradients of a step under DistributedDataParallel, each rank on its own samples."""
    steps, total = options.get("steps", 1), sum(sizes) if len(set(sizes)) > 1 else None
    net = Loss(models(backend, WORLD, layers=options.get("layers", 1)), options.get("checkpointed", False), total)
    if options.get("compiled"):
        inductor = {"options": {"fallback_random": True}}  # its own generator draws other seeds
        net.compile(fullgraph=True, **(inductor if options["compiled"] == "inductor" else {"backend": "aot_eager"}))
    net = DistributedDataParallel(net)
    with chunks_of(kind):
        for i in range(steps):
            x, y = batch(sum(sizes), positions)
            torch.manual_seed(4 + i)
            autocast = torch.autocast("cpu", options.get("autocast"), enabled="autocast" in options)
            with net.no_sync() if i < steps - 1 else nullcontext(), autocast:
                (net(mine(x, sizes), mine(y, sizes)) / steps).backward()
    return {name: g.clone() for name, g in gradients(net).items()}


def sharded(sizes, where, backend, steps):
    """Gradients of steps that are added up under FSDP2, whole again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = Loss(models(backend, WORLD), total=sum(sizes) if len(set(sizes)) > 1 else None)
    mesh = init_device_mesh("cpu", (len(sizes),))
    for part in net.parts["former"].layers:
        if where == "layers":
            fully_shard(part, mesh=mesh)
        elif where == "inside":
            fully_shard(part.linear1, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for i in range(steps):
        x, y = batch(sum(sizes))
        torch.manual_seed(4 + i)
        net.set_requires_gradient_sync(i == steps - 1)
        (net(mine(x, sizes), mine(y, sizes)) / steps).backward()
    return {name: p.grad.full_tensor() for name, p in net.named_parameters()}


def mixed_in_evaluation(sizes, backend):
    former = models(backend, WORLD)["former"].eval()
    x, _ = batch(sum(sizes))
    with torch.no_grad():
        layer = former.layers[0](mine(x, sizes))
        return former.mix(mine(x, sizes)), layer, former.attention_map(mine(x, sizes)), former(mine(x, sizes))


def compiled_lengths(lengths, backend):
    """What one compiled layer gives for batches of several lengths, equal on all ranks, and what it gives eagerly."""
    former = models(backend, WORLD, dropout=0.0)["former"]
    compiled, found = torch.compile(former, fullgraph=True, backend="aot_eager"), []
    for n in lengths:
        x, _ = batch(n * dist.get_world_size())
        x = mine(x, [n] * dist.get_world_size()).requires_grad_()
        outs = [call(x) for call in (compiled, former)]
        found.append([(out.detach(), *torch.autograd.grad(out.sin().sum(), x)) for out in outs])
    return found


def contrastive(sizes, learn_keys):
    """Gradients of a contrastive loss over all ranks' keys, averaged over the ranks."""
    torch.manual_seed(5)
    encoder = nn.Linear(16, 16)
    x, _ = batch(sum(sizes))
    own = mine(x, sizes)
    with nullcontext() if learn_keys else torch.no_grad():
        keys = F.normalize(encoder(own * 2), dim=1)
    keys, first = distributed.gather(keys, dist.group.WORLD)
    queries, target = F.normalize(encoder(own), dim=1), first + torch.arange(len(own))
    loss = functional.linear_cross_entropy(queries, keys, target, scale=5.0, reduction="sum")
    (loss * dist.get_world_size() / sum(sizes)).backward()
    for p in encoder.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    return keys.detach(), [p.grad for p in encoder.parameters()]


def gathered(sizes, dtype):
    """What ``gather`` gives of one-, two- and three-dimensional tensors, where it begins, and its gradients."""
    found = []
    for shape in ((), (3,), (2, 3)):
        torch.manual_seed(6)
        x = mine(torch.randn(sum(sizes), *shape).to(dtype).requires_grad_(), sizes)
        out, first = distributed.gather(x, dist.group.WORLD)
        weight = (torch.arange(out.numel()).view(out.shape) * (dist.get_rank() + 1)).to(dtype)
        incoming = weight.clone()
        grads = [torch.autograd.grad(out, x, incoming, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*grads)
        assert torch.equal(incoming, weight)
        found.append((out.detach(), first, grads[0]))
    return found


def hosts_apart(sizes):
    """What ranks gather whose group carries no CPU tensors, as far as it says; and whether another group was made."""
    dist.new_group([0])  # groups of some ranks only must not matter
    x = mine(torch.arange(float(sum(sizes))), sizes)
    name = name_of(dist.group.WORLD)
    with (
        mock.patch.dict(process_groups._peers, clear=True),
        mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"),
    ):
        found = [distributed.gather(x, dist.group.WORLD)[0] for _ in range(2)]
        return found, process_groups.peers(name).hosts is not dist.group.WORLD


def refused(call):
    """The error that a call of :data:`REFUSED` ends in."""
    try:
        REFUSED[call]()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def _layer(x, **options):
    return fastbf.BatchFormerLayer(16, 2, 16, 0.0, process_group=dist.group.WORLD, backend="torch", **options)(x)


def _on_each(*values):
    return values[min(dist.get_rank(), len(values) - 1)]


def _compiled_for(*samples):
    former = torch.compile(models("torch", WORLD)["former"], fullgraph=True, backend="aot_eager")
    former(torch.randn(_on_each(*samples), 16))


def _gather_compiled_for(*samples):
    group = dist.group.WORLD
    gather = torch.compile(lambda x: distributed.gather(x, group)[0], fullgraph=True, backend="aot_eager")
    gather(torch.randn(_on_each(*samples), 16))


def _no_way_for_hosts():
    group = dist.new_group(list(range(dist.get_world_size())))
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        distributed.gather(torch.randn(2), group)


def _twice(kind):
    x = torch.randn(4, 16, requires_grad=True)
    with chunks_of(kind):
        (grad,) = torch.autograd.grad(_layer(x).square().sum(), x, create_graph=True)
    grad.sum().backward()


def _foreign_name():
    functional.encoder_layer(
        torch.randn(4, 16), *fastbf.BatchFormerLayer(16, 2)._weights(), num_heads=2, process_group="x"
    )


def _not_a_member():
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    fastbf.BatchFormerLayer(16, 2, process_group=groups[dist.get_rank() - 1])


def _gathers_or_runs():
    x = torch.randn(4, 16)
    return distributed.gather(x, dist.group.WORLD) if dist.get_rank() else _layer(x)


def _dtype():
    distributed.gather(torch.randn(4, 16).to(_on_each(torch.float32, torch.float64)), dist.group.WORLD)


def _gradients_on_some():
    with torch.set_grad_enabled(dist.get_rank() > 0):
        _layer(torch.randn(4, 16))


def _dropout():
    layer = fastbf.BatchFormerLayer(16, 2, 16, _on_each(0.5, 0.25), process_group=dist.group.WORLD)
    layer(torch.randn(4, 16))


REFUSED = {
    "sharded inside": lambda: sharded([4] * dist.get_world_size(), "inside", "torch", 1),
    "positions": lambda: _layer(torch.randn(4, _on_each(2, 3), 16)),
    "dropout": _dropout,
    "backward": _gradients_on_some,
    "call": _gathers_or_runs,
    "dtype": _dtype,
    "order of dimensions": lambda: distributed.gather(torch.randn(4, *_on_each((2, 3), (3, 2))), dist.group.WORLD),
    "none, compiled": lambda: _compiled_for(0, 4),
    "none, gathered and compiled": lambda: _gather_compiled_for(0, 4),
    "ragged, compiled": lambda: _compiled_for(3, 4),
    "no way for hosts": _no_way_for_hosts,
    "mask": lambda: fastbf.BatchFormerLayer(16, 2, process_group=dist.group.WORLD)(torch.randn(4, 16), is_causal=True),
    "activation": lambda: _layer(torch.randn(4, 16), activation=torch.tanh),
    "twice, gathered": lambda: _twice("gathered"),
    "twice, in parts": lambda: _twice("in parts"),
    "foreign name": _foreign_name,
    "not a member": _not_a_member,
}


#: As of the operators that do not communicate.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


#: The operators that communicate.
OPERATORS = (
    "confirm",
    "gather",
    "scatter_sum",
    "torch_attention_across_ranks_forward",
    "torch_attention_across_ranks_backward",
    "triton_attention_across_ranks_forward",
    "triton_attention_across_ranks_backward",
)


def checked_operators():
    """PyTorch's checks of the operators that communicate, of batches that have met and that have not."""
    assert attention_across_ranks  # which registers those of the kernels
    name, rank = name_of(dist.group.WORLD), dist.get_rank()
    for met in (True, False):
        facts = Facts("encoder_layer", torch.float32, True, "triton", 4, 32768, (3, 32)).numbers()
        batch = Batch(name, rank, [6, 6], facts, met, False)
        x, out, seed = torch.randn(6, 3, 32), torch.randn(12, 3, 32), torch.tensor([SEED])
        q, kv, kept = torch.randn(6, 3, 4, 8), torch.randn(6, 3, 64), torch.zeros(12, 3, 64)
        o, lse = torch.zeros_like(q), torch.zeros(12, 6)
        dq, d_kv, do = torch.zeros_like(q), torch.zeros_like(kv), torch.randn_like(o)
        arguments = (
            (torch.zeros(()),),
            (x, torch.zeros_like(out)),
            (out, torch.zeros_like(x)),
            (q, kv, o, lse, seed, 0.5, 0.5),
            (do, q, kv, o, lse, dq, d_kv, seed, 0.5, 0.5),
            (q, kv, kept, o, None, seed, 0.5, 32768),
            (do, q, kept, o, None, dq, d_kv, seed, 0.5, 32768),
        )
        for operator, args in zip(OPERATORS, arguments, strict=True):
            call = getattr(torch.ops.fastbf, operator).default
            assert set(opcheck(call, (*args, *batch), test_utils=CHECKS).values()) == {"SUCCESS"}


def copied():
    """Copies and pickles of a module with a group have it, too."""
    former = models("torch", WORLD)["former"]
    others = copy.deepcopy(former), pickle.loads(pickle.dumps(former))
    return [f.process_group is dist.group.WORLD and f.layers[0].process_group is dist.group.WORLD for f in others]


def subgroups(sizes):
    """Two groups of two ranks each: the mixed stream of this rank's samples."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    former = models("torch", group, dropout=0.0)["former"]
    x, _ = batch(sum(sizes))
    return former.mix(mine(x, sizes)).detach()


def peak_memory(shape, kind):
    """Bytes of tensors at the most, forward and backward, with x of this shape on each rank."""
    torch.manual_seed(0)
    x, channels = torch.randn(shape, requires_grad=True), shape[-1]
    tensors = [t.detach() for t in fastbf.BatchFormerLayer(channels, 1, channels)._weights()]
    with chunks_of(kind), PeakMemory() as memory:
        out = functional.encoder_layer(
            x, *tensors, num_heads=1, dropout_p=0.5, backend="torch", process_group=dist.group.WORLD
        )
        out.sum().backward()
    return memory.peak


def meetings(steps):
    """How many messages between hosts ``steps`` steps of two layers with checkpointing take."""
    net = Loss(models("torch", WORLD, layers=2), checkpointed=True)
    with mock.patch.object(process_groups, "_exchange", wraps=process_groups._exchange) as exchange:
        for _ in range(steps):
            x, y = batch(6)
            net(x, y).backward()
    return exchange.call_count


def compiled_on_one():
    """How many calls agree on kernels: two with a compiled rank, two with none."""
    former, (x, _) = models("triton", WORLD, dropout=0.0)["former"], batch(6)
    process_groups.peers(name_of(dist.group.WORLD)).calls.clear()  # of tests before
    compiled, agreements = torch.compile(former, backend="eager"), []
    with mock.patch.object(encoder_layer, "agree", wraps=encoder_layer.agree) as agree:
        for call in [former if dist.get_rank() else compiled] * 2 + [former] * 2:
            call(mine(x, (3, 3)))
            agreements.append(agree.call_count)
    return agreements


def agreed_by_dtype():
    """Which of three calls agree on kernels: other options, and then another dtype, than in the calls before."""
    layers = [models("triton", WORLD, activation=activation)["former"] for activation in ("gelu", "relu")]
    of_group = process_groups.peers(name_of(dist.group.WORLD))
    of_group.calls.clear()  # of tests before
    of_group.own_calls.clear()
    x, agreements = mine(batch(6)[0], (3, 3)), []
    with mock.patch.object(encoder_layer, "agree", wraps=encoder_layer.agree) as agree:
        for layer, amp in ((0, True), (1, False), (1, True)):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                layers[layer](x)
            agreements.append(agree.call_count)
    return agreements


def unbuilt(sizes, kind):
    """Rank 1 cannot build a kernel at first: what each rank raises, what it has sent by then, and what it agrees on."""
    net, (x, y) = Loss(models("triton", WORLD)), batch(sum(sizes))
    x, y = mine(x, sizes), mine(y, sizes)
    process_groups.peers(name_of(dist.group.WORLD)).calls.clear()  # of tests before
    refusal = {"side_effect": BuildError("backward_query: refused")} if dist.get_rank() == 1 else {}
    raised, agreements = [], []
    with chunks_of(kind):
        sending = [mock.patch.object(collectives, name) for name in ("all_gather", "_broadcast")]
        with sending[0] as gathered, sending[1] as sent, mock.patch.object(launch, "build", **refusal):
            for _ in range(2):
                try:
                    net(x, y)
                except RuntimeError as error:
                    raised.append(f"{type(error).__name__}: {error}")
            calls = gathered.call_count + sent.call_count
        with mock.patch.object(encoder_layer, "agree", wraps=encoder_layer.agree) as agree:
            for _ in range(2):
                net(x, y).backward()
                agreements.append(agree.call_count)
    return raised, calls, agreements


def sharded_classifier(hooked, registered):
    """How far loss and gradient of a classifier under FSDP2 are from those without."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    classifier = fastbf.SharedClassifier(8, 5, class_counts=[5, 4, 3, 2, 1])
    x, y = torch.randn(6, 8), torch.arange(6) % 5
    if hooked:
        classifier.register_forward_hook(lambda module, args, out: out / 4)
    expected = classifier.loss(x, y)
    (gradient,) = torch.autograd.grad(expected, classifier.weight)
    fully_shard(classifier, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if registered:
        register_fsdp_forward_method(classifier, "loss")
    for _ in range(2):
        classifier.zero_grad()
        loss = classifier.loss(x, y)
        loss.backward()
    found = classifier.weight.grad.full_tensor()
    return (loss - expected).abs().item(), (found - gradient).abs().max().item(), classifier.parent_reason()


def under_a_default_device(sizes):
    """What a layer across ranks gives under ``torch.set_default_device``, and without."""
    former = fastbf.BatchFormer(16, dropout=0.0, process_group=dist.group.WORLD)
    x = torch.randn(sizes[dist.get_rank()], 16)
    expected = former(x)
    with torch.device("meta"):
        found = former(x)
    return found.detach(), expected.detach()
