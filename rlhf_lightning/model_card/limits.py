"""What a model card must own up to, as far as the records show it."""

from collections.abc import Iterator

from rlhf_lightning.evaluation.formatting import plain, without_home
from rlhf_lightning.markdown import escape_line
from rlhf_lightning.model_card.comparison import MeasuredModel
from rlhf_lightning.model_card.records import RunRecords


def limits(records: RunRecords, measured: MeasuredModel | None) -> list[str]:
    """Return one sentence or two for each limit, as Markdown."""
    found = [*_of_reward(records, measured), *_of_data(records), *_of_lengths(records), *_of_results(records, measured)]
    return [*found, "Factual correctness, safety and bias were not measured."]


def _of_reward(records: RunRecords, measured: MeasuredModel | None) -> Iterator[str]:
    reward = records.model_settings.get("reward")
    if not records.scores and isinstance(reward, dict):
        judge = escape_line(_reward_name(reward))
        yield (
            f"It was trained to please {judge}, which is a stand-in for what people prefer: higher scores may come "
            "from its mistakes as well as from better answers."
        )
        if measured is not None and measured.report.get("reward"):
            yield f"The scores above are those of {escape_line(str(measured.report['reward']))}, and not of people."
    if records.scores:
        yield "Its scores have no scale of their own: what counts is the difference between two answers to one prompt."
    kl = records.last("val/kl", "rollout/kl")
    if kl is not None and records.module == "PPOModule":
        yield (
            f"When last measured in training, its answers lay at a KL divergence of {plain(kl)} nats a response from "
            "the reference model. The further away, the less the reward is to be relied upon."
        )


def _reward_name(reward: dict[str, object]) -> str:
    arguments = reward.get("init_args")
    inner = arguments if isinstance(arguments, dict) else {}
    kind = str(reward.get("class_path", "")).rpartition(".")[2] or "a reward"
    place = inner.get("path") or inner.get("function")
    return f"{kind} {without_home(str(place))}" if place else kind


def _of_data(records: RunRecords) -> Iterator[str]:
    counts = records.data.get("counts") or {}
    if counts.get("train_kept"):
        validated = f", and validated on {counts['val_kept']:,}" if counts.get("val_kept") else ""
        yield f"It was trained on {counts['train_kept']:,} rows{validated}; other kinds of text were not seen."
    shared = counts.get("val_prompts_in_training")
    if shared:
        yield f"{shared:,} prompts of the validation rows are among the training rows too."


def _of_lengths(records: RunRecords) -> Iterator[str]:
    prompt, whole = records.data_settings.get("max_prompt_length"), records.data_settings.get("max_length")
    response = records.setting("sampling", "max_new_tokens")
    parts = [f"prompts of up to {prompt:,} tokens"] if isinstance(prompt, int) else []
    parts += [f"responses of up to {response:,}"] if isinstance(response, int) else []
    parts += [f"{whole:,} tokens in all"] if isinstance(whole, int) else []
    if parts:
        yield f"It was trained on {' and '.join(parts)}; beyond that nothing is known."
    finished = records.last("val/finished_fraction", "rollout/finished_fraction")
    if finished is not None and finished < 1:
        yield f"{plain(100 * finished)} % of its last responses ended by themselves, the others at the limit of tokens."


def _of_results(records: RunRecords, measured: MeasuredModel | None) -> Iterator[str]:
    seed = records.settings.get("seed_everything")
    of_seed = f" with seed {seed}" if isinstance(seed, int) and not isinstance(seed, bool) else ""
    told = " Intervals cover the draw of prompts and answers, and not that of training runs." if measured else ""
    yield f"All numbers are of one training run{of_seed}.{told}"
    skipped = records.last("train/nonfinite_steps")
    if skipped:
        yield f"{plain(skipped, digits=0)} training steps were skipped, as their loss or gradient was not finite."
