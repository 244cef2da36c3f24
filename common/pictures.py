"""Text in figures."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def literal_text() -> Iterator[None]:
    """Draw every text in this block, such as a file name, literally.

    A dollar sign does not begin a formula. A character that the font lacks becomes a box, without a warning.
    """
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False}):
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        yield
