"""fxquant: quantization of PyTorch models by rewriting their FX graphs."""

from . import lowering, passes  # noqa: F401
from .backend import compile
from .capture import trace
from .config import Config
from .conversion import quantize
from .errors import FxQuantError
from .modules import QuantLinear
from .observers import observed
from .recipe import Recipe, Rule
from .report import Report, explain
from .scheme import SCHEMES, QuantSpec, Scheme, get_scheme
from .tuner import tune
from .weights import invalidate

__version__ = "0.1.0"

__all__ = [
    "SCHEMES",
    "Config",
    "FxQuantError",
    "QuantLinear",
    "QuantSpec",
    "Recipe",
    "Report",
    "Rule",
    "Scheme",
    "compile",
    "explain",
    "get_scheme",
    "invalidate",
    "observed",
    "passes",
    "quantize",
    "trace",
    "tune",
]
