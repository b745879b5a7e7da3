"""Whatever a training program writes: which state is taken, what it is called, and how its names become the model's."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gpukern.fusion.errors import WeightsError, WeightsWarning
from gpukern.fusion.weights.load import fill, load_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def drawn(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A state of ``model`` that no other seed gives."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.rand(held.shape, generator=generator) if held.is_floating_point() else held + seed
        for name, held in model.state_dict().items()
    }
    return state


STATE, OTHER = drawn(Net(), 1), drawn(Net(), 2)


def under(prefix: str, state=STATE):
    return {prefix + name: held for name, held in state.items()}


def averaged():
    model = AveragedModel(Net())
    model.module.load_state_dict(STATE)
    return model.state_dict()


def filled(tmp_path, held, model=None, file="weights.pth") -> tuple[nn.Module, list[str]]:
    """The model with the file's weights, and what was said."""
    model = Net() if model is None else model
    torch.save(held, tmp_path / file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fill(model, tmp_path / file)
    assert all(issubclass(each.category, WeightsWarning) for each in caught)
    return model, [str(each.message).removeprefix(f"{tmp_path / file}: ") for each in caught]


def holds(model: nn.Module, state=STATE) -> bool:
    return all(torch.equal(held, state[name]) for name, held in model.state_dict().items())


# ---- one state, whatever it is called ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "held"),
    [
        ("model_best.pth.tar", {"state_dict": under("module."), "epoch": 3, "arch": "net", "acc": torch.ones(())}),
        ("compiled.pth", under("_orig_mod.")),
        ("compiled_ddp.pth", under("module._orig_mod.")),
        ("ddp_compiled.pth", under("_orig_mod.module.")),
        ("inner.pth", {name.replace("features.", "features.module."): held for name, held in STATE.items()}),
        ("fsdp.pth", under("_fsdp_wrapped_module._checkpoint_wrapped_module.")),
        ("fabric.ckpt", {"model": under("_forward_module.")}),
        ("averaged.pth", averaged()),
        ("averaged.pth", {"model_ema": averaged()}),
        ("last.ckpt", {"state_dict": under("model."), "pytorch-lightning_version": "2.5"}),
        ("last.ckpt", {"state_dict": under("model._orig_mod.module.net.")}),
        ("net.pth", {"net": STATE, "acc": 93.1, "epoch": 1}),
        ("mp_rank_00_model_states.pt", {"module": STATE, "ds_version": "0.16"}),
        ("net_g.pth", {"params": STATE}),
        ("vissl.torch.pth", {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.")}}}}),
        ("epoch_12.pth", {"meta": {"epoch": 12}, "state_dict": under("backbone.")}),
        ("model_final.pyth", {"cfg": "A: 1", "model_state": STATE, "optimizer_state": {"param_groups": []}}),
        ("both.th", [STATE, {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}]),
        ("weights", STATE),
    ],
)  # fmt: skip
def test_layouts_of_training_programs(tmp_path, file, held):
    model, told = filled(tmp_path, held, file=file)
    assert holds(model) and not told


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda net: nn.ModuleDict({"_orig_mod": net})])
def test_a_wrapped_model_takes_bare_names(tmp_path, wrap):
    model, _ = filled(tmp_path, STATE, wrap(Net()))
    inner = next(module for module in model.modules() if isinstance(module, Net))
    assert holds(inner)


def test_a_model_in_a_module_of_its_own_takes_the_inner_names(tmp_path):
    net = Net()
    filled(tmp_path, STATE, nn.ModuleDict({"encoder": net}))
    assert holds(net)


def test_a_module_that_is_called_like_a_wrapper_is_the_models_own(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "net": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    state = drawn(model, 3)
    again, _ = filled(tmp_path, under("module.", state), nn.ModuleDict(
        {"module": nn.Linear(2, 2), "net": nn.ModuleDict({"module": nn.Linear(2, 2)})}
    ))  # fmt: skip
    assert holds(again, state)


def test_wrappers_are_taken_out_without_a_model_too(tmp_path):
    torch.save({"state_dict": averaged(), "epoch": 3}, tmp_path / "weights.pth.tar")
    assert load_weights(tmp_path / "weights.pth.tar").keys() == STATE.keys()
    torch.save({"model": under("_orig_mod.", OTHER), "model_ema": averaged()}, tmp_path / "w.pth")
    assert torch.equal(load_weights(tmp_path / "w.pth")["fc.bias"], STATE["fc.bias"])


# ---- several states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "note"),
    [
        ({"state_dict": OTHER, "state_dict_ema": STATE},
         "'state_dict_ema' (averaged weights) was taken, and not 'state_dict'"),
        ({"model": OTHER, "model_ema": averaged()}, "'model_ema' (averaged weights) was taken, and not 'model'"),
        ({"params": OTHER, "params_ema": STATE}, "'params_ema' (averaged weights) was taken, and not 'params'"),
        ({"ema_state_dict": under("module."), "state_dict": OTHER},
         "'ema_state_dict' (averaged weights) was taken, and not 'state_dict'"),
        ({"student": under("module.backbone.", OTHER), "teacher": under("backbone.")},
         "'teacher.backbone.' (averaged weights) was taken, and not 'student'"),
        ({"state_dict": under("model.", OTHER) | under("ema_model.")},
         "'state_dict.ema_model.' (averaged weights) was taken, and not 'state_dict.model.'"),
        ({"state_dict": STATE, "best_state_dict": OTHER}, "'state_dict' was taken, and not 'best_state_dict'"),
    ],
)  # fmt: skip
def test_averaged_weights_are_taken_and_that_is_said(tmp_path, held, note):
    model, told = filled(tmp_path, held)
    assert holds(model) and told[0] == note


def test_averaged_weights_that_do_not_fit_are_not_taken_and_that_is_said(tmp_path):
    model, told = filled(tmp_path, {"model": STATE, "ema": {"fc.weight": torch.zeros(2, 4)}})
    assert holds(model) and told == ["'model' was taken, and not 'ema'"]


@pytest.mark.parametrize(
    ("held", "label"),
    [
        ({"model": STATE, "ema": {"decay": 0.9, "shadow_params": list(OTHER.values())}}, "ema.shadow_params"),
        ({"state_dict": STATE, "ema_params": tuple(OTHER.values())}, "ema_params"),
        ({"model": STATE, "optimizer_states": [{"state": {}, "param_groups": [], "ema": list(OTHER.values())}]},
         "optimizer_states.0.ema"),
    ],
)  # fmt: skip
def test_averaged_weights_without_names_are_not_taken_and_that_is_said(tmp_path, held, label):
    model, told = filled(tmp_path, held)
    assert holds(model)
    assert told == [f"averaged weights that are a list, without names, were not taken: {label}"]


@pytest.mark.parametrize(
    ("held", "named"),
    [
        ({"G_A": STATE, "G_B": OTHER}, "'G_A', 'G_B'"),
        (under("net_a.") | under("net_b.", OTHER), "'net_a.', 'net_b.'"),
        ({"model_ema": STATE, "teacher": OTHER}, "'model_ema', 'teacher'"),
    ],
)
def test_nothing_is_guessed_where_two_states_fit(tmp_path, held, named):
    with pytest.raises(WeightsError, match=f"weights.pth holds 2 states that fit the model, {named}: write the one"):
        filled(tmp_path, held)


def test_equal_states_are_one(tmp_path):
    model, _ = filled(tmp_path, {"first": STATE, "second": dict(STATE)})
    assert holds(model)


def test_what_is_left_of_other_networks_is_named(tmp_path):
    held = {"state_dict": under("model.") | {"criterion.weight": torch.ones(2), "metric.total": torch.zeros(())}}
    model, told = filled(tmp_path, held)
    assert holds(model) and told == ["left out of 'state_dict.model.': criterion.weight, metric.total"]


def test_a_backbone_and_a_head_under_names_of_their_own(tmp_path):
    trunk = {f"backbone.{name}": held for name, held in STATE.items() if not name.startswith("fc.")}
    head = {"head.fc.weight": STATE["fc.weight"], "head.fc.bias": STATE["fc.bias"]}
    model, told = filled(tmp_path, {"state_dict": trunk | head | {"neck.scale": torch.ones(1)}})
    assert holds(model) and told[0] == "'state_dict.backbone.' was taken, and of other parts: fc.weight, fc.bias"
    assert told[1] == "left out of 'state_dict.backbone.': neck.scale"
    second = {name.replace("head", "auxiliary_head"): held for name, held in head.items()}
    for held in (trunk, trunk | head | second):
        with pytest.raises(WeightsError, match=r"missing: fc\.weight, fc\.bias"):
            filled(tmp_path, held)


# ---- names of old --------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """Its names are those of torchvision's DenseNet."""

    def __init__(self):
        super().__init__()
        layer = {"norm1": nn.BatchNorm2d(3), "conv1": nn.Conv2d(3, 4, 1), "norm2": nn.BatchNorm2d(4)}
        self.features = nn.ModuleDict({"denseblock1": nn.ModuleDict({"denselayer1": nn.ModuleDict(layer)})})


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
def test_the_names_of_published_densenets(tmp_path, prefix):
    state = drawn(Dense(), 4)
    published = {
        name.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1"): held
        for name, held in state.items()
        if "num_batches_tracked" not in name  # they are older than that
    }
    model, _ = filled(tmp_path, under(prefix, published), Dense())
    own = model.state_dict()
    assert all(torch.equal(own[name], held) for name, held in state.items() if "num_batches" not in name)


def test_what_a_model_renames_itself_is_not_called_left_out(tmp_path):
    old, new = Net(), Net()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(old.fc)
    nn.utils.parametrizations.weight_norm(new.fc)
    old.fc.weight_v.data.normal_()
    _, told = filled(tmp_path, old.state_dict(), new)
    assert torch.equal(new.fc.parametrizations.weight.original1, old.fc.weight_v) and not told


def test_gamma_and_beta(tmp_path):
    state = {"features.1.gamma": STATE["features.1.weight"], "features.1.beta": STATE["features.1.bias"]}
    rest = {name: held for name, held in STATE.items() if name not in ("features.1.weight", "features.1.bias")}
    assert holds(filled(tmp_path, state | rest)[0])


class Versioned(nn.Linear):
    """Reads its own older names, and only of files that say their version, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        if metadata.get("version") not in (1, 2):
            raise ValueError("version shall be set to 1 or 2")
        if metadata["version"] == 1:
            state[prefix + "weight"] = state.pop(prefix + "old")
        super()._load_from_state_dict(state, prefix, metadata, *others)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_versions_go_with_the_names(tmp_path, prefix):
    state = drawn(nn.ModuleDict({"fc": Versioned(2, 2)}), 5)
    old = {"fc.old": state["fc.weight"], "fc.bias": state["fc.bias"]}
    held = nn.ModuleDict().state_dict() | under(prefix, old)
    held._metadata = {"": {}, f"{prefix}fc": {"version": 1}}
    assert holds(filled(tmp_path, held, nn.ModuleDict({"fc": Versioned(2, 2)}))[0], state)
    without = filled(tmp_path, under(prefix, state), nn.ModuleDict({"fc": Versioned(2, 2)}))[0]
    assert holds(without, state)


def test_auxiliary_outputs_may_be_missing_or_left_over(tmp_path):
    class WithAuxiliary(Net):
        def __init__(self):
            super().__init__()
            self.aux_classifier = nn.Linear(4, 2)

    full = drawn(WithAuxiliary(), 6)
    model, told = filled(tmp_path, full)
    assert holds(model, full)
    assert told == ["left out: aux_classifier.weight, aux_classifier.bias"]
    assert torch.equal(filled(tmp_path, STATE, WithAuxiliary())[0].fc.weight, STATE["fc.weight"])


def test_a_tied_tensor_may_be_in_the_file_once(tmp_path):
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    weight = torch.rand(5, 3)
    assert torch.equal(filled(tmp_path, {"embed.weight": weight}, tied())[0]["head"].weight, weight)
    with pytest.raises(WeightsError, match=r"missing: head\.weight"):
        filled(
            tmp_path, {"embed.weight": weight}, nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
        )


# ---- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"fc.weight": torch.zeros(2, 4, dtype=torch.int8)},
            "fc.weight is int8, the model's float32: quantized",
        ),
        ({"fc.weight": torch.zeros(2, 4, dtype=torch.complex64)}, "fc.weight is complex64, the model's float32"),
        ({"fc.weight": torch.zeros(2, 4).to_sparse()}, "fc.weight is of layout torch.sparse_coo"),
        ({"fc.weight": torch.zeros(2, 4, device="meta")}, "fc.weight is on the meta device: the file holds no values"),
        ({"fc.weight": torch.zeros(3, 4)}, "fc.weight is 3×4, the model's 2×4"),
        ({"fc.SCB": torch.zeros(2)}, "unknown: fc.SCB"),
    ],
)
def test_values_that_are_not_the_models(tmp_path, change, complaint):
    for held in (STATE | change, {"state_dict": under("module.", STATE | change)}):
        with pytest.raises(WeightsError, match=f"weights.pth does not fit the model.*{complaint}"):
            filled(tmp_path, held)
