"""The exact words of a user turn; models are trained on them, so they are an interface (pure)."""

from __future__ import annotations

from collections.abc import Sequence

IMAGE = "<image>"

_SUFFIX = (
    "Please first output the thinking process in <think> </think> tags, where bounding box{depth} is enclosed in "
    "<area> </area> tags and text analysis is enclosed in <text> </text> tags, alternating between them to iteratively "
    "refine the focused area. Then output the final answer in <answer> </answer> tags."
)


def user_text(question: str, depth_input: bool = True, with_depth_words: bool = True) -> str:
    """The user turn, with one `<image>` for the RGB image and, if `depth_input`, one for the depth image.

    `with_depth_words=False` drops the words "with depth", as the released RL and inference scripts do.
    """
    images = f"Original image: {IMAGE}\n" + (f"Depth image: {IMAGE}\n" if depth_input else "")
    return f"{images}{question} {_SUFFIX.format(depth=' with depth' if with_depth_words else '')}"


def rec_question(query: str) -> str:
    """Referring expression comprehension."""
    return f"Please provide the bounding box coordinate of the region this sentence describes: {query}."


def ovd_question(targets: Sequence[str]) -> str:
    """Open-vocabulary detection of the named targets."""
    return (
        f"Please carefully check the image and detect the following objects: {', '.join(targets)}. "
        "If there are no such target objects in the image, simply reply with 'None'."
    )
