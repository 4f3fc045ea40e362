"""What the tests of the C++ kernels share."""

from __future__ import annotations

import pytest

from moestro.kernels.cpu.build import unavailable_reason

needs_cpu_kernels = pytest.mark.skipif(unavailable_reason() is not None, reason=unavailable_reason() or "")
