"""Kernels, one family per file. Every module of this package is imported, so a file is enough."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
