"""The words of a caption that say what it is about."""

from __future__ import annotations

import re

STOP_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
a about above after again against all am an and another any are aren't as at be because been before being below
between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each few for
from further had hadn't has hasn't have haven't having he her here hers herself him himself his how i if in into is
isn't it it's its itself just me more most my myself no nor not now of off on once one only or other our ours
ourselves out over own s same she should shouldn't so some such t than that that's the their theirs them themselves
then there there's these they this those through to too under until up very was wasn't we were weren't what when
where which while who whom why will with won't would wouldn't you your yours yourself yourselves
""",
    )
)


def content_words(caption: str) -> set[str]:
    """Return the words of a caption in small letters, without the common words that say nothing of its content."""
    return set(re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower().replace("\u2019", "'"))) - STOP_WORDS
