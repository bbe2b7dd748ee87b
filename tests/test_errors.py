import pytest

from rlhf_lightning.errors import UserError, did_you_mean, nearest


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("kl_coeff", ["gamma", "kl_coef", "clip_range"], "kl_coef"),
        ("ppomodule", ["PPOModule", "SFTModule"], "PPOModule"),
        ("Chosen", ["chosen", "rejected"], "chosen"),
        ("PROMPT", ["response", "prompt"], "prompt"),
        ("zzz", ["gamma", "kl_coef"], None),
        ("x", [], None),
    ],
)
def test_nearest(name: str, options: list[str], expected: str | None) -> None:
    assert nearest(name, options) == expected
    assert nearest(name, iter(options)) == expected  # anything that can be gone through once
    assert did_you_mean(name, options) == (f" Did you mean '{expected}'?" if expected else "")


def test_a_user_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="what was given"):
        raise UserError("what was given")
