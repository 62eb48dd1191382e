import math
import random
import statistics

import pytest

from megactl.report.logs.compare import compare, differing, mann_whitney
from megactl.report.logs.speed import quantile, speed_of, steady, warm_up_lines

NAN = math.nan


def test_the_mean_is_over_every_line_and_the_steady_one_leaves_the_first_out():
    speed = speed_of([3.0, 1.0, 1.0, 1.0])
    assert (speed.mean, speed.steady_mean, speed.median, speed.lines, speed.steady_lines) == (1.5, 1.0, 1.0, 4, 3)


@pytest.mark.parametrize(
    ("times", "lines"),
    [
        ([], 0),
        ([1.0], 0),
        ([1.0, 1.0], 1),
        ([9.0, 8.0, 7.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3),
        # The first of several equal lines is warm-up by definition; a slow line later is not.
        ([1.0, 1.0, 1.0, 9.0, 1.0, 1.0], 1),
        # Never more than half, however a run slows down or speeds up.
        ([9.0, 9.0, 9.0, 1.0], 1),
        ([9.0, 8.0, 1.0, 1.0], 2),
    ],
)
def test_warm_up_is_the_first_line_and_the_slow_ones_behind_it(times, lines):
    assert warm_up_lines(times) == lines


def test_a_line_that_counted_a_save_is_not_steady_unless_most_of_them_did():
    seconds = [2.0, 1.0, 5.0, 1.0, 1.0]
    assert steady(seconds, [0, 0, 1, 0, 0]) == [1.0, 1.0, 1.0]
    assert steady(seconds, [0, 1, 1, 1, 0]) == [1.0, 5.0, 1.0, 1.0]


def test_what_is_no_time_counts_nowhere():
    speed = speed_of([NAN, -27.152, 0.0, math.inf, 2.0, 2.0, NAN])
    assert (speed.lines, speed.mean, speed.steady_mean) == (2, 2.0, 2.0)
    assert speed_of([NAN]).mean is None
    assert speed_of([]) == speed_of([0.0])


def test_one_line_has_no_steady_state():
    speed = speed_of([146.0])
    assert (speed.mean, speed.steady_mean, speed.p95) == (146.0, None, 146.0)


def test_quantiles_are_numpys():
    numpy = pytest.importorskip("numpy")
    values = sorted(random.random() for _ in range(37))
    for share in (0, 0.05, 0.5, 0.9, 0.95, 1):
        assert quantile(values, share) == pytest.approx(numpy.quantile(values, share), rel=1e-12)
    assert speed_of(values).p95 == pytest.approx(statistics.quantiles(values, n=20, method="inclusive")[-1])


def noisy(centre, n, spread=0.01, seed=0):
    generator = random.Random(seed)
    return [centre * (1 + generator.uniform(-spread, spread)) for _ in range(n)]


def test_runs_with_spreads_apart_differ():
    result = compare(noisy(1.0, 40), noisy(0.9, 40, seed=1))
    assert result.verdict == "B is faster"
    assert result.change == pytest.approx(-0.1, abs=0.01) and result.change_low < result.change < result.change_high < 0
    assert compare(noisy(0.9, 40, seed=1), noisy(1.0, 40)).verdict == "A is faster"


def test_a_small_difference_inside_the_spread_is_noise_however_many_iterations_there_are():
    # Significant by any test of ranks, and yet no reason to choose one layout over the other.
    result = compare(noisy(1.0, 3000, spread=0.2), noisy(0.97, 3000, spread=0.2, seed=1))
    assert result.p < 0.001 and result.verdict == "within noise"


def test_one_distribution_is_noise():
    verdicts = [compare(noisy(1.0, 30, seed=2 * seed), noisy(1.0, 30, seed=2 * seed + 1)).verdict for seed in range(40)]
    assert set(verdicts) == {"within noise"}


def test_few_iterations_are_not_judged():
    assert compare([1.0] * 4, [2.0] * 40).verdict == "too few iterations"
    assert compare([], [1.0] * 9).change is None


def test_the_same_question_gets_the_same_answer():
    one, other = noisy(1.0, 50), noisy(1.1, 50, seed=1)
    assert compare(one, other) == compare(one, other)


def test_the_exact_test_of_values_that_are_fully_apart():
    # Two of the 252 orders of five and five, two of the 70 of four and four.
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert mann_whitney([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert mann_whitney([1, 3], [2, 4]) == pytest.approx(4 / 6)
    assert mann_whitney([1, 4], [2, 3]) == 1.0


def test_the_exact_test_counts_what_enumeration_counts():
    from itertools import combinations

    a, b = [0.3, 1.1, 2.2, 2.9], [0.1, 0.7, 0.9, 1.4, 2.0]
    pool = sorted(a + b)

    def statistic(chosen):
        rest = [value for value in pool if value not in chosen]
        return min(sum(x > y for x in chosen for y in rest), sum(x < y for x in chosen for y in rest))

    orders = [statistic(chosen) for chosen in combinations(pool, len(a))]
    expected = sum(value <= statistic(a) for value in orders) / len(orders)
    assert mann_whitney(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True])
def test_the_approximation_meets_a_permutation_test(ties):
    numpy = pytest.importorskip("numpy")
    generator = numpy.random.default_rng(5)
    a, b = generator.normal(0, 1, 20), generator.normal(0.6, 1, 25)
    a, b = (numpy.round(values * 2) for values in (a, b)) if ties else (a, b)
    pool = numpy.concatenate([a, b])
    below, equal = pool[:, None] < pool[None, :], pool[:, None] == pool[None, :]

    def distance(order):
        mine, other = order[:20], order[20:]
        return abs((below[mine][:, other] + 0.5 * equal[mine][:, other]).sum() - 250)

    seen = distance(numpy.arange(45))
    share = numpy.mean([distance(generator.permutation(45)) >= seen - 1e-9 for _ in range(4000)])
    assert 0.01 < share < 0.5 and mann_whitney(list(a), list(b)) == pytest.approx(share, abs=0.02)
    assert mann_whitney([1.0] * 20, [1.0] * 20) == 1.0


def test_arguments_that_say_the_same_are_the_same():
    found = differing({"lr": "1e-4", "tp": "4", "save": "a", "only": "x"}, {"lr": "0.0001", "tp": "8", "save": "a "})
    assert [(item.name, item.a, item.b) for item in found] == [("only", "x", None), ("tp", "4", "8")]
