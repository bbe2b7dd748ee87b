from array import array

from rlhf_lightning.data.collate import SequenceExample
from rlhf_lightning.data.digest import content_digest


def test_what_is_held_counts_and_not_how() -> None:
    one = [SequenceExample(array("i", [1, 2]), array("i", [3])), SequenceExample(array("i", [4]), array("i", [5]))]
    same = [SequenceExample(array("i", [1, 2]), array("i", [3])), SequenceExample(array("i", [4]), array("i", [5]))]
    assert content_digest(one) == content_digest(same)
    assert content_digest(one) != content_digest(one[::-1])
    assert content_digest(one) != content_digest(one[:1])
    assert content_digest(one[:1]) != content_digest([SequenceExample(array("i", [1]), array("i", [2, 3]))])
