"""Words in pictures."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def any_words() -> Iterator[None]:
    """In this block every text is drawn as it is, such as a file's name.

    A dollar sign begins no formula, and letters that the font lacks become boxes without a word about it.
    """
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False}):
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        yield
