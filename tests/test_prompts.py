"""The words of a user turn, letter by letter."""

from sif_jax.sif.prompts import ovd_question, rec_question, user_text

SUFFIX_WITH_DEPTH = "Please first output the thinking process in <think> </think> tags, where bounding box with depth is enclosed in <area> </area> tags and text analysis is enclosed in <text> </text> tags, alternating between them to iteratively refine the focused area. Then output the final answer in <answer> </answer> tags."  # noqa: E501
SUFFIX_WITHOUT_DEPTH = "Please first output the thinking process in <think> </think> tags, where bounding box is enclosed in <area> </area> tags and text analysis is enclosed in <text> </text> tags, alternating between them to iteratively refine the focused area. Then output the final answer in <answer> </answer> tags."  # noqa: E501


def test_the_user_turn_is_that_of_the_released_training_data():
    assert user_text("Is the cup red?") == (
        f"Original image: <image>\nDepth image: <image>\nIs the cup red? {SUFFIX_WITH_DEPTH}"
    )


def test_the_words_with_depth_can_be_dropped():
    assert user_text("Why?", with_depth_words=False) == (
        f"Original image: <image>\nDepth image: <image>\nWhy? {SUFFIX_WITHOUT_DEPTH}"
    )


def test_an_rgb_only_turn_has_one_image():
    assert user_text("Why?", depth_input=False) == f"Original image: <image>\nWhy? {SUFFIX_WITH_DEPTH}"


def test_a_question_with_braces_stays_as_it_is():
    assert "{depth} {0}" in user_text("{depth} {0}")


def test_the_grounding_questions_are_those_of_the_paper():
    assert rec_question("the red cup") == (
        "Please provide the bounding box coordinate of the region this sentence describes: the red cup."
    )
    assert ovd_question(["cup", "dog"]) == (
        "Please carefully check the image and detect the following objects: cup, dog. If there are no such target "
        "objects in the image, simply reply with 'None'."
    )
