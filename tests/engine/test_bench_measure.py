"""How operators are timed and compared: rounds, clocks, verdicts, bytes, and that wrong, missing or failing operators show."""

from __future__ import annotations

import gc
import itertools

import pytest

torch = pytest.importorskip("torch")

from megactl.engine import ops  # noqa: E402
from megactl.engine.bench import OPERATORS, Contestant, Plan, Size, Timing, clock_for, interleave, run_operators, size_named  # noqa: E402
from megactl.engine.bench.measure import cache_bytes, clock_name, compare, quartiles  # noqa: E402
from megactl.engine.bench.work import COMPILE, COPY, OURS, copy_of, differentiable, disagreement  # noqa: E402
from megactl.errors import ConfigError  # noqa: E402

CPU = torch.device("cpu")
TINY = Size("tiny", batch=2, seq=8, hidden=32, heads=4, ffn=64, vocab=96, layers=1)
BUILT = [name for name in OPERATORS if hasattr(ops, name)]


def timing(*seconds):
    return Timing(seconds, seconds)


def plan(*operators, dtypes=("fp32",), compile=False):
    return Plan(operators, [TINY], dtypes, CPU, seconds=1e-6, compile=compile)


class FakeClock:
    """Says what it was asked to time, and that a call takes as many seconds as its contestant's name says."""

    def __init__(self):
        self.calls = []

    def sample(self, contestant, *, warm):
        self.calls.append((contestant.name, warm))
        return float(contestant.name), 0.0


def test_every_round_times_everybody_once_in_changing_order():
    clock, names = FakeClock(), ["1", "2", "3", "4"]
    timings = interleave([Contestant(name, lambda _: None) for name in names], clock, seconds=0.0, max_rounds=12, warm=True)
    assert {name: timing.median for name, timing in timings.items()} == {"1": 1.0, "2": 2.0, "3": 3.0, "4": 4.0}
    timed = [name for name, _ in clock.calls][-7 * 4 :]
    rounds = [timed[start : start + 4] for start in range(0, len(timed), 4)]
    assert all(sorted(order) == names for order in rounds)
    assert len({tuple(order) for order in rounds}) > 3
    assert all(len(timing.seconds) == 7 for timing in timings.values())
    assert {warm for _, warm in clock.calls} == {True}


def test_rounds_end_at_their_most():
    timings = interleave([Contestant("1", lambda _: None)], FakeClock(), seconds=60.0, max_rounds=9)
    assert len(timings["1"].seconds) == 9


def test_garbage_collection_waits_and_comes_back():
    seen = []
    interleave([Contestant("a", lambda _: seen.append(gc.isenabled()))], clock_for(CPU), seconds=0.0)
    assert seen[-7:] == [False] * 7 and gc.isenabled()


@pytest.mark.parametrize("warm", [False, True])
def test_what_is_prepared_reaches_the_timed_call(warm):
    prepared, used = iter(range(1000)), []
    contestant = Contestant("a", used.append, lambda: next(prepared))
    seconds, host = clock_for(CPU).sample(contestant, warm=warm)
    assert used == ([0, 1] if warm else [0])
    assert seconds == host > 0


def test_with_one_thread_other_processes_take_nothing(monkeypatch):
    """Time in which the process did not run is not counted, unless threads would be counted twice."""
    for name, step in (("process_time", 1.0), ("perf_counter", 100.0)):
        readings = itertools.count(0.0, step)
        monkeypatch.setattr(f"megactl.engine.bench.measure.time.{name}", lambda readings=readings: next(readings))
    for threads, seconds, name in ((1, 1.0, "CPU time of the process"), (2, 100.0, "wall time")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert clock_for(CPU).sample(Contestant("a", lambda _: None), warm=False) == (seconds, seconds)
        assert clock_name(CPU) == name


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        # Always a tenth slower while both get slower and slower: unpaired, their ranges overlap.
        ([1.1, 2.2, 3.3, 4.4, 5.5], [1, 2, 3, 4, 5], "slower"),
        ([1, 2, 3, 4, 5], [1.1, 2.2, 3.3, 4.4, 5.5], "faster"),
        ([1.01] * 5, [1.0] * 5, "equal"),
        ([1.5, 0.6, 1.4, 0.7, 1.2], [1.0] * 5, "equal"),
    ],
)
def test_verdict(one, other, verdict):
    assert compare(timing(*one), timing(*other)).verdict == verdict


def test_figures_of_a_timing():
    facts = timing(4.0, 1.0, 2.0, 3.0, 5.0).as_dict()
    assert facts["median_s"] == 3.0 and facts["min_s"] == 1.0 and facts["rounds"] == 5
    assert facts["spread"] == pytest.approx(1 / 3)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_sizes_are_those_of_the_presets():
    size = size_named("gpt-345m", "cuda")
    assert (size.batch, size.seq, size.hidden, size.heads, size.ffn, size.vocab, size.layers) == (16, 1024, 1024, 16, 4096, 50304, 24)
    assert size_named("gpt-345m", "cpu").tokens == 4096 and size_named("gpt-345m", "cpu", 1).batch == 1
    assert sum(torch.Size(shape).numel() for shape in size.layer_shapes) == 12 * 1024**2 + 13 * 1024
    with pytest.raises(ConfigError, match="gpt-nothing"):
        size_named("gpt-nothing", "cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", BUILT)
def test_each_operator_agrees_with_torch_and_is_timed(name, dtype):
    rows = run_operators(plan(name, dtypes=[dtype]))
    assert rows
    for row in rows:
        assert row.verdict in ("faster", "equal", "slower than torch"), (row.failures, row.errors)
        assert {OURS, COPY} < set(row.timings) and row.fastest_torch == row.fastest_eager
        assert not row.failures


def bytes_of(name, dtype):
    return {(row.variant, row.direction): row.bytes_moved for row in run_operators(plan(name, dtypes=[dtype]))}


def test_bytes_are_the_fewest_that_must_be_moved():
    n = 2 * 8 * 32
    assert bytes_of("dropout_add", "fp32") == {("", "forward"): 3 * 4 * n, ("", "backward"): 2 * 4 * n}
    parameters = sum(torch.Size(shape).numel() for shape in TINY.layer_shapes)
    # Master and both averages are read and written, the gradient is read; in bf16 the narrow copy is written, too.
    assert bytes_of("adamw_", "fp32") == {("", "in place"): 28 * parameters}
    assert bytes_of("adamw_", "bf16") == {("", "in place"): 30 * parameters}


def test_the_copy_moves_as_many_bytes():
    contestant = copy_of(800, CPU)
    target = contestant.run(None)
    assert 2 * target.numel() * target.element_size() == 800


def test_an_operator_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(ops, "adamw_", lambda *tensors, **settings: None)
    (row,) = run_operators(plan("adamw_"))
    assert row.verdict == "differs" and not row.timings
    assert min(row.errors.values()) > 1e-3


def test_an_operator_that_fails_does_not_stop_the_others(monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(ops, "adamw_", broken)
    reported = []
    rows = run_operators(plan("adamw_", "dropout_add"), reported.append)
    assert rows == reported and rows[0].verdict == "failed"
    assert rows[0].failures == {OURS: "RuntimeError: no such kernel"} and rows[1].timings


def test_an_operator_that_is_absent_is_listed(monkeypatch):
    monkeypatch.delattr(ops, "dropout_add")
    (row,) = run_operators(plan("dropout_add"))
    assert row.verdict == "not built" and not row.timings


def test_a_compiler_that_fails_is_shown_with_its_reason(monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    rows = run_operators(plan("dropout_add", compile=True))
    assert [row.failures for row in rows] == [{COMPILE: "RuntimeError: no C++ compiler found"}] * 2
    assert all(OURS in row.timings and COMPILE not in row.timings for row in rows)


def test_slower_than_eager_looks_at_eager_alone():
    (row, _) = run_operators(plan("dropout_add"))
    names = [name for name in row.timings if name not in (OURS, COPY)]
    row.timings = {OURS: timing(2, 2), names[0]: timing(3, 3), COMPILE: timing(1, 1), COPY: timing(1, 1)}
    assert not row.is_slower_than_eager and row.fastest_torch == COMPILE and row.speed_against(COMPILE) == 0.5
    row.timings[names[0]] = timing(1, 1)
    assert row.is_slower_than_eager
    assert row.as_dict()["slower_than_eager"] and row.gb_per_s(OURS) == pytest.approx(row.bytes_moved / 2e9)


def test_gradients_of_every_output_and_input_are_asked_for():
    x, y = (torch.randn(3, 4).requires_grad_() for _ in range(2))

    def function(x, y):
        return x * y, x + y

    forward, backward = differentiable(function, {"torch": function}, (x, y), forward=(1, ""), backward=(1, ""))
    outputs, seeds = backward.ours.prepare()
    gradients = backward.ours.run((outputs, seeds))
    torch.testing.assert_close(gradients[0], seeds[0] * y + seeds[1])
    assert disagreement(forward.ours.run(None), forward.peers[0].run(None)) == 0.0
    again = backward.peers[0].run(backward.peers[0].prepare())
    assert disagreement(gradients, again) == 0.0


def test_disagreement_sees_shapes_and_values_that_are_no_numbers():
    ones = torch.ones(4)
    assert disagreement(ones, ones * 2) == pytest.approx(0.5)
    assert disagreement(ones, torch.ones(2, 2)) == float("inf")
    assert disagreement(torch.full((4,), float("nan")), ones) == float("inf")


def test_the_cache_of_this_machine():
    size = cache_bytes(CPU)
    assert size is None or size > 2**15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", BUILT)
def test_each_operator_on_the_device(name):
    size, device = size_named("gpt-345m", "cuda", 1), torch.device("cuda")
    rows = run_operators(Plan([name], [size], ["bf16", "fp32"], device, seconds=0.05, compile=False))
    for row in rows:
        assert row.verdict in ("faster", "equal", "slower than torch"), (row.failures, row.errors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_clock_leaves_out_what_the_host_needs():
    import time

    x = torch.ones(2**20, device="cuda")

    def slow_host(_):
        time.sleep(0.002)
        return x + 1

    timings = interleave([Contestant("slow", slow_host), Contestant("fast", lambda _: x + 1)], clock_for(torch.device("cuda")), seconds=0.2)
    assert timings["slow"].median < 0.001 < timings["slow"].as_dict()["host_median_s"]
