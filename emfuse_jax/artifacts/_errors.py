"""What an error of orbax, tensorstore or the system says."""

import errno
import re


def system_errno(error: BaseException | None) -> int:
    """What the system said, however deep below; EIO where it said nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        said = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore
        if said is not None:
            return int(said.group(1))
        error = error.__cause__ or error.__context__
    return errno.EIO


def brief(error: BaseException) -> str:
    """Its kind and first line."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first[:160]}"
