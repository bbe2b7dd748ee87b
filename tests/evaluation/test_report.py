import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from rlhf_lightning.evaluation.curves import plots_of
from rlhf_lightning.evaluation.generations import Generations
from rlhf_lightning.evaluation.judges import Judgement
from rlhf_lightning.evaluation.prompts import PromptSet
from rlhf_lightning.evaluation.report import color_of, draw_samples, render
from rlhf_lightning.evaluation.summary import Comparison, summarize
from rlhf_lightning.rollout.reward_sources import Prompt
from rlhf_lightning.rollout.sampler import SamplingConfig

EVIL = "</style></title><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&'\""


def answers(name: str, text: str, shift: float) -> Generations:
    count = 20
    scores = torch.arange(count) / 10 + shift
    return Generations(
        name=name,
        path=f"runs/{text}",
        responses=[f"{text} {number}" for number in range(count)],
        lengths=torch.full((count,), 7),
        finished=torch.arange(count) % 2 == 0,
        kl=torch.full((count,), shift, dtype=torch.float64),
        judgement=Judgement(scores, {text: scores}, {f"metric {text}": scores}),
        repetition=torch.zeros(count),
    )


def comparison(names: tuple[str, ...] = ("base", "ppo"), text: str = "plain", base: str = "base") -> Comparison:
    everything = [answers(name, text, float(number)) for number, name in enumerate(names)]
    own = next(answer for answer in everything if answer.name == base)
    prompts: list[Prompt] = [text, [{"role": "system", "content": text}, {"role": text, "content": text}]] * 10
    return Comparison(
        base=base,
        prompts=PromptSet(f"data/{text}", prompts, [{}] * 20, 40),
        answers=everything,
        models=[summarize(answer, own) for answer in everything],
        sampling=SamplingConfig(max_new_tokens=7),
        reward=text,
        seed=0,
        created="2026-01-01 00:00 UTC",
    )


class Tags(HTMLParser):
    """Collects tags and the attributes that could load or run something, and checks that tags nest."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.dangerous: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.dangerous += [name for name, _ in attrs if name.startswith("on") or name in ("src", "href", "srcdoc")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_the_page_is_one_file_without_script() -> None:
    page = render(comparison(), {"ppo": plots_of([{"step": 0, "train/loss": 1.0}, {"step": 1, "train/loss": 0.5}])})
    tags = parsed(page)
    assert tags.open == []
    assert not {"script", "img", "link", "iframe"} & set(tags.tags)
    assert tags.dangerous == []
    assert "@import" not in page
    assert "url(" not in page
    assert tags.tags.count("svg") == 2 + 5 + 1  # histograms twice, a strip for each row with two intervals, one curve


def test_whatever_models_and_data_say_is_escaped() -> None:
    page = render(comparison(("base", EVIL), EVIL), {EVIL: plots_of([{"step": 0, f"val/{EVIL}": 1.0}])})
    tags = parsed(page)
    assert tags.open == []
    assert not {"script", "img"} & set(tags.tags)
    assert tags.tags.count("style") == tags.tags.count("body") == 1
    assert tags.dangerous == []
    assert "&lt;script&gt;" in page


def test_numbers_of_the_page() -> None:
    page = render(comparison(), {})
    assert "<h1>ppo against base</h1>" in page
    assert "20 of 40 prompts from data/plain" in page
    assert '<span class="from">0.95 → </span>1.95' in page  # mean of 0, 0.1, ... 1.9, and that plus 1
    assert "<b>+1.00</b><small>+1.00 to +1.00</small>" in page
    assert page.count("… cut off") == sum(number % 2 for number in draw_samples(20, 12, 0)) * 2


def test_samples_are_drawn_by_the_seed() -> None:
    assert draw_samples(100, 5, seed=1) == draw_samples(100, 5, seed=1) != draw_samples(100, 5, seed=2)
    page = render(comparison(), {}, shown=3)
    assert page.count("<article") == 3
    shown = {int(number) for number in re.findall(r'dir="auto">plain (\d+)', page)}
    assert shown == set(draw_samples(20, 3, 0))


def test_the_base_is_grey_wherever_it_stands() -> None:
    made = comparison(("dpo", "base", "ppo"))
    assert [color_of(made, name) for name in ("dpo", "base", "ppo")] == [1, 0, 2]
    assert "<h1>dpo and ppo against base</h1>" in render(made, {})


def test_one_model_alone_is_a_page_too() -> None:
    page = render(comparison(("base",)), {})
    assert "<h1>base alone</h1>" in page
    assert parsed(page).open == []


def test_a_browser_runs_nothing_of_it(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: the report was not looked at in a browser")
    (tmp_path / "report.html").write_text(render(comparison(("base", EVIL), EVIL), {}), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", "--window-size=390,800"]
    shown = subprocess.run(
        [*command, f"file://{tmp_path / 'report.html'}"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "<h2>Measured</h2>" in shown
    assert "<title>owned</title>" not in shown
    assert "<script>" not in shown
