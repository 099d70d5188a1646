"""update_average: moving averages by name."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastbf


class Net(nn.Module):
    """BatchFormer stands before layers whose weights have the shapes of its own, so that an order would mix them."""

    def __init__(self, dim=8):
        super().__init__()
        self.stem = nn.Linear(dim, dim)
        self.former = fastbf.BatchFormer(dim)
        self.norm = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, dim)

    def forward(self, x):
        return self.head(self.norm(self.former(self.stem(x))))


def drawn(net):
    with torch.no_grad():
        for t in (*net.parameters(), *net.buffers()):
            if t.is_floating_point():
                t.uniform_()
    return net


def pair(**options):
    """A stripped average and the model, with values of their own."""
    model = Net(**options)
    return drawn(fastbf.strip(copy.deepcopy(model))), drawn(model)


def expected(average, model, decay, *, buffers=True):
    """What the average's state has to be."""
    theirs = model.state_dict()
    kept = dict(average.named_buffers()) if not buffers else {}
    return {
        name: theirs[name].clone()
        if not value.is_floating_point()
        else value.clone()
        if name in kept
        else decay * value + (1 - decay) * theirs[name]
        for name, value in average.state_dict().items()
    }


@pytest.mark.parametrize("decay", [0, 0.25, 0.99, 1])
def test_every_parameter_by_name(decay):
    average, model = pair()
    assert len(list(average.parameters())) < len(list(model.parameters()))
    wanted = expected(average, model, decay, buffers=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fastbf.update_average(average, model, decay)
    torch.testing.assert_close(average.state_dict(), wanted)
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)


def test_as_averaged_model_does_where_nothing_is_missing():
    model = drawn(fastbf.strip(Net()))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = copy.deepcopy(model)
    for _ in range(3):
        drawn(model)
        theirs.update_parameters(model)
        fastbf.update_average(ours, model, 0.9 if theirs.n_averaged > 1 else 0, buffers=True)
    torch.testing.assert_close(ours.state_dict(), theirs.module.state_dict())


def test_buffers_on_request():
    average, model = pair()
    model.norm.num_batches_tracked.fill_(7)
    wanted = expected(average, model, 0.75)
    fastbf.update_average(average, model, 0.75, buffers=True)
    torch.testing.assert_close(average.state_dict(), wanted)
    assert average.norm.num_batches_tracked == 7


@pytest.mark.parametrize("decay", [0, 0.5, 1])
def test_infinite_buffers_stay(decay):
    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    average = copy.deepcopy(model)
    fastbf.update_average(average, model, decay, buffers=True)
    torch.testing.assert_close(average.mask, model.mask)


def test_constants_stay_to_the_bit():
    average = copy.deepcopy(model := drawn(nn.Linear(50, 50)))
    for _ in range(20):
        fastbf.update_average(average, model, 0.999)
    assert torch.equal(average.weight, model.weight)


@pytest.mark.parametrize("side", ["average", "model"])
@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, AveragedModel, lambda m: torch.compile(nn.DataParallel(m))]
)
def test_wrappers_do_not_change_names(wrap, side):
    average, model = pair()
    wanted = expected(average, model, 0.5)
    a, m = (wrap(average), model) if side == "average" else (average, wrap(model))
    average = a.module if isinstance(a, AveragedModel) else average  # which is a copy
    fastbf.update_average(a, m, 0.5, buffers=True)
    torch.testing.assert_close(average.state_dict(), wanted)


def test_wrappers_inside():
    average, model = pair()
    wanted = expected(average, model, 0.5)
    model.stem = torch.compile(model.stem)
    model.head = nn.DataParallel(model.head)
    fastbf.update_average(average, model, 0.5, buffers=True)
    torch.testing.assert_close(average.state_dict(), wanted)


def test_a_module_of_the_users_that_is_named_module():
    model = nn.Sequential()
    model.add_module("module", nn.Linear(2, 2))
    model.add_module("weights", nn.ParameterDict({"weight": nn.Parameter(torch.ones(2, 2))}))
    average = drawn(copy.deepcopy(model))
    wanted = expected(average, model, 0.5)
    fastbf.update_average(average, model, 0.5)
    torch.testing.assert_close(average.state_dict(), wanted)


def test_other_dtypes():
    average, model = pair()
    average.stem.double()
    model.to(torch.bfloat16)
    before = expected(average, model.float(), 0.5)
    fastbf.update_average(average, model.to(torch.bfloat16), 0.5, buffers=True)
    torch.testing.assert_close(average.state_dict(), before)
    assert average.stem.weight.dtype == torch.float64
    assert average.head.weight.dtype == torch.float32


def test_tied_parameters_move_once():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight = model[0].weight
    average = drawn(copy.deepcopy(model))
    wanted = expected(average, model, 0.5)
    fastbf.update_average(average, model, 0.5)
    torch.testing.assert_close(average.state_dict(), wanted)
    model[1].weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"1\.weight is tied to another of average's parameters"):
        fastbf.update_average(average, model, 0.5)


def test_nothing_changes_where_something_does_not_fit():
    average, model = pair()
    before = copy.deepcopy(average.state_dict())
    del model.head
    with pytest.raises(
        ValueError, match=r"model must have all parameters of average, .* got none named head\.weight, head\.bias"
    ):
        fastbf.update_average(average, model, 0.5)
    model.head = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"head\.weight must have the same shape .* got \(8, 8\) and \(3, 8\)"):
        fastbf.update_average(average, model, 0.5)
    model.head, model.norm = nn.Linear(8, 8), nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"must have all buffers of average, .* norm\.running_mean"):
        fastbf.update_average(average, model, 0.5, buffers=True)
    torch.testing.assert_close(average.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, nn.DataParallel])
def test_a_folded_scale_is_refused(wrap):
    model = nn.Sequential(nn.Linear(4, 4), fastbf.SharedClassifier(4, 3, scale=2.0))
    average = fastbf.strip(copy.deepcopy(model), plain=True)
    with pytest.raises(ValueError, match=r"1 must have the same scale in average and model, got 1 and 2\.0"):
        fastbf.update_average(average, wrap(model), 0.5)
    fastbf.update_average(fastbf.strip(copy.deepcopy(model)), wrap(model), 0.5)
    model[1].scale = 1.0
    fastbf.update_average(average, wrap(model), 0.5)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_folded_scale_of_a_wrapped_classifier_is_refused(wrap):
    model = nn.Sequential(nn.Linear(4, 4), fastbf.SharedClassifier(4, 3, scale=2.0))
    average, plain = fastbf.strip(copy.deepcopy(model)), fastbf.strip(copy.deepcopy(model), plain=True)
    model[1] = wrap(model[1])
    fastbf.update_average(average, model, 0.5)
    with pytest.raises(ValueError, match=r"1 must have the same scale in average and model, got 1 and 2\.0"):
        fastbf.update_average(plain, model, 0.5)


def test_a_copy_that_is_not_stripped_needs_the_model_s_batchformer():
    model = Net()
    average = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"got none named former\.layers\.0"):
        fastbf.update_average(average, fastbf.strip(model), 0.5)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((3, nn.Linear(1, 1), 0.5), TypeError, r"average must be a torch\.nn\.Module, got int"),
        ((nn.Linear(1, 1), None, 0.5), TypeError, r"model must be a torch\.nn\.Module, got NoneType"),
        ((nn.Linear(1, 1), nn.Linear(1, 1), 1.5), ValueError, r"decay must lie in \[0, 1\], got 1.5"),
        ((nn.Linear(1, 1), nn.Linear(1, 1), "x"), TypeError, "decay must be a number, got str"),
    ],
)
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        fastbf.update_average(*args)
