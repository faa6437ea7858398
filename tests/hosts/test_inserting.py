"""`crosslight.insert`: maps at the end of residual branches, and wherever they are asked for."""

import copy

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError
from crosslight.hosts.inserting import MAP


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.downsample = None

    def forward(self, x):
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


def inserted(model: nn.Module) -> list[str]:
    return [name.removesuffix(f".{MAP}") for name, _ in model.named_modules() if name.endswith(MAP)]


def test_the_branch_is_gated_before_the_addition():
    block = nn.Sequential(Branch()).eval()
    x = torch.randn(2, 8, 5, 5)
    branch = block(x) - x
    crosslight.insert(block, "eca")
    assert inserted(block) == ["0.bn2"]
    gate = getattr(block[0].bn2, MAP)
    torch.testing.assert_close(block(x), x + gate(branch))


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_timm_resnets(name, last):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3).eval()
    before = sum(p.numel() for p in model.parameters())
    names = set(model.state_dict())
    assert crosslight.insert(model, "eca") is model
    blocks = [n for n, m in model.named_modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    assert inserted(model) == [f"{n}.{last}" for n in blocks]
    assert names < set(model.state_dict())
    if name == "resnet50":  # the paper's figure, with k by its rule at 256, 512, 1024 and 2048 channels
        assert sum(p.numel() for p in model.parameters()) - before == 3 * 5 + 4 * 5 + 6 * 5 + 3 * 7
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_transformers_resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = crosslight.insert(transformers.ResNetModel(config), "cbam", reduction=4)
    assert inserted(model) == [f"encoder.stages.{i}.layers.0.layer.1" for i in (0, 1)]
    assert model(torch.randn(1, 3, 32, 32)).pooler_output.isfinite().all()


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Sequential(nn.Conv2d(16, 4, 1)))


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("2", ["2"]),
        ("3.*", ["3.0"]),
        (nn.Conv2d, ["0", "2", "3.0"]),
        (lambda name, module: getattr(module, "in_channels", 0) == 8, ["2"]),
    ],
)
def test_where(where, names):
    model = crosslight.insert(convolutions(), "eca", where=where)
    assert inserted(model) == names
    for name in names:
        module = model.get_submodule(name)
        assert getattr(module, MAP).channels == module.out_channels


def test_a_map_of_your_own():
    model = crosslight.insert(convolutions(), lambda channels: nn.GroupNorm(1, channels), where="0")
    assert getattr(model[0], MAP).num_channels == 8


def test_a_deepcopy_attends_with_its_own_map():
    model = crosslight.insert(convolutions(), "eca", where="0").eval()
    twin, x = copy.deepcopy(model), torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(twin(x), model(x))
    with torch.no_grad():
        getattr(twin[0], MAP).conv.weight += 1
    assert not torch.allclose(twin(x), model(x))


def test_the_map_follows_dtype_and_mode():
    model = crosslight.insert(convolutions().double().eval(), "cbam", where="2", reduction=4)
    gate = getattr(model[2], MAP)
    assert not gate.training
    assert all(p.dtype == torch.float64 for p in gate.parameters())


def test_errors_name_what_to_do():
    with pytest.raises(CrosslightError, match=r"where: got None.*no ResNet blocks"):
        crosslight.insert(convolutions(), "eca")
    with pytest.raises(CrosslightError, match=r"where: got no\.such"):
        crosslight.insert(convolutions(), "eca", where="no.such")
    with pytest.raises(CrosslightError, match="num_features"):
        crosslight.insert(convolutions(), "eca", where=nn.ReLU)
    with pytest.raises(CrosslightError, match="attention: got 'softmax' of kind token"):
        crosslight.insert(convolutions(), "softmax", where="0")
    model = crosslight.insert(convolutions(), "eca", where="0")
    with pytest.raises(CrosslightError, match="has a map"):
        crosslight.insert(model, "eca", where="0")
