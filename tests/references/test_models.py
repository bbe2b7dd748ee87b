"""Our passes over whole models against TRL's, on the token ids that it was given: same weights, same numbers."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.data.collate import collate_sequences
from rlhf_lightning.functional.preference import dpo_loss
from rlhf_lightning.functional.sequences import SequenceBatch
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.scalar_head import ScalarModel

Case = dict[str, Any]
Read = Callable[[str, str], Case]


@pytest.fixture(scope="module")
def written_model(load_tool: Callable[[str], ModuleType]) -> Callable[..., Any]:
    """``written_model(seed, scalar=False)`` is the model that the recorder gave to TRL."""
    found: Callable[..., Any] = load_tool("reference_models").written_model
    return found


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def sequences(inputs: dict[str, Tensor]) -> SequenceBatch:
    """Take prompts and completions apart, and put them together our way."""
    rows = []
    for ids, attended, completion in zip(
        *(inputs[n] for n in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        prompt, response = attended.bool() & ~completion.bool(), completion.bool()
        rows.append((ids[prompt].tolist(), ids[response].tolist()))
    return collate_sequences(rows, pad_id=0)


@torch.no_grad()
def test_dpo_from_token_ids_to_loss(reference: Read, written_model: Callable[..., Any]) -> None:
    case = reference("dpo", "sigmoid")
    batch = sequences(case["inputs"])
    policy, ref = (response_logprobs(written_model(seed), batch).sum(1) for seed in (1, 2))
    chosen, rejected = policy.chunk(2)
    close(chosen, case["chosen_logps"])
    close(rejected, case["rejected_logps"])
    ratios = (policy - ref).chunk(2)
    loss = dpo_loss(chosen_logratios=ratios[0], rejected_logratios=ratios[1], beta=case["settings"]["beta"]).mean()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)


@torch.no_grad()
def test_scores_of_a_reward_model(reference: Read, written_model: Callable[..., Any]) -> None:
    case = reference("reward", "plain")
    inputs = case["inputs"]
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    batch = collate_sequences([(row[:1], row[1:]) for row in rows], pad_id=0)
    chosen, rejected = ScalarModel(written_model(3, scalar=True)).scores(batch).chunk(2)
    close(chosen, case["chosen_scores"])
    close(rejected, case["rejected_scores"])


@torch.no_grad()
def test_a_rollout_of_ppo(reference: Read, written_model: Callable[..., Any]) -> None:
    case = reference("ppo", "k1")
    rollout, settings = case["rollout"], case["settings"]
    lengths = rollout["sequence_lengths"] + 1
    rows = torch.nonzero(lengths > 0).flatten()  # a first token that is TRL's pad leaves it nothing
    prompts = [query[query != 0].tolist() for query in rollout["queries"][rows]]
    responses = [ids[:length].tolist() for ids, length in zip(rollout["responses"][rows], lengths[rows], strict=True)]
    assert len(set(map(len, responses))) > 3
    batch = collate_sequences(list(zip(prompts, responses, strict=True)), pad_id=0)
    mask, width = batch.response_mask, batch.response_mask.shape[1]
    for name, seed in (("logprobs", 1), ("ref_logprobs", 2)):
        ours = response_logprobs(written_model(seed), batch, temperature=settings["temperature"])
        close(ours[mask], rollout[name][rows, :width][mask])
    values = ScalarModel(written_model(4, scalar=True)).values(batch)
    close(values[mask], rollout["values"][rows, :width][mask])
    ended = (rollout["postprocessed_responses"] == 2).any(dim=1)
    penalty = torch.where(ended, 0.0, settings["missing_eos_penalty"])[rows]
    close(ScalarModel(written_model(3, scalar=True)).scores(batch) - penalty, rollout["scores"][rows])
