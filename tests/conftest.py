"""For all tests: none of hypothesis' asks a stopwatch, which on a busy machine tells how busy it is."""

import contextlib

with contextlib.suppress(ImportError):  # tests/integrations have an environment of their own, without it
    from hypothesis import settings

    settings.register_profile("querit", deadline=None)
    settings.load_profile("querit")
