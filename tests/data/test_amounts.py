"""Amounts such as 10B."""

import pytest

from gpt2course.data.amounts import parse_amount


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("10B", 10_000_000_000),
        ("10b", 10_000_000_000),
        ("10G", 10_000_000_000),
        ("100M", 100_000_000),
        ("5k", 5_000),
        ("5K", 5_000),
        ("2T", 2 * 10**12),
        ("1.5B", 1_500_000_000),
        ("0.25k", 250),
        ("1_000", 1_000),
        ("1,000,000", 1_000_000),
        ("123", 123),
        ("1.0", 1),
        (" 7 M ", 7_000_000),
    ],
)
def test_amounts_are_read(text: str, amount: int) -> None:
    """1024s where thousands are meant, or 1.1B that becomes 1100000000.0000001."""
    assert parse_amount(text) == amount


@pytest.mark.parametrize(
    "text", ["", "B", "ten", "10 billion", "10BB", "-5", "1e9", "1.5", "0.0001k", "1..5k", "0x10", "٣"]
)
def test_what_is_no_amount_is_told(text: str) -> None:
    """A half token, or a misread suffix and a run a thousand times too long."""
    with pytest.raises(ValueError, match=r"is no amount; write .* such as 5k, 100M, 1\.5B or 10B"):
        parse_amount(text)
