"""What fusing must keep: the model that was given, and the caller's wishes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpukern
from gpukern.fusion import FusionError, pipeline
from gpukern.fusion.verify import cast, distance, leaves
from tests.fusion.networks import NORM, conv, net, norm, one, residual

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


def patterns(fused) -> list[str]:
    return [group.pattern for group in fused.report.fused]


def error(fused, model, *inputs) -> float:
    with torch.no_grad():
        expected = copy.deepcopy(model).double().eval()(*cast(inputs, torch.float64))
    return distance(leaves(fused(*inputs)), leaves(expected))


# ---- the model that was given ----------------------------------------------------------------------------------------


class Snapshot:
    """All that fusing must not change of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
        self.others = self.describe(model)

    @staticmethod
    def describe(model: nn.Module) -> list:
        return [
            (name, type(module), module.training, list(module._forward_hooks), list(vars(module)))
            for name, module in model.named_modules()
        ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]

    def assert_same(self, model: nn.Module) -> None:
        assert self.describe(model) == self.others
        state = model.state_dict(keep_vars=True)
        assert list(state) == list(self.tensors)
        for name, (tensor, values) in self.tensors.items():
            assert state[name] is tensor and torch.equal(tensor, values), name


def touchy() -> tuple[nn.Module, tuple]:
    """A model in training mode, partly frozen, with a hook and weights that an old weight_norm computes."""
    model, example = net(residual, a=torch.nn.utils.weight_norm(conv()), b=norm())
    model.b.register_forward_hook(lambda module, inputs, output: output * 2)
    model.a.weight_v.requires_grad_(False)
    return model.train(), example


@pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:gpukern.fuse.*training mode")
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_model_is_not_touched(dtype):
    model, example = touchy()
    model(*example)
    given = example[0].clone()
    before = Snapshot(model)
    fused = gpukern.fuse(model, example, dtype=dtype)
    fused(*example)
    before.assert_same(model)
    assert torch.equal(example[0], given)
    # Nor does training it change what was fused.
    again = fused(*example)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 1
    assert torch.equal(fused(*example), again)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:gpukern.fuse.*training mode")
@pytest.mark.parametrize("step", ["capture_program", "evaluate_constants", "lower", "Witness", "account"])
def test_the_model_is_not_touched_when_fusing_fails(step, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no")

    model, example = touchy()
    before = Snapshot(model)
    monkeypatch.setattr(pipeline, step, fail)
    with pytest.raises(RuntimeError, match="no"):
        gpukern.fuse(model, example)
    before.assert_same(model)


def test_a_model_in_training_mode_is_fused_as_in_evaluation_with_a_warning():
    model, example = one()
    model.train()
    with pytest.warns(UserWarning, match="training mode"):
        fused = gpukern.fuse(model, example)
    assert any("training mode" in note for note in fused.report.notes)
    assert patterns(fused) == [NORM]
    assert error(fused, model, *example) < 1e-6


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_an_example_of_one_image_leaves_the_batch_free():
    model, (x,) = one()
    fused = gpukern.fuse(model, x[:1])
    assert error(fused, model, x[:1]) < 1e-6
    assert error(fused, model, torch.randn(5, *x.shape[1:])) < 1e-6


def test_a_model_that_fixes_its_batch_is_fused_for_that_batch_alone():
    model, (x,) = net(lambda m, x: m.b(m.a(x)).view(2, -1), a=conv(), b=norm())
    fused = gpukern.fuse(model, x)
    assert any("batch size is fixed" in note for note in fused.report.notes)
    assert error(fused, model, x) < 1e-6
    with pytest.raises(ValueError, match=r"expected input 0 of shape \[2, 4, 7, 7\], got \[4, 4, 7, 7\]"):
        fused(torch.randn(4, 4, 7, 7))


def test_other_image_sizes_and_arguments_are_refused():
    model, (x,) = one()
    fused = gpukern.fuse(model, x)
    with pytest.raises(ValueError, match=r"expected input 0 of shape \[batch, 4, 7, 7\], got \[2, 4, 9, 9\]"):
        fused(torch.randn(2, 4, 9, 9))
    with pytest.raises(TypeError, match="arguments as in the example"):
        fused(x, x)


def test_an_example_of_one_value_is_replaced_for_the_verification():
    model, (x,) = one()
    fused = gpukern.fuse(model, torch.zeros_like(x))
    assert any("one value throughout" in note for note in fused.report.notes)
    assert fused.report.verification.error > 0


def test_images_are_channels_last_from_the_first_layer_on():
    model, (x,) = one()
    for channels_last in (True, False):
        fused = gpukern.fuse(model, x, channels_last=channels_last)
        y = fused(x)
        assert y.is_contiguous(memory_format=torch.channels_last) is channels_last
        weight = next(t for name, t in fused.module.named_buffers() if name.endswith("weight"))
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, (x,) = net(residual, a=conv(bias=True), b=norm())
    fused = gpukern.fuse(model, x, dtype=dtype)
    assert patterns(fused) == ([f"{NORM} + add + relu"] if dtype is not torch.float64 else [NORM])
    assert fused(x).dtype is dtype
    # One rounding of the input, the weights and the output each.
    assert error(fused, model, x) < 3 * torch.finfo(dtype).eps
    tensors = dict(fused.module.named_buffers())
    for name, tensor in tensors.items():
        expected = torch.promote_types(dtype, torch.float32) if name.endswith("bias") else dtype
        assert tensor.dtype is expected, name


def test_weights_are_rounded_once():
    model, (x,) = one()
    fused = gpukern.fuse(model, x, dtype=torch.float16)
    scale = model.b.weight.double() / (model.b.running_var.double() + model.b.eps).sqrt()
    exact = (model.a.weight.double() * scale[:, None, None, None]).half()
    assert torch.equal(next(t for name, t in fused.module.named_buffers() if name.endswith("weight")), exact)


def test_a_variance_that_half_cannot_hold():
    """It is infinite in fp16, so that a fold of the halved model, and that model itself, give zero."""
    model, (x,) = one()
    model.b.running_var.fill_(1e6)
    model.b.weight.data.fill_(1e3)
    fused = gpukern.fuse(model, x, dtype=torch.float16)
    assert patterns(fused) == [NORM]
    assert error(fused, model, x) < 3 * torch.finfo(torch.float16).eps
    assert fused(x).std() > 0.1


@pytest.mark.parametrize(
    "scale, before, reason",
    [(1e6, 1e-3, "overflow float16"), (1e-6, 1e3, "subnormal in float16")],
    ids=["large", "small"],
)
def test_a_layer_that_half_cannot_hold_stays_in_fp32(scale, before, reason):
    model, (x,) = net(lambda m, x: m.d(m.c(m.b(m.a(x * before)))), a=conv(), b=norm(), c=conv(), d=norm())
    model.b.weight.data.mul_(scale)
    model.b.running_mean.zero_()
    fused = gpukern.fuse(model, x, dtype=torch.float16)
    first, second = fused.report.fused
    assert (first.dtype, second.dtype) == ("float32", "float16")
    assert reason in first.note and not second.note
    assert fused(x).dtype is torch.float16
    assert error(fused, model, x) < 4 * torch.finfo(torch.float16).eps


# ---- wishes ----------------------------------------------------------------------------------------------------------


def stages() -> tuple[nn.Module, tuple]:
    stem, head = (nn.Sequential(conv(), norm(), nn.ReLU()) for _ in range(2))
    return net(lambda m, x: m.head(m.stem(x)), stem=stem, head=head)


def test_modules_of_a_group():
    fused = gpukern.fuse(
        *net(lambda m, x: F.relu(m.s(x) + x), s=nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm()))
    )
    first, second = fused.report.fused
    assert first.modules == ("s.0", "s.1", "s.2")
    assert second.modules == ("s.3", "s.4")


@pytest.mark.parametrize("pattern", ["head", "head.*", "h*"])
def test_skipped_modules_stay(pattern):
    model, x = stages()
    fused = gpukern.fuse(model, x, skip=[pattern], strict=True)
    (group,) = fused.report.fused
    assert group.modules == ("stem.0", "stem.1", "stem.2")
    assert {reason for _, reason in fused.report.not_fused} == {f"skipped, by {pattern!r}"}
    assert len(fused.report.not_fused) == 3


def test_strict_refuses_what_stays():
    model, x = net(lambda m, x: m.b(y := m.a(x)) * y, a=conv(), b=norm())
    with pytest.raises(FusionError, match=r"b \(batch_norm.*other users: mul"):
        gpukern.fuse(model, x, strict=True)
    gpukern.fuse(*one(), strict=True)


def test_no_verification():
    fused = gpukern.fuse(*one(), verify=False)
    assert fused.report.verification is None and fused.report.max_error is None
    assert fused.report.fused[0].error is None


def test_gpukerns_own_layers_are_fused_too():
    model, x = one()
    assert patterns(gpukern.fuse(gpukern.convert(model), x)) == [NORM]


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "gelu_tanh", "hardswish"])
def test_gpukerns_functions_are_fused_too(name):
    def function(m, x):
        y = gpukern.functional.conv2d(x, m.a.weight, padding=1)
        y = m.b(y, x)
        return gpukern.functional.linear(y.flatten(1), m.c.weight, m.c.bias, activation="tanh")

    act = gpukern.nn.BatchNormAct2d(4, activation=name, negative_slope=0.3)
    model, (x,) = net(function, a=conv(), b=act, c=nn.Linear(196, 3))
    fused = gpukern.fuse(model, x)
    assert patterns(fused) == [f"{NORM} + add + {name}", "linear + tanh"]
    assert error(fused, model, x) < 1e-6


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_control_flow_by_values():
    model, x = net(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x), a=conv(), b=norm())
    with pytest.raises(FusionError, match=r"torch.export cannot capture the model: .*data-dependent"):
        gpukern.fuse(model, x)


def test_state_that_a_model_keeps():
    def counting(m, x):
        m.calls += 1
        return m.a(x) * m.calls

    model, x = net(counting, a=conv())
    model.register_buffer("calls", torch.zeros(()))
    with pytest.raises(FusionError, match="changes its buffer 'calls'"):
        gpukern.fuse(model, x)


def test_arguments_that_make_no_sense():
    model, x = one()
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got function"):
        gpukern.fuse(F.relu, x)
    with pytest.raises(TypeError, match="needs an example"):
        gpukern.fuse(model, ())
    with pytest.raises(ValueError, match=r"got torch.int16"):
        gpukern.fuse(model, x, dtype=torch.int16)
    with pytest.raises(ValueError, match="needs calibrate="):
        gpukern.fuse(model, x, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="CUDA"):
        gpukern.fuse(model, [t.cpu() for t in x], cuda_graph=True)


def test_a_wrong_fold_is_found_and_named(monkeypatch):
    from gpukern.fusion import affine

    right = affine._batch_norm

    def wrong(program, node):
        found = right(program, node)
        if found and node.name.endswith("_1"):
            found.shift.add_(0.1)
        return found

    model, x = stages()
    monkeypatch.setattr(affine, "_batch_norm", wrong)
    with pytest.raises(FusionError, match=r"To blame is conv2d \+ batch_norm \+ relu \(conv2d_1, .*gpukern::conv2d"):
        gpukern.fuse(model, x)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_totals():
    model, (x,) = net(residual, a=conv(), b=norm())
    report = gpukern.fuse(model, x).report
    image = 4 * x.numel()
    # Each reads an image and writes one; the addition reads two, and the fused operator adds what it reads anyway.
    assert (report.before.operators, report.before.activation_bytes) == (4, 9 * image)
    assert (report.after.operators, report.after.activation_bytes) == (1, 2 * image)
    assert (report.before.parameters, report.after.parameters) == (4 * 36 + 8, 4 * 36 + 4)
    assert [node.label for node in report.graph_after] == ["input", f"{NORM} + add + relu", "output"]
    assert [node.group for node in report.graph_before] == [None, 0, 0, 0, 0, None]


def test_sizes_that_depend_on_values():
    def selects(m, x):
        y = m.b(m.a(x)).relu()
        return y[y > 0] * 2, torch.sigmoid((y > 1).int())

    model, (x,) = net(selects, a=conv(), b=norm())
    fused = gpukern.fuse(model, x)
    assert error(fused, model, x) < 1e-6
    report = fused.report
    assert patterns(fused) == [f"{NORM} + relu"]
    assert report.before.operators == report.after.operators + 2
    assert report.before.activation_bytes == report.after.activation_bytes + 4 * 4 * x.numel()


# ---- what a call costs -----------------------------------------------------------------------------------------------


def test_calls_spare_the_operator_boundary_and_can_be_copied_and_pickled(monkeypatch):
    model, (x,) = net(lambda m, x: F.max_pool2d(m.a(F.max_pool2d(F.relu(m.b(m.a(x))), 2)) + 1, 2), a=conv(), b=norm())
    fused = gpukern.fuse(model, x)
    expected = fused(x)
    copies = [copy.deepcopy(fused.module), pickle.loads(pickle.dumps(fused.module))]

    def boundary(*arguments):
        raise AssertionError("the registered operator was called")

    for name in ("conv2d", "conv2d_max_pool2d", "max_pool2d"):
        monkeypatch.setattr(getattr(torch.ops.gpukern, name).default, "_op", boundary)
    with torch.no_grad():
        for module in (fused.module, *copies):
            assert torch.equal(module(x), expected)


def test_a_pattern_that_skips_nothing_is_named():
    model, inputs = one()
    notes = gpukern.fuse(model, inputs, skip=["a", "head.*", "c?"]).report.notes
    assert "Nothing is skipped by 'head.*', 'c?': the path of no module that computes" in notes
    assert not any("skipped" in note for note in gpukern.fuse(model, inputs, skip=("b",)).report.notes)
    with pytest.raises(TypeError, match="skip takes a list of patterns, got the word 'a'"):
        gpukern.fuse(model, inputs, skip="a")
