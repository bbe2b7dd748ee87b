"""The tables of the demo's grammar: complete, and of lengths that do not tell the voices apart."""

import itertools
import re

import pytest

from rlhf_lightning.demo.phrases import PHRASES, QUESTIONS, SETTINGS, TOPICS, Voice


@pytest.mark.parametrize("voice", ["human", "stiff"])
def test_every_intent_has_cores_and_every_core_names_the_topic(voice: Voice) -> None:
    cores = PHRASES[voice].core
    assert set(cores) == set(QUESTIONS)
    for core in itertools.chain.from_iterable(cores.values()):
        assert core.count("{topic}") == 1
        assert re.match(r"I\b", core), "a core follows a comma as well as a full stop"


def test_no_phrase_of_one_voice_is_a_phrase_of_the_other() -> None:
    said = {}
    for voice, phrases in PHRASES.items():
        cores = itertools.chain.from_iterable(phrases.core.values())
        said[voice] = {*phrases.opener, *cores, *phrases.detail, *phrases.closing}
    assert len(said["human"]) > 40
    assert len(said["stiff"]) > 40
    assert said["human"].isdisjoint(said["stiff"])


def test_only_the_human_voice_has_contractions_and_exclamations() -> None:
    human, stiff = repr(PHRASES["human"]), repr(PHRASES["stiff"])
    assert "!" in human
    assert "I'm" in human
    assert "!" not in stiff
    assert not re.search(r"\w'\w", stiff)


def test_topics_have_three_different_details_of_their_own() -> None:
    for topic, details in TOPICS.items():
        assert len(set(details)) == len(details) >= 3, topic


def test_settings_start_with_a_space_or_are_empty() -> None:
    assert SETTINGS[0] == ""
    assert all(setting.startswith(" ") and setting == setting.rstrip() for setting in SETTINGS[1:])
