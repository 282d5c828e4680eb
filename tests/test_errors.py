"""Every named error is raised by something a user does, and says which, what, and what to do."""

from __future__ import annotations

import pickle
import re
import sys
import tempfile

import pytest
import torch
from torch import nn

import fxquant
from fxquant import errors, passes
from fxquant.affine import choose_qparams_affine, dequantize_affine
from fxquant.lowering import native
from fxquant.observers import MinMax
from fxquant.solvers import gptq, hqq
from fxquant.solvers.gram import Gram

from .conftest import MLP

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def frozen() -> MLP:
    return MLP().requires_grad_(False)


def run(model: nn.Module, *args: torch.Tensor, **options):
    return torch.compile(model, backend="fxquant", options=options)(*(args or (X,)))


def unknown_scheme():
    run(frozen(), scheme="int9")


def unknown_option():
    run(frozen(), shceme="int8dq")


def invalid_option():
    run(frozen(), strict="yes")


def invalid_rule():
    run(frozen(), recipe=[{"scheme": "int8dq"}, {"name": "re:(", "scheme": None}])


def unused_rule():
    run(frozen(), recipe={"*.head": None, "*": "int8dq"})


def nothing_quantized():
    fxquant.compile(nn.Sequential(nn.LayerNorm(64), nn.ReLU()), "int8dq")


def nothing_quantized_in_place():
    fxquant.quantize(frozen(), {"up": None, "down": None})


def group_size_mismatch():
    fxquant.quantize(nn.Sequential(nn.Linear(96, 32)), "int4wo-64")


def non_finite_weight():
    model = frozen()
    model.down.weight[3, 5] = float("-inf")
    run(model, scheme="int8wo")


def non_finite_weight_in_place():
    model = frozen()
    model.up.weight[0, 1] = float("nan")
    fxquant.quantize(model, "int8wo")


def grad_required():
    run(MLP(), scheme="int8dq")


def not_quantized():
    run(frozen(), scheme="int4wo-256", strict=True)


def recipe_conflict():
    model = nn.Sequential(MLP(out=64), MLP(out=64)).requires_grad_(False)
    for block in model:
        block.compile(backend="fxquant", options={"recipe": {"1.*": None, "*": "int8wo"}})
    model(X)


def range_conflict():
    model = nn.Sequential(MLP(out=64), MLP(out=64)).requires_grad_(False)
    stats = fxquant.calibrate(model, [X], compiled=False, progress=False)
    for block in model:
        block.compile(backend="fxquant", options={"scheme": "int8static", "stats": stats})
    model(X)


def stage_mismatch():
    passes.fuse(fxquant.trace(frozen(), (X,)))


def illegal_graph():
    gm = passes.normalize(fxquant.trace(frozen(), (X,))).graph_module
    (node, _) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    with gm.graph.inserting_after(node):
        clone = gm.graph.call_function(torch.ops.aten.relu.default, (node,))
    node.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
    passes.verify(gm)


def signature_changed():
    @passes.rewrites("captured")
    def first_row_only(gm):
        (output,) = gm.graph.find_nodes(op="output")
        (node,) = output.all_input_nodes
        with gm.graph.inserting_before(output):
            row = gm.graph.call_function(torch.ops.aten.select.int, (node, 0, 0))
        row.meta["val"] = node.meta["val"][0]
        output.replace_input_with(node, row)
        return True

    first_row_only(fxquant.trace(frozen(), (X,)))


def capture_failed():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    fxquant.trace(Branches(), (X,))


def unsupported_dtype():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    codes = torch.ones(32, 64, dtype=torch.int8)
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    fxquant.quantize(model, "int8wo")


def invalid_block_size():
    choose_qparams_affine(X, (1, 48), torch.int8)


def shape_mismatch():
    codes = torch.zeros(5, 64, dtype=torch.int8)
    dequantize_affine(codes, (1, 32), torch.ones(5, 1), None, torch.int8)


def already_quantized():
    fxquant.quantize(fxquant.quantize(frozen(), "int8wo"), "int4wo-32")


def no_kernel():
    run(frozen().double(), X.double(), scheme="int4wo-32", strict=True)


def build_failed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "false")
        patch.setattr(native, "compiler", native.compiler.__wrapped__)
        native.build()


def non_finite_activation():
    Gram(4, layer="up").add(torch.full((2, 4), torch.nan))


def no_calibration_data():
    gptq.solve(torch.zeros(2, 64), fxquant.get_scheme("int4wo-32").weight, layer="up")


def unsolvable_hessian():
    wrong = torch.eye(32)
    wrong[0, 1] = wrong[1, 0] = 5.0
    state = Gram(32).add(torch.ones(3, 32)).state_dict() | {"hessian": wrong}
    spec = fxquant.get_scheme("int4wo-32").weight
    gptq.solve(torch.ones(2, 32), spec, Gram.from_state_dict(state), layer="up")


def unsupported_spec():
    hqq.solve(torch.zeros(2, 64), fxquant.get_scheme("int8wo").weight, layer="up")


def empty_observer():
    MinMax().range()


def non_finite_statistics():
    bad = torch.full((2, 64), torch.inf)
    fxquant.calibrate(frozen(), [X, bad], compiled=False, progress=False)


def solved_from_other_weights():
    data = [torch.randn(4, 64)]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            model, settings = frozen(), {"solver": "gptq", "folder": folder, "progress": False}
            fxquant.quantize(model, "int4wo-32", batches=data, **settings)


def uncalibrated_input():
    fxquant.quantize(frozen(), "int8static")


def nothing_observed():
    fxquant.calibrate(frozen(), [], progress=False)


def missing_package():
    found = fxquant.sensitivity(frozen(), [X], "int8wo", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        found.plot("never_written.svg")


CASES = {
    missing_package: (errors.MissingPackage, r"plot needs matplotlib, .*pip install matplotlib"),
    non_finite_activation: (errors.NonFiniteActivation, r"up: .*NaN.*leave the batch out"),
    no_calibration_data: (errors.NoCalibrationData, r"up: gptq .*calibrate with batches"),
    unsolvable_hessian: (errors.UnsolvableHessian, r"up: the Hessian of 3 tokens.*damping"),
    unsupported_spec: (errors.UnsupportedSpec, r"up: hqq cannot solve"),
    empty_observer: (errors.EmptyObserver, r"nothing was observed; run batches"),
    non_finite_statistics: (
        errors.NonFiniteStatistics,
        r"up:input: .*batch 2.*leave the batch out",
    ),
    nothing_observed: (errors.NothingObserved, r"there was no batch"),
    uncalibrated_input: (errors.UncalibratedInput, r"^up: int8static .*stats=fxquant\.calibrate"),
    solved_from_other_weights: (errors.ResumeMismatch, r"segment_0000.*give another folder"),
    unknown_scheme: (errors.UnknownScheme, r"unknown scheme 'int9'.*: int8wo, int8dq, int4wo-32"),
    unknown_option: (errors.UnknownOption, r"unknown option 'shceme'.*: scheme, recipe, stats"),
    invalid_option: (errors.InvalidOption, r"option 'strict' is 'yes': expected True or False"),
    invalid_rule: (errors.InvalidRule, r"rule 1 of the recipe, .*re:\(.*: name: .*unterminated"),
    unused_rule: (
        errors.UnusedRule,
        r"decide no layer: .*'\*\.head'.*the layers are: .*down.*up.*remove the rule",
    ),
    nothing_quantized: (errors.NothingQuantized, r"owns no two-dimensional weight; see .*explain"),
    nothing_quantized_in_place: (errors.NothingQuantized, r"linears: up, down; see .*explain"),
    group_size_mismatch: (
        errors.GroupSizeMismatch,
        r"^0: in_features 96 is not a multiple of group_size 64 of scheme int4wo-64; use .* \(32\)",
    ),
    non_finite_weight: (errors.NonFiniteWeight, r"^down: .* holds -inf at \(3, 5\);.*mend"),
    non_finite_weight_in_place: (errors.NonFiniteWeight, r"^up: .* holds nan at \(0, 1\);.*mend"),
    grad_required: (errors.GradRequired, r"^up\.(weight|bias) requires grad.*torch\.no_grad\(\)"),
    not_quantized: (errors.NotQuantized, r"^strict: .*up \(in_features 64 is .* 256\), down \("),
    recipe_conflict: (
        errors.RecipeConflict,
        r"^1\.(up|down): .* no scheme, .* with 0\.(up|down) was compiled for int8wo; compile the",
    ),
    range_conflict: (
        errors.RangeConflict,
        r"^1\.(up|down): .* static range of 0\.(up|down), .* in place with its statistics .*dynamic",
    ),
    stage_mismatch: (errors.StageMismatch, r"^pass fuse takes .* reference, .* at stage captured"),
    illegal_graph: (errors.IllegalGraph, r"not legal at stage float: node relu.*: has no value"),
    signature_changed: (
        errors.SignatureChanged,
        r"^pass first_row_only changed outputs: .*\[5, 32\].*it is .*\[32\]",
    ),
    capture_failed: (errors.CaptureFailed, r"brought to ATen form: \w+: .*its linears stay float"),
    unsupported_dtype: (
        errors.UnsupportedDtype,
        r"^0: weights of torch\.int8 cannot be quantized; cast .* bfloat16, float16, float32",
    ),
    invalid_block_size: (errors.InvalidBlockSize, r"\(1, 48\) does not divide .* shape \(5, 64\)"),
    shape_mismatch: (errors.ShapeMismatch, r"^scale has shape \(5, 1\), expected \(5, 2\)"),
    already_quantized: (
        errors.AlreadyQuantized,
        r"^up is already quantized with int8wo; quantize the float model, or exclude",
    ),
    no_kernel: (
        errors.NoKernel,
        r"^strict: up fell back to dequantize; .*native_w4a16: (takes|needs) ",
    ),
    build_failed: (errors.BuildFailed, r"could not be built with false: no message"),
}


@pytest.mark.parametrize("action", CASES, ids=lambda f: f.__name__)
def test_raised_with_its_message(action, graphs):
    kind, pattern = CASES[action]
    with pytest.raises(Exception) as info:
        action()
    error = getattr(info.value, "inner_exception", info.value)
    assert type(error) is kind
    assert re.search(pattern, str(error), re.DOTALL), str(error)
    assert str(error) in str(info.value), "TorchDynamo hides the message"


def test_every_class_has_a_case():
    known = {c for c in vars(errors).values() if isinstance(c, type)} - {errors.FxQuantError}
    assert {kind for kind, _ in CASES.values()} == known


@pytest.mark.parametrize("kind", [k for k, _ in CASES.values()], ids=lambda k: k.__name__)
def test_survives_a_process_boundary_with_its_values(kind):
    fields = re.findall(r"{(\w+)", kind.message)
    error = kind(**{field: f"<{field}>" for field in fields})
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error)
    for field in fields:
        assert f"<{field}>" in str(error)
        assert getattr(copy, field) == f"<{field}>"
    with pytest.raises(AttributeError, match="no_such_value"):
        _ = error.no_such_value


def test_errors_are_the_builtin_kinds_too():
    """So that ``except ValueError`` around bad input works."""
    for kind in (k for k, _ in CASES.values()):
        assert issubclass(kind, errors.FxQuantError)
        assert issubclass(kind, ValueError | RuntimeError | TypeError | ImportError)
    assert issubclass(errors.UnknownScheme, ValueError)
    assert issubclass(errors.GradRequired, RuntimeError)
    assert issubclass(errors.UnsupportedDtype, TypeError)


def test_a_failing_compile_leaves_the_model_as_it_was(graphs):
    model = frozen()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = model(X)
    with pytest.raises(Exception, match="decide no layer"):
        run(model, recipe={"*.head": None, "*": "int8dq"})
    assert torch.equal(model(X), wanted)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_refused_quantize_changes_nothing(graphs):
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32)).requires_grad_(False)
    with pytest.raises(errors.GroupSizeMismatch, match=r"^1: "):
        fxquant.quantize(model, "int4wo-64")
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
