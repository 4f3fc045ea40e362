"""For all tests: the same examples every time, so that a red run is red again, on a busy machine too.

`MOESTRO_EXPLORE=1 make test` lets Hypothesis look for new ones; what it finds becomes an `@example`.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000)
settings.load_profile("explore" if os.environ.get("MOESTRO_EXPLORE") else "fixed")
