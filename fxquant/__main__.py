"""``python -m fxquant``."""

from .cli import main

raise SystemExit(main())
