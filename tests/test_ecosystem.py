"""Models of fastbf in transformers, safetensors, Lightning and Accelerate: ``pip install ".[ecosystem]"``."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastbf
from tests.test_migration import BLOCKS, build

COUNTS = [50, 20, 10, 5, 0.5]
DATA = TensorDataset(torch.randn(12, 16), torch.arange(12) % 5)


class Net(nn.Module):
    """Returns the loss, as wrappers that see one ``forward`` want it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(16, 32), fastbf.BatchFormer(32))
        self.classifier = fastbf.SharedClassifier(32, 5, class_counts=COUNTS)

    def forward(self, x, y):
        return self.classifier.loss(self.features(x), y)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


def trained(net):
    """An epoch of a plain loop, with the random numbers of a new seed."""
    optimizer = sgd(net)
    torch.manual_seed(1)
    for x, y in DataLoader(DATA, batch_size=5):
        optimizer.zero_grad()
        net(x, y).backward()
        optimizer.step()
    return net.state_dict()


def stripped_logits(net):
    net = fastbf.strip(copy.deepcopy(net).eval(), plain=True)
    return net.classifier(net.features(DATA.tensors[0]))


def test_lightning_trains_as_a_plain_loop_does(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return self.net(*batch)

        def validation_step(self, batch, _):
            self.log("loss", self.net(*batch))

        def configure_optimizers(self):
            return sgd(self)

    module = Module()
    expected = trained(copy.deepcopy(module.net))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(DATA, batch_size=5), DataLoader(DATA, batch_size=5))
    torch.testing.assert_close(module.net.state_dict(), expected)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    torch.testing.assert_close(loaded.net.eval()(*DATA.tensors), module.net.eval()(*DATA.tensors))


def test_accelerate_trains_as_a_plain_loop_does(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("safetensors")
    accelerator = accelerate.Accelerator(cpu=True)
    net = Net()
    expected = trained(copy.deepcopy(net))
    net, optimizer, loader = accelerator.prepare(net, sgd(net), DataLoader(DATA, batch_size=5))
    torch.manual_seed(1)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(net(x, y))
        optimizer.step()
    net = accelerator.unwrap_model(net)
    torch.testing.assert_close(net.state_dict(), expected)
    accelerator.save_model(net, tmp_path)
    loaded = Net()
    accelerate.load_checkpoint_in_model(loaded, str(tmp_path))
    torch.testing.assert_close(stripped_logits(loaded), stripped_logits(net))


def test_safetensors_hold_a_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, other = Net(), Net()
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "net.safetensors"))
    torch.testing.assert_close(other.eval()(*DATA.tensors), net.eval()(*DATA.tensors))


def test_safetensors_of_a_layer_that_insertions_share(tmp_path):
    """What docs/migration.md advises for its detector."""
    safetensors = pytest.importorskip("safetensors.torch")
    net, other = (build(BLOCKS["BatchFormerV2 in a DETR encoder"][1]) for _ in range(2))
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    safetensors.save_model(net, str(tmp_path / "net.safetensors"))
    safetensors.load_model(other, str(tmp_path / "net.safetensors"))
    torch.testing.assert_close(other.state_dict(), net.state_dict())
    assert other.again.layers[0] is other.fork.layers[0]


@pytest.fixture
def hugging_face():
    """A model of a config of its own, as users of transformers write it."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "fastbf-test"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.net = Net()
            self.post_init()

        def forward(self, x, y):
            return {"loss": self.net(x, y)}

    return Model, Config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_keeps_weights_and_class_counts(hugging_face, tmp_path, dtype):
    make, config = hugging_face
    model = make(config()).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = make.from_pretrained(tmp_path, dtype=dtype)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    x, y = DATA.tensors[0].to(dtype), DATA.tensors[1]
    torch.testing.assert_close(loaded.eval()(x, y), model.eval()(x, y))
    for m in (model.train(), loaded.train()):
        torch.manual_seed(3)
        m(x, y)["loss"].backward()
    gradients = [{name: p.grad for name, p in m.named_parameters()} for m in (model, loaded)]
    torch.testing.assert_close(*gradients)
