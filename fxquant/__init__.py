"""fxquant: quantization of PyTorch models by rewriting their FX graphs."""

from . import lowering, passes, solvers  # noqa: F401
from .backend import compile
from .calibration import Calibration, Stats, calibrate
from .capture import trace
from .config import Config
from .conversion import quantize
from .errors import FxQuantError
from .layerwise import sensitivity
from .modules import QuantLinear
from .recipe import Recipe, Rule
from .report import Report, explain, summary
from .scheme import SCHEMES, QuantSpec, Scheme, get_scheme
from .sensitivities import Sensitivity
from .tuner import tune
from .weights import invalidate

__version__ = "0.1.0"

__all__ = [
    "SCHEMES",
    "Calibration",
    "Config",
    "FxQuantError",
    "QuantLinear",
    "QuantSpec",
    "Recipe",
    "Report",
    "Rule",
    "Scheme",
    "Sensitivity",
    "Stats",
    "calibrate",
    "compile",
    "explain",
    "get_scheme",
    "invalidate",
    "passes",
    "quantize",
    "sensitivity",
    "solvers",
    "summary",
    "trace",
    "tune",
]
