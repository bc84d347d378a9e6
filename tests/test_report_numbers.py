"""Smoothing, averages, remaining time and how numbers are written, each held to values worked out by hand."""

import math

import pytest

from deltune.training import display
from deltune.training.curves import RemainingTime, Smooth, smooth, spans_decades, thin, trimmed_mean


def average(values: list[float], beta: float) -> list[float]:
    moving = Smooth(beta)
    return [moving.add(value) for value in values]


def test_a_moving_average_is_a_weighted_mean_whose_weights_fall_by_beta():
    # weights 0.25, 0.5, 1 for the third value, 0.5 and 1 for the second
    assert average([8.0, 2.0, 5.0], 0.5) == pytest.approx([8.0, (0.5 * 8 + 2) / 1.5, (0.25 * 8 + 0.5 * 2 + 5) / 1.75])


def test_a_moving_average_passes_over_what_is_not_finite():
    with_gap = average([math.nan, 4.0, math.inf, 6.0], 0.5)
    assert math.isnan(with_gap[0])
    assert with_gap[1:] == [4.0, 4.0, average([4.0, 6.0], 0.5)[1]]


def test_smoothing_is_the_mean_of_both_directions():
    left, right = (0.5 * 8 + 2) / 1.5, (0.5 * 5 + 2) / 1.5
    assert smooth([8.0, 2.0, 5.0], 0.5)[1] == pytest.approx((left + right) / 2)


def test_smoothing_leaves_constants_and_follows_slopes_without_delay():
    assert smooth([3.0] * 40, 0.9) == pytest.approx([3.0] * 40)
    slope = [7.0 - 0.01 * i for i in range(1000)]
    assert smooth(slope, 0.9)[200:800] == pytest.approx(slope[200:800])


def test_smoothing_has_no_value_only_where_none_is():
    assert smooth([math.nan, 4.0, math.inf], 0.5) == [4.0, 4.0, 4.0]
    assert all(math.isnan(v) for v in smooth([math.nan] * 3, 0.5))


def test_a_short_series_is_not_smoothed_and_a_long_one_is():
    assert smooth([1.0, 9.0, 1.0]) == [1.0, 9.0, 1.0]
    assert smooth([1.0, 9.0] * 500)[500] == pytest.approx(5.0, abs=0.3)  # spans 20 values


def test_trimmed_mean_does_not_follow_outliers():
    assert trimmed_mean([2.0]) == 2.0
    assert trimmed_mean([2.0, 4.0]) == 3.0
    assert trimmed_mean([100.0, 2.0, 3.0]) == 3.0
    assert trimmed_mean([1.0] * 18 + [1000.0, 1000.0]) == 1.0
    assert trimmed_mean([1.0] * 10 + [3.0] * 10) == 2.0  # two kinds of steps count by their share


def test_remaining_time_counts_steps_and_evaluations_still_due():
    left = RemainingTime(num_steps=100, eval_every=25)
    assert left.seconds(0) is None
    for seconds in (9.0, 2.0, 2.0, 2.0):  # the first step compiles
        left.steps.append(seconds)
    assert left.seconds(40) == 60 * 2.0
    left.evals.append(10.0)
    assert left.seconds(40) == 60 * 2.0 + 3 * 10.0  # at 50, 75 and 100
    assert left.seconds(50) == 50 * 2.0 + 2 * 10.0
    assert left.seconds(100) == 0.0


def test_remaining_time_follows_the_recent_pace():
    left = RemainingTime(num_steps=1000, eval_every=None)
    left.steps.extend([5.0] * 400 + [1.0] * 100)
    assert left.seconds(500) == 500.0


def test_thinning_keeps_the_ends_of_each_bucket_and_every_spike():
    x = list(range(10_000))
    y = [math.sin(i / 500) for i in x]
    y[4321], y[7777] = 50.0, -50.0
    thin_x, thin_y = thin(x, y, 600)
    assert len(thin_x) <= 600
    assert thin_x == sorted(set(thin_x))
    assert (4321, 50.0) in zip(thin_x, thin_y, strict=True) and (7777, -50.0) in zip(thin_x, thin_y, strict=True)
    assert all(y[a] == b for a, b in zip(thin_x, thin_y, strict=True))
    assert thin(x[:600], y[:600], 600) == (x[:600], y[:600])


def test_thinning_keeps_gaps_only_where_nothing_else_is():
    y = [math.nan] * 500 + [1.0, math.nan] * 250
    _, kept = thin(list(range(1000)), y, 100)
    assert all(math.isnan(v) for v in kept[:50]) or math.isnan(kept[0])
    assert kept[-1] == 1.0


def test_a_logarithmic_axis_is_for_two_decades():
    assert spans_decades([0.01, 1.0, math.nan])
    assert not spans_decades([0.011, 1.0])
    assert not spans_decades([0.0, 1.0, 1000.0])
    assert not spans_decades([])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.4, "999"), (999.6, "1k"), (12345, "12.3k"), (2_712_000, "2.71M"), (1e12, "1T"), (3e21, "3e+03E"), (0.5, "0.5"), (math.inf, "inf")],
)
def test_prefixes(value, text):
    assert display.si(value) == text


def test_units():
    assert display.si(2.74e12, "FLOP") == "2.74 TFLOP"
    assert [display.count(n) for n in (999_999, 1_000_000, 2_712_345)] == ["999,999", "1M", "2.71M"]
    assert [display.memory(b) for b in (812_000_000, 1_240_000_000)] == ["812 MB", "1.2 GB"]
    assert [display.clock(s) for s in (0, 42.4, 59.6, 725, 11229, 2 * 86400 + 3 * 3600 + 7 * 60)] == ["0:00", "0:42", "1:00", "12:05", "3:07:09", "2d 03:07"]
    assert [display.duration(s) for s in (4.23, 9.96, 42, 59.4, 59.6, 725, 11229)] == ["4.2 s", "10 s", "42 s", "59 s", "1 min 0 s", "12 min 5 s", "3 h 7 min"]


def test_fractions_are_percent_and_others_four_digits():
    assert display.metric("exact_match", 0.905) == "90.5 %"
    assert display.metric("eval/token_accuracy", 1.0) == "100.0 %"
    assert display.metric("loss", 1.23456) == "1.235"
    assert display.metric("loss", math.nan) == "nan"


def test_control_characters_become_visible():
    assert display.plain("a\x1b[31mred\x07\x7f\ud800\x9b1m") == "a␛[31mred␇␡��1m"
    assert display.plain("two\r\nlines\tand a tab") == "two\nlines\tand a tab"
    assert display.one_line(" a\n b\t c ") == "a b c"
    assert display.plain("日本語 émoji 👍🏽 ‮") == "日本語 émoji 👍🏽 ‮"


def test_the_closing_table_leaves_out_a_side_that_is_not_known():
    assert display.before_after({}, {}) == []
    assert display.before_after({}, {"loss": 0.5}) == [["metric", "after"], ["loss", "0.5"]]
    assert display.before_after({"loss": 2.0}, {"loss": 0.5, "exact_match": 1.0}) == [
        ["metric", "before", "after"],
        ["loss", "2", "0.5"],
        ["exact match", "–", "100.0 %"],
    ]


def test_aligned_columns_line_up():
    lines = display.aligned([["metric", "before"], ["loss", "4.18"], ["token accuracy", "5.0 %"]])
    assert lines == ["metric          before", "loss              4.18", "token accuracy   5.0 %"]
