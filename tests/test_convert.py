"""``gpukern.convert``: what is replaced, what is left and why, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gpukern
from gpukern.convert import REPLACEMENTS, ConversionReport
from tests.resnet import resnet18

pytestmark = pytest.mark.usefixtures("reference_mode")


LAYERS = [
    nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2, bias=False, padding_mode="reflect"),
    nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
    nn.Conv1d(3, 4, 3, stride=2, padding=1, padding_mode="replicate"),
    nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1),
    nn.Conv3d(3, 4, (1, 3, 2), stride=2, padding=1, padding_mode="replicate"),
    nn.ConvTranspose3d(3, 4, 3, stride=2, output_padding=1),
    nn.Linear(8, 2),
    nn.MaxPool2d(2, 1, 1, ceil_mode=True, return_indices=True),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=5),
    nn.AdaptiveAvgPool2d((3, None)),
    nn.MaxPool1d(2, 1, 1, ceil_mode=True, return_indices=True),
    nn.AvgPool1d(3, 2, 1, count_include_pad=False),
    nn.AdaptiveAvgPool1d(3),
    nn.AdaptiveMaxPool1d(2, return_indices=True),
    nn.MaxPool3d(2, 1, 1, ceil_mode=True, return_indices=True),
    nn.AvgPool3d(3, 2, 1, count_include_pad=False, divisor_override=5),
    nn.AdaptiveAvgPool3d((3, None, 2)),
    nn.AdaptiveMaxPool3d(2, return_indices=True),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.3),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.ReLU6(inplace=True),
    nn.Hardsigmoid(),
    nn.Hardswish(inplace=True),
    nn.SiLU(inplace=True),
    nn.GELU("tanh"),
    nn.Dropout(1.0),
    nn.Dropout1d(1.0),
    nn.Dropout2d(1.0, inplace=True),
    nn.Dropout3d(1.0),
    nn.BatchNorm1d(3, momentum=None),
    nn.BatchNorm2d(3, eps=0.1, affine=False),
    nn.BatchNorm3d(3, eps=0.1, affine=False),
    nn.LayerNorm((8, 8), eps=0.1, bias=False),
    nn.RMSNorm(8, elementwise_affine=False),
    nn.GroupNorm(3, 3, eps=0.1, affine=False),
    nn.InstanceNorm1d(3, affine=True),
    nn.InstanceNorm2d(3, momentum=0.3, track_running_stats=True),
    nn.InstanceNorm3d(3),
    nn.SyncBatchNorm(3, momentum=0.2),
    nn.Softmax(-1),
    nn.Softmax2d(),
    nn.LogSoftmax(1),
]
_ACTIVATIONS = [getattr(nn, name) for name, kind in vars(gpukern.nn.activation).items() if hasattr(kind, "_epilogue")]
LAYERS += [kind() for kind in _ACTIVATIONS if kind not in map(type, LAYERS)]


def reasons(model: nn.Module) -> dict[str, str]:
    _, report = gpukern.convert(model, return_report=True)
    return {layer.name: layer.reason for layer in report.left}


def test_there_is_a_case_for_every_layer():
    assert {type(layer) for layer in LAYERS} == set(REPLACEMENTS) - {nn.CrossEntropyLoss}  # it takes a target, below
    # torch.nn has no batch norm with an activation, and no layer norm over channels.
    ours = set(gpukern.nn.__all__) - {"BatchNormAct2d", "LayerNorm2d", "Sequential"}
    assert {kind.__name__ for kind in REPLACEMENTS} == ours


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layer_is_replaced_with_its_attributes(layer):
    converted = gpukern.convert(layer)
    assert type(layer) is getattr(nn, type(layer).__name__)
    assert type(converted) is getattr(gpukern.nn, type(layer).__name__)
    assert repr(converted) == repr(layer)
    dimensions = 1 if "1d" in type(layer).__name__ else 3 if "3d" in type(layer).__name__ else 2
    x = torch.randn((2, 3, *(8,) * dimensions))
    torch.testing.assert_close(converted(x.clone()), layer(x.clone()), rtol=1e-5, atol=1e-5)


def test_a_loss_is_replaced_with_its_options():
    loss = nn.CrossEntropyLoss(torch.rand(3), ignore_index=1, reduction="sum", label_smoothing=0.1)
    converted = gpukern.convert(loss)
    assert type(converted) is gpukern.nn.CrossEntropyLoss and converted.weight is loss.weight
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(converted(x, labels), loss(x, labels))


def like_timms(module: str, name: str, base: type[nn.Module], **body) -> type[nn.Module]:
    return type(name, (base,), {"__module__": f"timm.layers.{module}", "__qualname__": name, **body})


def test_timms_norm_with_an_activation_is_one_pass():
    """By the name of its class. What drops, or is no activation of gpukern's, is called after it."""

    def forward(self, x):
        return self.act(self.drop(nn.GroupNorm.forward(self, x)))

    kind, other = (like_timms("norm_act", name, nn.GroupNorm, forward=forward) for name in ("GroupNormAct", "Other"))
    x = torch.randn(2, 4, 5, 5)
    for act, drop in ((nn.ReLU(inplace=True), nn.Identity()), (nn.Mish(), nn.Identity()), (nn.SiLU(), nn.Dropout(0.5))):
        layer = kind(2, 4)
        layer.act, layer.drop, layer._fast_norm = act, drop, False
        model = nn.Sequential(layer.eval(), other(2, 4))
        converted, report = gpukern.convert(model, return_report=True)
        assert report.replaced[0] == ("0", "GroupNormAct") and isinstance(converted[0], (kind, gpukern.nn.GroupNorm))
        assert [layer.reason for layer in report.left if layer.name == "1"] == [
            "subclass of GroupNorm: it redefines forward"
        ]
        with patch.object(type(converted[0].act), "forward", side_effect=lambda x: x) as forward_of_act:
            converted[0](x)
        assert forward_of_act.called == (not isinstance(act, nn.ReLU))
        torch.testing.assert_close(converted[0](x), layer(x))
        copied = copy.deepcopy(converted)
        assert type(copied[0]) is type(converted[0]) and torch.equal(copied[0](x), converted[0](x))
        assert not gpukern.convert(converted, return_report=True)[1].replaced
    layer._fast_norm = True
    assert "fast norm" in reasons(layer)[""]


def test_timms_convolution_of_normalized_filters():
    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        filters = nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0, eps=self.eps)
        return nn.functional.conv2d(x, filters.reshape_as(self.weight), self.bias, self.stride, self.padding)

    layer = like_timms("std_conv", "StdConv2d", nn.Conv2d, forward=forward, eps=1e-6)(3, 4, 3, stride=2, padding=1)
    converted = gpukern.convert(layer)
    assert isinstance(converted, (type(layer), gpukern.nn.Conv2d)) and type(converted) is not type(layer)
    x = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(converted(x), layer(x), rtol=1e-4, atol=1e-4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_copy_shares_tensors_and_leaves_the_original():
    model = network()
    model[0].weight.requires_grad_(False)
    model[4].eval()
    kinds = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    converted = gpukern.convert(model)

    assert [type(module) for module in model.modules()] == kinds
    assert all(a is not b for a, b in zip(model.modules(), converted.modules(), strict=True))
    for ours, theirs in ((converted.parameters(), model.parameters()), (converted.buffers(), model.buffers())):
        assert all(a is b for a, b in zip(ours, theirs, strict=True))
    assert list(converted.state_dict()) == keys
    assert not converted[0].weight.requires_grad
    assert [m.training for m in converted.modules()] == [m.training for m in model.modules()]
    converted.eval()
    assert model.training


def test_optimizer_of_the_original_trains_the_copy():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted = gpukern.convert(model)
    x = torch.randn(2, 3, 8, 8)
    before = converted(x)
    converted(x).square().sum().backward()
    optimizer.step()
    after = converted(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-5)


def test_inplace_changes_the_model_itself():
    model = network()
    layer = model[0]
    converted, report = gpukern.convert(model, inplace=True, return_report=True)
    assert converted is model and model[0] is layer and type(layer) is gpukern.nn.Conv2d
    assert report.replaced == (("0", "Conv2d"), ("1", "BatchNorm2d"), ("2", "ReLU"), ("4", "Linear"))
    assert not report.left
    _, again = gpukern.convert(model, return_report=True)
    assert not again.replaced and again.already == report.replaced and again.left == report.left


def test_shared_layers_and_tied_parameters_stay_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model.append(model[0])
    model[2].weight = model[0].weight
    converted, report = gpukern.convert(model, return_report=True)
    assert converted[3] is converted[0] and converted[2].weight is converted[0].weight
    assert [layer.name for layer in report.replaced] == ["0", "1", "2"]


def test_containers_and_attributes_that_refer_to_layers():
    model = nn.Module()
    model.blocks = nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(1, 1, 1)])})
    model.shortcut = [model.blocks["a"][0]]  # a plain list, unknown to torch
    converted, report = gpukern.convert(model, return_report=True)
    assert report.replaced == (("blocks.a.0", "Conv2d"),)
    assert converted.shortcut[0] is converted.blocks["a"][0]
    assert model.shortcut[0] is model.blocks["a"][0]


def test_hooks_are_kept_and_see_the_copy():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(module))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[0].weight.register_hook(lambda grad: grad * 0)
    converted = gpukern.convert(model)
    x = torch.randn(2, 3)
    torch.testing.assert_close(converted(x), model(x))
    assert seen == [converted[0], model[0]]
    converted(x).sum().backward()
    assert not model[0].weight.grad.any()


def test_parametrized_layer_keeps_its_parametrization():
    layer = parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    converted, report = gpukern.convert(nn.Sequential(layer), return_report=True)
    assert report.replaced == (("0", "Conv2d"),) and isinstance(converted[0], gpukern.nn.Conv2d)
    assert list(converted[0].state_dict()) == list(layer.state_dict())
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(converted(x), layer(x))
    parametrize.remove_parametrizations(converted[0], "weight")
    assert type(converted[0]) is gpukern.nn.Conv2d
    assert parametrize.is_parametrized(layer) and not isinstance(layer, gpukern.nn.Conv2d)
    torch.testing.assert_close(converted(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_tensor_that_no_deepcopy_takes_is_shared():
    layer = torch.nn.utils.weight_norm(nn.Linear(3, 3))
    layer(torch.randn(1, 3))
    with pytest.raises(RuntimeError):
        copy.deepcopy(layer)
    converted = gpukern.convert(layer)
    with torch.no_grad():
        layer.weight_g.mul_(2)
    x = torch.randn(2, 3)
    torch.testing.assert_close(converted(x), layer(x))


class Block(nn.Sequential):
    """Like torchvision's Conv2dNormActivation."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.channels = channels


class Residual(Block):
    def forward(self, x):
        return super().forward(x)[:, :3] + x[:, :, 1:-1, 1:-1]


class Backwards(Block):
    def __iter__(self):
        return iter([*super().__iter__()][::-1])


def test_sequentials_compute_neighbours_as_one():
    model = nn.Sequential(Block(5), nn.Sequential(nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3)), Residual(3), nn.Flatten())
    model.append(nn.Sequential(nn.Linear(48, 4), nn.Tanh(), nn.Dropout(0.0)))
    kinds = [type(module) for module in model.modules()]
    converted, report = gpukern.convert(model, return_report=True)
    assert report.together == (
        (("0.0", "0.1", "0.2"), ("Conv2d", "BatchNorm2d", "ReLU")),
        (("1.0", "1.1"), ("Conv2d", "BatchNorm2d")),
        (("4.0", "4.1"), ("Linear", "Tanh")),
    )
    assert str(report).splitlines()[1] == (
        "computed as one: 3 groups (1 Conv2d + BatchNorm2d + ReLU, 1 Conv2d + BatchNorm2d, 1 Linear + Tanh)"
    )
    out = io.StringIO()
    Console(file=out, width=120).print(report)
    assert "computed as one: 3 groups" in out.getvalue()

    assert [type(module) for module in model.modules()] == kinds
    # Nothing runs together in the outer one, and a forward of its own is left alone.
    assert type(converted) is nn.Sequential and type(converted[2]) is Residual
    assert type(converted[1]) is type(converted[4]) is gpukern.nn.Sequential
    block = converted[0]
    assert isinstance(block, Block) and isinstance(block, gpukern.nn.Sequential) and block.channels == 5
    assert repr(converted) == repr(model) and list(converted.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)
    called = []
    converted[0][1].register_forward_hook(lambda *_: called.append("norm"))
    assert len(gpukern.convert(converted, return_report=True)[1].together) == 2
    converted(x)
    assert called

    again, report = gpukern.convert(converted, return_report=True)
    assert not report.replaced and type(again[0]) is type(block)


def test_sequential_runs_together_in_its_own_forward(monkeypatch):
    converted = gpukern.convert(nn.Sequential(Block(4), Backwards(4), Residual(4)))
    monkeypatch.setattr(gpukern.nn.BatchNorm2d, "forward", lambda *_: pytest.fail("called by itself"))
    converted[0](torch.randn(2, 3, 8, 8))
    assert type(converted[1]) is Backwards and type(converted[2]) is Residual


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_converted_subclass_of_sequential_can_be_copied(how):
    converted = gpukern.convert(Block(4)).eval()
    seen = []
    if how == "deepcopy":
        converted.register_forward_hook(lambda *_: seen.append(1))
        copied = copy.deepcopy(converted)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(converted))
    else:
        file = io.BytesIO()
        torch.save(converted, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert type(copied) is type(converted) and copied.channels == 4 and not copied.training
    assert copied[0].weight is not converted[0].weight
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(copied(x), converted(x))
    assert len(seen) == (2 if how == "deepcopy" else 0)


def test_sequential_keeps_what_is_its_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    model.note = "mine"
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    patched = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    patched.forward = lambda x: x
    both = nn.ModuleList([model, patched])
    converted = gpukern.convert(both, inplace=True)
    assert converted[0] is model and type(model) is gpukern.nn.Sequential
    assert model.note == "mine" and not model.training
    assert model(torch.randn(2, 3)).min() >= 1
    assert type(patched) is nn.Sequential
    x = torch.randn(2, 3)
    assert converted[1](x) is x


def test_activation_that_a_sequential_has_twice():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu)
    converted, report = gpukern.convert(model, return_report=True)
    assert [group.names for group in report.together] == [("0", "1"), ("2", "3")]
    assert converted[1] is converted[3]
    x = torch.randn(2, 3)
    torch.testing.assert_close(converted(x), model(x))


def test_traced_graph():
    model = torch.fx.symbolic_trace(network())
    converted, report = gpukern.convert(model, return_report=True)
    assert [layer.type for layer in report.replaced] == ["Conv2d", "BatchNorm2d", "ReLU", "Linear"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_module_is_left_and_shares_its_tensors():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))
    model = nn.Sequential(scripted, nn.ReLU())
    converted, report = gpukern.convert(model, return_report=True)
    assert report.replaced == (("1", "ReLU"),)
    assert "TorchScript" in report.left[0].reason
    pointers = [[parameter.data_ptr() for parameter in m.parameters()] for m in (model, converted)]
    assert pointers[0] == pointers[1]
    converted.eval()
    assert scripted.training


class Scaled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Adapted(nn.Linear):
    """A subclass with layers of its own, as adapters have."""

    def __init__(self):
        super().__init__(2, 2)
        self.adapter = nn.Linear(2, 2)


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def test_left_layers_and_their_reasons():
    patched = nn.Linear(2, 2)
    patched.forward = lambda input: input
    subclassed = nn.Linear(2, 2)
    subclassed.weight = type("OtherParameter", (nn.Parameter,), {})(torch.zeros(2, 2))
    clamp = nn.ReLU6()
    clamp.max_val = 5.0
    model = nn.Sequential()
    for name, module in {
        "subclass": Scaled(1, 1, 1),
        "adapted": Adapted(),
        "lazy": nn.LazyLinear(2),
        "own": Doubled(),
        "slope": nn.LeakyReLU(-0.5),
        "clamp": clamp,
        "fp64": nn.Linear(2, 2).double(),
        "complex64": nn.Conv2d(1, 1, 1, dtype=torch.complex64),
        "patched": patched,
        "subclassed": subclassed,
        "attention": nn.MultiheadAttention(4, 2),
        "pooled": nn.LPPool2d(2, 2),
        "quantized": torch.ao.nn.quantized.ReLU6(),
    }.items():
        model.add_module(name, module)
    _, report = gpukern.convert(model, return_report=True)
    assert report.replaced == (
        ("adapted", "Adapted"),
        ("adapted.adapter", "Linear"),
        ("attention", "MultiheadAttention"),
    )
    assert {layer.name: layer.reason for layer in report.left} == {
        "subclass": "subclass of Conv2d: it redefines forward",
        "lazy": "not initialized yet: run the model once, then convert it",
        "own": "not a torch.nn layer: convert does not look inside its forward",
        "slope": "negative_slope = -0.5: gpukern takes none below 0",
        "clamp": "it clamps to [0.0, 5.0]: gpukern's ReLU6 to [0, 6] only",
        "fp64": "its parameters are torch.float64: the kernels take float32, float16 and bfloat16",
        "complex64": "its parameters are torch.complex64: the kernels take float32, float16 and bfloat16",
        "patched": "forward was replaced on this object",
        "subclassed": "its parameters are of the tensor subclass OtherParameter",
        "pooled": "gpukern has no LPPool2d yet",
        "quantized": "quantized or made ready for it: gpukern has no quantized layers",
    }


def test_lazy_layer_converts_once_it_is_initialized():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    assert "0" in reasons(model)
    model(torch.randn(1, 2, 5, 5))
    assert not reasons(model)


def test_structure_is_not_listed_and_torchs_dropout_only_in_training():
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Unflatten(1, (1, 2)), nn.Sequential(), nn.AlphaDropout(0.5))
    assert reasons(model) == {"4": "gpukern has no AlphaDropout yet"}
    assert not reasons(model.eval())


def test_model_that_cannot_be_copied_is_a_clear_error_and_unchanged():
    model = network()
    model.steps = (step for step in range(3))
    with pytest.raises(RuntimeError, match=r"could not copy the model .*generator.*inplace=True"):
        gpukern.convert(model)
    assert type(model[0]) is nn.Conv2d
    assert type(gpukern.convert(model, inplace=True)[0]) is gpukern.nn.Conv2d


@pytest.mark.parametrize("model", [None, torch.randn(2), nn.Linear, [nn.Linear(1, 1)]], ids=lambda m: type(m).__name__)
def test_no_module_is_a_type_error(model):
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got"):
        gpukern.convert(model)


def test_report_as_text_and_in_rich():
    _, report = gpukern.convert(nn.Sequential(nn.Linear(2, 2), nn.Softplus(), gpukern.nn.ReLU()), return_report=True)
    assert str(report).splitlines() == [
        "replaced: 1 layer (1 Linear)",
        "gpukern's already: 1 layer (1 ReLU)",
        "left to torch: 1 layer (1 Softplus)",
        "  1  Softplus  gpukern has no Softplus yet",
        "Calls inside forward (torch.nn.functional.relu, +, torch.cat, ...) are not layers: convert does not see them.",
    ]
    out = io.StringIO()
    Console(file=out, width=120).print(report)
    assert "gpukern has no Softplus yet" in out.getvalue() and "convert does not see them" in out.getvalue()
    assert "(the model)" in str(gpukern.convert(nn.Softplus(), return_report=True)[1])
    with pytest.raises(AttributeError):
        report.replaced = ()


def test_resnet18_is_replaced_and_computes_the_same():
    model = resnet18()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    converted, report = gpukern.convert(model, return_report=True)
    assert isinstance(report, ConversionReport)
    remaining = {type(module) for module in converted.modules()} & set(REPLACEMENTS)
    assert not remaining
    kinds = [layer.type for layer in report.replaced]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {"Conv2d": 20, "ReLU": 9, "MaxPool2d": 1, "AdaptiveAvgPool2d": 1, "Linear": 1, "BatchNorm2d": 20}
    assert not report.left

    assert list(converted.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        # Batch norm in training: the order of its sums is another.
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)
        # The reference calls the same torch kernels: nothing may differ.
        assert torch.equal(
            converted[0](x) if isinstance(converted, nn.Sequential) else converted.conv1(x), model.conv1(x)
        )


@pytest.mark.parametrize("where", ["torchvision.models.convnext", "timm.layers.norm"])
def test_layer_norm_over_channels_of_other_libraries_is_replaced(where):
    def forward(self, x):
        parameters = self.normalized_shape, self.weight, self.bias, self.eps
        return nn.functional.layer_norm(x.permute(0, 2, 3, 1), *parameters).permute(0, 3, 1, 2)

    names = {"forward": forward, "__qualname__": "LayerNorm2d"}
    kind, other = (type("LayerNorm2d", (nn.LayerNorm,), {**names, "__module__": each}) for each in (where, "mine"))
    model, x = nn.Sequential(kind(3, eps=1e-6)), torch.randn(2, 3, 4, 5)
    converted, report = gpukern.convert(model, return_report=True)
    assert (
        isinstance(converted[0], gpukern.nn.LayerNorm2d)
        and isinstance(converted[0], kind)
        and report.replaced == (("0", "LayerNorm2d"),)
    )
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        ours, theirs = converted(image), model(image)
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    assert list(converted.state_dict()) == list(model.state_dict())
    model[0]._fast_norm = True
    assert "fast norm" in reasons(model)["0"]
    assert reasons(other(3))[""].startswith("subclass of LayerNorm")
