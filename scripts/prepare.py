"""The last part of set-up: the image that the demo, the benches and the tests run, in their home.

Idempotent. Kit and ice are made by the first machine that needs them, as for any user.
"""

from __future__ import annotations

import sys
import time

from trivisor import VMM
from trivisor.core.errors import NotFound, TrivisorError

IMAGE = "debian"


def main() -> int:
    """Make the image if it is not there."""
    vmm = VMM()
    try:
        vmm.images.get(IMAGE)
        return 0
    except NotFound:
        pass
    began = time.monotonic()
    print(f"== making the image {IMAGE!r} out of Debian's packages, once", file=sys.stderr)
    vmm.images.bootstrap(IMAGE, progress=lambda step: print(f"   {time.monotonic() - began:5.1f} s  {step}", file=sys.stderr, flush=True))
    print(f"   {time.monotonic() - began:5.1f} s  done", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrivisorError as error:
        print(f"{error}\nhint: {error.hint}" if error.hint else error, file=sys.stderr)
        sys.exit(1)
