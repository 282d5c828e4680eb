"""Every failure fxquant reports: one class each, its message inside the class."""

from __future__ import annotations


class FxQuantError(Exception):
    """Base of all fxquant errors. ``message`` is filled from the keyword arguments.

    The arguments stay readable as attributes, so callers need not parse the text.
    """

    message = "{detail}"

    def __init__(self, **values: object):
        self.values = values
        super().__init__(self.message.format(**values))

    def __getattr__(self, name: str) -> object:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self):
        return _rebuild, (type(self), self.values)


def _rebuild(cls: type[FxQuantError], values: dict[str, object]) -> FxQuantError:
    return cls(**values)


class UnknownScheme(FxQuantError, ValueError):
    message = "unknown scheme {name!r}; the schemes are: {known}"


class UnknownOption(FxQuantError, ValueError):
    message = "unknown option {name!r}; the options are: {known}"


class InvalidOption(FxQuantError, ValueError):
    message = "option {name!r} is {value!r}: expected {expected}"


class InvalidRule(FxQuantError, ValueError):
    message = "rule {index} of the recipe, {rule}: {reason}"


class UnusedRule(FxQuantError, ValueError):
    message = (
        "these rules of the recipe decide no layer: {rules}; "
        "the layers are: {layers}; correct the pattern, or remove the rule"
    )


class NothingQuantized(FxQuantError, ValueError):
    message = "no layer was quantized: {reasons}; see fxquant.explain(model, *args)"


class GroupSizeMismatch(FxQuantError, ValueError):
    message = (
        "{layer}: in_features {in_features} is not a multiple of group_size {group_size} of scheme "
        "{scheme}; use a group_size in {choices}, or a recipe rule that keeps this layer float"
    )


class NonFiniteWeight(FxQuantError, ValueError):
    message = (
        "{layer}: the weight holds {value} at {index}; a non-finite weight would turn its whole "
        "block into NaN; mend the checkpoint, or keep this layer float with a recipe rule"
    )


class GradRequired(FxQuantError, RuntimeError):
    message = (
        "{name} requires grad and grad mode is on, but no gradient flows through a quantized linear; "
        "call the model under torch.no_grad() or torch.inference_mode(), or call "
        "model.requires_grad_(False)"
    )


class NotQuantized(FxQuantError, RuntimeError):
    message = "strict: these layers were not quantized: {layers}"


class RecipeConflict(FxQuantError, RuntimeError):
    message = (
        "{layer}: the recipe gives this layer {wanted}, but the graph it shares with {first} was "
        "compiled for {compiled}; compile the whole model rather than its blocks one by one, or "
        "use one recipe for all blocks"
    )


class RangeConflict(FxQuantError, RuntimeError):
    message = (
        "{layer}: its input would be quantized with the static range of {first}, whose compiled graph "
        "it shares; compile the whole model without a graph break between its blocks, quantize it in "
        "place with its statistics (fxquant.quantize), or use a dynamic scheme"
    )


class StageMismatch(FxQuantError, ValueError):
    message = "pass {pass_name} takes a graph at stage {required}, this one is at stage {found}"


class IllegalGraph(FxQuantError, RuntimeError):
    message = "the graph is not legal at stage {stage}: node {node}: {reason}"


class SignatureChanged(FxQuantError, RuntimeError):
    message = "pass {pass_name} changed {what}: it was {before}, it is {after}"


class CaptureFailed(FxQuantError, RuntimeError):
    message = "the graph could not be brought to ATen form: {reason}; its linears stay float"


class UnsupportedDtype(FxQuantError, TypeError):
    message = "{layer}: weights of {dtype} cannot be quantized; cast them to one of {choices} first"


class InvalidBlockSize(FxQuantError, ValueError):
    message = "block_size {block_size} does not divide a tensor of shape {shape}"


class ShapeMismatch(FxQuantError, ValueError):
    message = "{what} has shape {found}, expected {expected}"


class AlreadyQuantized(FxQuantError, ValueError):
    message = (
        "{layer} is already quantized with {scheme}; quantize the float model, or exclude the "
        "layer with a recipe rule"
    )


class NoKernel(FxQuantError, RuntimeError):
    message = "strict: {layer} fell back to {used}; the other kernels refused: {reasons}"


class BuildFailed(FxQuantError, RuntimeError):
    message = "the native kernels could not be built with {compiler}: {output}"


class NonFiniteActivation(FxQuantError, ValueError):
    message = (
        "{layer}: a batch of activations of shape {shape} holds a NaN or an infinity, or a value "
        "whose sum overflows, in channel {channel}; nothing of it was counted; leave the batch "
        "out, or find the layer before it that overflows (float16 does, above 65504)"
    )


class NoCalibrationData(FxQuantError, ValueError):
    message = (
        "{layer}: {solver} works on the inputs of this layer, and not one token of them was seen; "
        "calibrate with batches that reach it, or solve it with one of {choices}"
    )


class UnsolvableHessian(FxQuantError, RuntimeError):
    message = (
        "{layer}: the Hessian of {tokens} tokens has no Cholesky factor, not even with a relative "
        "damping of {damping}: {reason}; calibrate with more tokens, gather them in float64, or "
        "solve the layer without data"
    )


class UnsupportedSpec(FxQuantError, ValueError):
    message = "{layer}: {solver} cannot solve {spec}: {reason}"


class UncalibratedInput(FxQuantError, ValueError):
    message = (
        "{layer}: {scheme} takes the scale of this layer's inputs from calibration, and there are no "
        "statistics of them; give stats=fxquant.calibrate(model, batches) of batches that reach it, or "
        "use a dynamic scheme"
    )


class EmptyObserver(FxQuantError, ValueError):
    message = "nothing was observed; run batches through the observed model first"


class NonFiniteStatistics(FxQuantError, ValueError):
    message = (
        "{name}: its values hold a NaN or an infinity, in batch {batch}; statistics of them would be "
        "worthless; leave the batch out, or find the layer before it that overflows"
    )


class NothingObserved(FxQuantError, ValueError):
    message = "no batch reached a linear that the recipe quantizes: {reason}"


class ResumeMismatch(FxQuantError, ValueError):
    message = (
        "{path} was solved from other weights, batches or settings (or by another version); go on "
        "with what it was begun with, or give another folder"
    )


class MissingPackage(FxQuantError, ImportError):
    message = "{what} needs {package}, which is not installed: pip install {package}"
