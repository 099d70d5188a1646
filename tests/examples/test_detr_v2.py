"""The detector's wiring, its metric on cases worked out by hand, and the example as a user runs it."""

import copy

import numpy as np
import pytest
import torch

import fastbf
from tests.examples.running import imported, run_quick

N = 4


@pytest.fixture(scope="module")
def detr():
    """The example as a module: it lies beside what it imports."""
    with pytest.MonkeyPatch.context() as patch:
        yield imported("detr_v2", patch)


@pytest.fixture
def scenes(detr):
    return detr.load(0, N, torch.device("cpu"))[1]


@pytest.fixture
def model(detr):
    """Without the module's dropout, so that what it does can be compared."""
    net = detr.Detector()
    for m in net.streams.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        elif isinstance(m, torch.nn.MultiheadAttention):
            m.dropout = 0.0
    return net


def inputs_of(layers):
    """What each layer is given, filled at its calls."""
    calls = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls


def test_scenes_are_what_they_say(detr):
    images, padding, targets = detr.load(0, 30, torch.device("cpu"))[1]
    assert images.shape == (30, 1, 28, 28)
    assert padding.shape == (30, 7, 7)
    assert len({int(p.sum()) for p in padding}) == len(detr.SIDES)
    for image, mask, target in zip(images[:, 0], padding, targets, strict=True):
        assert 1 <= len(target["labels"]) == len(target["boxes"]) <= 3
        side = (~mask[0]).sum() * detr.STRIDE
        rest = image.clone()
        for x, y, w, h in target["boxes"] * side:
            left, top, right, bottom = (round(v.item()) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
            assert 0 <= left < right <= side
            assert 0 <= top < bottom <= side
            assert rest[top:bottom, left:right].max() > 0.2
            rest[top:bottom, left:right] = 0
        assert rest.max() <= 0.2  # the boxes hold all the ink


def test_training_doubles_everything_once(detr, scenes, model):
    encoder, decoder, forks = inputs_of(model.encoder), inputs_of(model.decoder), []
    for stream in model.streams:
        stream.register_forward_hook(lambda _, args, out: forks.append(out[0]))
    outputs, targets = model(*scenes)
    for logits, boxes in outputs:
        assert logits.shape == (2 * N, len(model.anchors), detr.CLASSES + 1)
        assert boxes.shape == (2 * N, len(model.anchors), 4)
    assert len(targets) == 2 * N
    assert all(a is b for a, b in zip(targets, scenes.targets * 2, strict=True))
    assert [args[0].shape[1] for args, _ in encoder] == [N, 2 * N]
    for _, options in encoder[1:]:
        assert torch.equal(options["src_key_padding_mask"], scenes.padding.flatten(1).repeat(2, 1))
    positions = detr.encode(detr.shares(scenes.padding)).transpose(0, 1).repeat(1, 2, 1)
    for given, fork in ((encoder[1][0][0], forks[0]), (decoder[0][0][1], forks[1])):
        torch.testing.assert_close(given - fork, positions)
    for (queries, memory), options in decoder:
        assert queries.shape == (len(model.anchors), 2 * N, detr.CHANNELS)
        assert memory.shape == (49, 2 * N, detr.CHANNELS)
        assert torch.equal(options["memory_key_padding_mask"], scenes.padding.flatten(1).repeat(2, 1))


def test_the_plain_half_comes_first_and_is_what_evaluation_gives(scenes, model):
    for m in model.stem.modules():
        m.eval()  # its norms' statistics are those of evaluation
    outputs, _ = model(*scenes)
    stripped, same = fastbf.strip(copy.deepcopy(model))(*scenes)
    assert same is scenes.targets
    for forked, plain in zip(outputs, stripped, strict=True):
        for a, b in zip(forked, plain, strict=True):
            torch.testing.assert_close(a[:N], b)
            assert not torch.allclose(a[N:], b)


def test_evaluation_is_the_stripped_model(detr, scenes, model):
    model.eval()
    outputs, targets = model(*scenes)
    assert targets is scenes.targets
    assert outputs[-1][0].shape[0] == N
    stripped = fastbf.strip(copy.deepcopy(model))
    assert not any("streams" in name for name, _ in stripped.named_parameters())
    for found, expected in zip(detr.detect(stripped, scenes), detr.detect(model, scenes), strict=True):
        assert found.keys() == {"scores", "labels", "boxes"}
        assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_padding_changes_nothing(detr, model):
    """An image detects the same however far it is padded: masks and positions reach every layer."""
    model.eval()
    padding = torch.ones(1, 7, 7, dtype=torch.bool)
    padding[:, :5, :5] = False
    image = torch.zeros(1, 1, 28, 28)
    image[..., 4:14, 4:14] = torch.rand(10, 10)
    features = torch.randn(1, detr.CHANNELS, 7, 7)
    model.stem = torch.nn.Identity()  # the stem's border is not the point
    (*_, padded), *_ = model(features, padding)
    (*_, cropped), *_ = model(features[..., :5, :5], padding[:, :5, :5])
    for a, b in zip(padded, cropped, strict=True):
        torch.testing.assert_close(a, b)


def test_loss_is_the_mean_of_both_streams(detr, scenes, model):
    model.eval()
    outputs, targets = model(*scenes)
    twice = [tuple(x.repeat(2, 1, 1) for x in output) for output in outputs]
    torch.testing.assert_close(detr.matching_loss(twice, targets * 2), detr.matching_loss(outputs, targets))
    with pytest.raises(ValueError, match="8 samples need as many targets, got 4"):
        detr.matching_loss(twice, targets)


def test_loss_matches_each_query_with_its_own_box(detr):
    target = {"labels": torch.tensor([3, 7]), "boxes": torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])}
    logits = torch.full((1, 3, detr.CLASSES + 1), -20.0)
    logits[0, [0, 1, 2], [7, detr.CLASSES, 3]] = 20.0
    boxes = torch.tensor([[[0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9], [0.2, 0.2, 0.2, 0.2]]])
    assert detr.matching_loss([(logits, boxes)], [target]) < 1e-5
    boxes = boxes + torch.tensor([0.01, 0, 0, 0])
    shift = 2 * (1 - detr.overlap(boxes[:, 0], boxes.new_tensor([0.7, 0.7, 0.2, 0.2]))[1].item())
    assert detr.matching_loss([(logits, boxes)], [target]).item() == pytest.approx(5 * 0.01 + shift, abs=1e-4)


def test_overlap(detr):
    a, b = torch.tensor([1.0, 1, 2, 2]), torch.tensor([2.0, 1, 2, 2])
    iou, generalised = detr.overlap(a, b)
    assert iou.item() == pytest.approx(2 / 6)  # 2 of 4 + 4 - 2
    assert generalised.item() == pytest.approx(2 / 6)  # the hull holds nothing else
    iou, generalised = detr.overlap(a, torch.tensor([4.0, 1, 2, 2]))
    assert (iou.item(), generalised.item()) == (0, pytest.approx(-2 / 10))


def test_average_precision_by_hand(detr):
    box, far = [0.3, 0.3, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]
    targets = [
        {"labels": torch.tensor([1, 1]), "boxes": torch.tensor([box, far])},
        {"labels": torch.tensor([1, 2]), "boxes": torch.tensor([box, far])},
    ]

    def found(scores, labels, boxes):
        return {"scores": np.array(scores), "labels": np.array(labels), "boxes": np.array(boxes, np.float32)}

    # Class 1, by score: right, wrong (the box is taken), right; one of three is missed. Class 2: nothing found.
    detections = [found([0.9, 0.8], [1, 1], [box, box]), found([0.7], [1], [box])]
    expected = 100 * ((1 + 2 / 3) / 3 + 0) / 2
    assert detr.average_precision(detections, targets, 0.5) == pytest.approx(expected)
    # A class that nothing shows counts nothing, a wrong class finds nothing, a perfect answer is 100.
    assert detr.average_precision([found([0.9], [5], [box]), found([], [], [])], targets, 0.5) == 0
    perfect = [found([0.1, 0.2], t["labels"].numpy(), t["boxes"].numpy()) for t in targets]
    assert detr.average_precision(perfect, targets, 0.75) == pytest.approx(100)
    # Shifted by a fifth of its width: IoU 0.8 / 1.2, enough for a half and not for three quarters.
    shifted = [dict(f, boxes=f["boxes"] + np.array([0.04, 0, 0, 0], np.float32)) for f in perfect]
    assert detr.average_precision(shifted, targets, 0.5) == pytest.approx(100)
    assert detr.average_precision(shifted, targets, 0.75) == 0


def test_as_a_user_runs_it(tmp_path):
    lines = run_quick("detr_v2", tmp_path)
    rows = [line for line in lines if line.strip().startswith("IoU ≥ ")]
    assert len(rows) == 2
    assert all(row.endswith("too few seeds for a verdict") for row in rows)
    assert any("the same detections in all 300 test scenes" in line for line in lines)
    assert all(len(row) <= 100 for row in rows)
    assert (tmp_path / "detr_v2.png").stat().st_size > 10_000
