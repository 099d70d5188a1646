"""The example of BatchFormerV2 in a ViT: in its quick form, run as a user runs it, and its parts."""

import copy

import pytest
import torch
from torch import nn

import fastbf
from tests.examples.running import imported, run_quick


@pytest.fixture
def example(monkeypatch):
    return imported("vit_v2", monkeypatch)


@pytest.fixture
def images():
    return torch.rand(6, 1, 8, 8)


class StandIn(nn.Module):
    """What the helper needs of timm's VisionTransformer."""

    def __init__(self, depth=3, embed_dim=8):
        super().__init__()
        self.embed_dim = embed_dim
        self.blocks = nn.Sequential(*(nn.Linear(embed_dim, embed_dim) for _ in range(depth)))

    def forward(self, tokens):
        return self.blocks(tokens)[:, 0]


def test_quick_run(tmp_path):
    lines = run_quick("vit_v2", tmp_path)
    assert lines[2].startswith("backend of BatchFormer  torch: ")
    title = next(i for i, line in enumerate(lines) if line.split()[:2] == ["training", "images"])
    row = lines[title + 1].split()
    assert row[0] == "40"
    assert row[-1] == "verdict"
    assert len(lines[title + 1]) <= 100
    for arm in (1, 4):  # without, with
        assert float(row[arm]) > 20  # chance is 10
    assert any("the same 500 test predictions" in line for line in lines)
    assert any(line.startswith("timm") for line in lines)
    assert (tmp_path / "vit_v2_digits.png").stat().st_size > 10_000


def test_the_first_insertion_forks_and_the_second_does_not(example, images):
    torch.manual_seed(5)
    plain = example.ViT()
    model = copy.deepcopy(plain)
    inserted = example.insert_batchformer(model, (1, 2))
    assert [m.forked for m in inserted] == [False, True]
    assert [type(m).__name__ for m in model.blocks] == [
        *["TransformerEncoderLayer"] * 2, "BatchFormer", "TransformerEncoderLayer", "BatchFormer",
        "TransformerEncoderLayer",
    ]  # fmt: skip
    forked = model.features(images)
    assert forked.shape == (12, example.CHANNELS)
    torch.testing.assert_close(forked[:6], plain.features(images))  # the plain stream is left alone
    assert not torch.allclose(forked[6:], forked[:6], atol=0.1)
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_loss_is_the_mean_over_both_streams(example, images):
    model = example.ViT()
    example.insert_batchformer(model, [0], dropout=0.0)
    labels = torch.arange(6)
    expected = nn.functional.cross_entropy(model(images), labels.repeat(2))
    torch.testing.assert_close(model.head.loss(model.features(images), labels), expected)


def test_a_stripped_model_has_no_parameter_of_the_module(example, images):
    model = example.ViT()
    inserted = example.insert_batchformer(model, (1, 2))
    total, theirs = (sum(p.numel() for m in ms for p in m.parameters()) for ms in ([model], inserted))
    line = example.check_strip(model, images)
    assert line == f"stripped: {total:,} → {total - theirs:,} parameters, the same 6 test predictions"
    logits = model.eval()(images)
    stripped = fastbf.strip(model)
    never = example.ViT().eval()
    never.load_state_dict(stripped.state_dict())  # strictly: the same names
    assert torch.equal(never(images), logits)


def test_check_strip_notices_other_predictions(example, images, monkeypatch):
    model = example.ViT()
    calls = iter([torch.zeros(6), torch.ones(6)])
    monkeypatch.setattr(example, "predict", lambda *_: next(calls))
    with pytest.raises(RuntimeError, match="predicts something else"):
        example.check_strip(model, images)


def test_checkpoints_of_a_plain_vit_load(example):
    plain, model = example.ViT(), example.ViT()
    example.insert_batchformer(model, (1,))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert all(name.startswith("blocks.batchformer1.") for name in missing)
    assert not unexpected


def test_any_model_with_blocks(example):
    vit = StandIn().double().eval()
    (former,) = example.insert_batchformer(vit, [2], num_heads=2)
    tokens = torch.randn(4, 5, 8, dtype=torch.float64)
    assert not former.training
    assert len(vit(tokens)) == 4
    assert len(vit.train()(tokens)) == 8


@pytest.mark.parametrize("after", [(), (3,), (-1,)])
def test_wrong_blocks_are_refused(example, after):
    with pytest.raises(ValueError, match="indices of the 3 blocks"):
        example.insert_batchformer(StandIn(), after)


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_data(example, name):
    """Training and test images are apart, and a model's patches cover an image."""
    data = example.DATA[name]
    (train, train_labels), (test, test_labels) = example.load(data, 40, 0, torch.device("cpu"))
    assert (train_labels.bincount() == 40).all()
    assert (test_labels.bincount() == data.test).all()
    assert torch.cdist(train.flatten(1), test.flatten(1)).min() > 0
    model = example.ViT(data.patch, data.patches)
    example.insert_batchformer(model, data.after)
    assert model(train[:3]).shape == (6, example.CLASSES)
    assert data.patches * data.patch**2 == train[0].numel()


def test_timm(example):
    pytest.importorskip("timm", exc_type=ImportError)
    line = example.check_timm(torch.device("cpu"))
    assert "8 rows in training, 4 in evaluation" in line
    assert "the same 4 test predictions" in line
