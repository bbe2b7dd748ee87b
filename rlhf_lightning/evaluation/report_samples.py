"""The answers in the HTML report: side by side, what differs from the base's marked where the reader asks for it."""

from collections.abc import Mapping

from rlhf_lightning.evaluation.formatting import plain
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.questions import Question
from rlhf_lightning.evaluation.report_tables import escape, model_label, note
from rlhf_lightning.evaluation.report_words import QUESTIONS_NOTE, draw_samples, real_minus, samples_note
from rlhf_lightning.evaluation.sections import colors_of
from rlhf_lightning.evaluation.summary import Comparison
from rlhf_lightning.evaluation.word_diff import Change, word_changes
from rlhf_lightning.rollout.reward_sources import Prompt

#: Letters of an answer beyond which it may scroll within its place, and can be scrolled by keyboard.
LONG_ANSWER = 600
#: Share of an answer's letters below which what it has in common with the base's is not worth marking the rest.
COMMON_SHARE = 0.1


def samples(comparison: Comparison, shown: int) -> str:
    """Return some prompts with every model's answer.

    Args:
        comparison: What was answered.
        shown: How many prompts.
    """
    numbers = draw_samples(len(comparison.prompts.prompts), shown, comparison.seed)
    cards = []
    for number in numbers:
        texts = {answer.name: answer.responses[number] for answer in comparison.answers}
        facts = {answer.name: _facts(answer, number) for answer in comparison.answers}
        cut = {answer.name for answer in comparison.answers if not bool(answer.finished[number])}
        answers = _side_by_side(comparison, texts, facts, cut)
        cards.append(_card(_prompt(comparison.prompts.prompts[number]), answers))
    return note(samples_note(len(numbers))) + _switch(comparison, "samples") + "".join(cards)


def questions(comparison: Comparison) -> str:
    """Return the questions that were asked by name, each answered greedily and sampled; nothing where none was."""
    if not comparison.questions:
        return ""
    cards = [_card(_prompt(question.prompt), _both(comparison, question)) for question in comparison.questions]
    return note(QUESTIONS_NOTE) + _switch(comparison, "questions") + "".join(cards)


def _both(comparison: Comparison, question: Question) -> str:
    parts = []
    for way, texts in (("Greedy", question.greedy), ("Sampled", question.sampled)):
        if texts:
            parts.append(f'<h4 class="way">{way}</h4>{_side_by_side(comparison, texts, {}, set())}')
    return "".join(parts)


def _switch(comparison: Comparison, key: str) -> str:
    """Return the box that shows the marks: the style sheet hides those behind one that is not ticked."""
    if len(comparison.names) < 2:
        return ""
    return (
        f'<input type="checkbox" class="marks" id="marks-{key}"><label class="switch" for="marks-{key}">Mark what '
        f"differs from {escape(comparison.base)}: <ins>only here</ins>, <del>only there</del></label>"
    )


def _card(prompt: str, answers: str) -> str:
    return f'<article class="card sample"><div class="prompt">{prompt}</div>{answers}</article>'


def _side_by_side(comparison: Comparison, texts: Mapping[str, str], facts: Mapping[str, str], cut: set[str]) -> str:
    colors, base = colors_of(comparison.names, comparison.base), comparison.base
    answers = []
    for name, text in texts.items():
        body, apart = _told(None if name == base else texts.get(base), text)
        empty = "" if text.strip() else '<span class="empty">(empty)</span>'
        ending = ' <span class="cut">… cut off</span>' if name in cut else ""
        scrolls = f' tabindex="0" role="group" aria-label="{escape(name)}"' if len(text) > LONG_ANSWER else ""
        fact = f"<span>{facts[name]}</span>" if name in facts else ""
        fact += '<span class="apart">other words throughout</span>' if apart else ""
        answers.append(
            f'<section class="answer s{colors[name]}"><header>{model_label(name)}{fact}</header>'
            f'<div class="text" dir="auto"{scrolls}>{body}{empty}{ending}</div></section>'
        )
    return f'<div class="answers" style="--columns: {_columns(len(texts))}">{"".join(answers)}</div>'


def _told(base: str | None, text: str) -> tuple[str, bool]:
    """Return an answer with its marks, and whether it has too little in common with the base's to have any."""
    if base is None or base == text:
        return escape(text), False
    changes = word_changes(base, text)
    if sum(len(change.text) for change in changes if change.kind == "kept") < COMMON_SHARE * len(text):
        return escape(text), True
    return "".join(map(_marked, changes)), False


def _marked(change: Change) -> str:
    """Return a change in its mark. Space stays outside of what is inserted, and goes with what is hidden."""
    if change.kind == "deleted":
        return f"<del>{escape(change.text)}</del>"
    words = change.text.rstrip()
    if change.kind == "kept" or not words:
        return escape(change.text)
    return f"<ins>{escape(words)}</ins>{escape(change.text[len(words) :])}"


def _facts(answer: Generations, number: int) -> str:
    tokens = f"{int(answer.lengths[number])} tokens"
    if answer.scores is None:
        return tokens
    return f"score {escape(real_minus(plain(float(answer.scores[number]))))} · {tokens}"


def _columns(count: int) -> int:
    """Return in how many columns answers stand: up to three, four as two by two."""
    return count if count <= 3 else 2 if count == 4 else 3


def _prompt(prompt: Prompt) -> str:
    if isinstance(prompt, str) or len(prompt) == 1:
        return _text(prompt if isinstance(prompt, str) else prompt[0]["content"])
    return "".join(f'<span class="role">{escape(turn["role"])}</span>{_text(turn["content"])}' for turn in prompt)


def _text(text: str) -> str:
    return f'<div class="text" dir="auto">{escape(text)}</div>'
