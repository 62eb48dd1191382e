"""The two scanners: what they find in a line, that they agree, and that neither minds how its input is cut."""

from __future__ import annotations

import itertools
import math
import random
from array import array

import pytest
from log_samples import ERAS, LINES, TAIL, mutated_text

from megactl.report.logs.anchors import ANCHORS, Kind
from megactl.report.logs.python_records import parse_number
from megactl.report.logs.python_scanner import PythonScanner
from megactl.report.logs.records import VALUE_COLUMNS
from megactl.report.logs.scanning import Batch, make_scanner
from megactl.storage.native import native_module

CAP = 1 << 16


def needs_native():
    if native_module() is None:
        pytest.skip("megactl._native is not built")


@pytest.fixture(params=["native", "python"])
def scanner(request):
    """A function that makes scanners of one kind."""
    if request.param == "python":
        return PythonScanner
    needs_native()
    return make_scanner


def scan(scanner, text, pieces=None):
    """Everything found in `text`, fed whole or cut at `pieces`."""
    data = text.encode() if isinstance(text, str) else text
    cuts = [0, *sorted(pieces or []), len(data)]
    for start, end in itertools.pairwise(cuts):
        scanner.feed(memoryview(data)[start:end], end - start)
    scanner.finish()
    return Batch(*scanner.take())


def column(batch, name):
    code = {"iteration": "q", "total": "q", "line": "q", "interrupted": "b"}.get(name, "d")
    found = array(code)
    found.frombytes(getattr(batch, name) if code != "d" else batch.values[VALUE_COLUMNS.index(name)])
    return found.tolist()


def losses(batch):
    return {name: array("d", data).tolist() for name, data in batch.losses}


def timers(batch):
    return {name: (array("q", lines).tolist(), array("d", data).tolist()) for name, lines, data in batch.timers}


def one_value(batch, name):
    [value] = column(batch, name)
    return None if math.isnan(value) else value


@pytest.mark.parametrize("era", ERAS)
def test_an_iteration_line_of_each_era(scanner, era):
    text, iteration, total, seconds, loss, tflops = ERAS[era]
    batch = scan(scanner(CAP), f"{text}\n")
    assert (column(batch, "iteration"), column(batch, "total"), column(batch, "line")) == ([iteration], [total], [1])
    assert one_value(batch, "seconds") == pytest.approx(seconds, rel=1e-15) and one_value(batch, "tflops_logged") == tflops
    assert losses(batch).get("lm loss", [None]) == [loss]


def test_every_field_of_a_line(scanner):
    batch = scan(scanner(CAP), ERAS["2021-bert"][0] + "\n" + ERAS["bloom"][0] + "\n")
    assert losses(batch)["sop loss"][0] == 0.8174902 and math.isnan(losses(batch)["sop loss"][1])
    first = {name: column(batch, name)[0] for name in VALUE_COLUMNS}
    expected = {"learning_rate": 2.02e-08, "grad_norm": 217.199, "loss_scale": 32768.0, "global_batch": 4, "consumed_samples": 80,
                "skipped": 2, "nan": 0, "params_norm": 231.044, "num_zeros": 12}  # fmt: skip
    assert {name: first[name] for name in expected} == expected
    assert column(batch, "samples_per_second")[1] == 19.463


def test_deepspeeds_placeholders_are_no_values(scanner):
    batch = scan(scanner(CAP), ERAS["deepspeed-3d"][0] + "\n")
    assert all(one_value(batch, name) is None for name in ("loss_scale", "grad_norm", "num_zeros"))
    real = scan(scanner(CAP), ERAS["2021"][0].replace("grad norm: 3.412", "grad norm: 0.000") + "\n")
    assert one_value(real, "grad_norm") == 0.0


def line(number, milliseconds="100.0", loss="5.0"):
    return f" iteration {number:8d}/     100 | elapsed time per iteration (ms): {milliseconds} | lm loss: {loss} | {TAIL}"


@pytest.mark.parametrize(
    "prefix", ["12: ", "[default7]:", "[rank3]: ", "worker-1: ", "\x1b[32m", "garbage without an end ", "[2024-01-01 00:00:00]"]
)
def test_what_launchers_put_before_a_line(scanner, prefix):
    assert column(scan(scanner(CAP), prefix + line(3) + "\x1b[0m\n"), "iteration") == [3]


def test_ranks_that_write_over_each_other(scanner):
    batch = scan(scanner(CAP), line(3) + line(4) + "[Rank 3] (after 4 iterations) memory (MB) | allocated: 1.0 |\n")
    assert column(batch, "iteration") == [3, 4]
    assert any(kinds & Kind.MEMORY for _, kinds, _ in batch.notes)


def test_a_number_that_was_cut_is_no_number(scanner):
    cut = " iteration 5/ 9 | elapsed time per iteration (ms): 3526.4 | lm loss: 9.81"
    for rest in ("", "\n", " iteration 6/ 9 | elapsed time per iteration (ms): 3000.0 | lm loss: 2.5 |\n"):
        found = losses(scan(scanner(CAP), cut + rest))
        assert math.isnan(found["lm loss"][0]) if "lm loss" in found else True
    assert column(scan(scanner(CAP), " iteration 5/ 9 | elapsed time per iteration (ms): 35"), "iteration") == []


def test_a_line_without_a_time_is_no_iteration(scanner):
    text = " iteration 5/ 9 | consumed samples: 3 | elapsed time per iteration (ms): fast |\n"
    text += "# iteration 5/ 9 | elapsed time per iteration (ms): 3.0 |\n"
    assert column(scan(scanner(CAP), text), "iteration") == []


def test_not_a_number_and_infinity(scanner):
    batch = scan(scanner(CAP), line(1, loss="nan") + "\n" + line(2, loss="-inf") + "\n" + line(3, loss="1e999") + "\n")
    found = losses(batch)["lm loss"]
    assert math.isnan(found[0]) and found[1:] == [-math.inf, math.inf]


def test_the_same_iteration_from_another_rank_counts_once(scanner):
    made = scanner(CAP)
    batch = scan(made, "\n".join([line(1), line(1, "101.0"), line(2, loss="4.0"), line(1), line(3, loss="3.0")]) + "\n")
    assert column(batch, "iteration") == [1, 2, 3] and made.duplicates == 2


def test_an_iteration_number_that_falls_is_noted(scanner):
    batch = scan(scanner(CAP), "\n".join([line(5), line(6, loss="4.0"), line(5, loss="4.5"), line(6, loss="4.2")]) + "\n")
    assert column(batch, "iteration") == [5, 6, 5, 6]
    assert [(number, kinds) for number, kinds, _ in batch.notes] == [(1, Kind.FIRST), (3, Kind.REWIND)]


def test_an_interruption_marks_the_next_line(scanner):
    text = f"{line(1)}\n  successfully saved checkpoint at iteration 1 to /x\n{line(2)}\n{line(3)}\n"
    assert column(scan(scanner(CAP), text), "interrupted") == [0, 1, 0]


def test_line_numbers_are_an_editors(scanner):
    text = f"a\r\nb\rc\n\n{line(1)}\n"
    assert column(scan(scanner(CAP), text), "line") == [4]


def test_a_long_line_is_read_up_to_the_cap(scanner):
    assert column(scan(scanner(200), "x" * 300 + line(1) + "\n" + line(2) + "\n"), "iteration") == [2]
    batch = scan(
        scanner(100),
        line(2)[:99] + "|" + "y" * 5000 + "|\n" + "z" * 999 + "\n" + " iteration 3/ 9 | elapsed time per iteration (ms): 1.0 |\n",
    )
    assert column(batch, "iteration") == [2, 3] and column(batch, "line") == [1, 3]


def test_timers_of_both_eras(scanner):
    text = (
        "time (ms) | forward-compute: 193.77 | batch generator: 25.27 | train/valid/test data iterators: 1.5\n"
        "(min, max) time across ranks (ms):\n    save-checkpoint ................................: (1234.56, 1240.01)\n"
        "[default0]:    forward-backward ...............................: 1809.42\n"
        "x max time across ranks (ms): load-checkpoint ................: 7.5\n"
    )
    assert timers(scan(scanner(CAP), text)) == {
        "forward-compute": ([1], [193.77]),
        "batch generator": ([1], [25.27]),
        "train/valid/test data iterators": ([1], [1.5]),
        "save-checkpoint": ([3], [1240.01]),
        "forward-backward": ([4], [1809.42]),
        "load-checkpoint": ([5], [7.5]),
    }


def test_timers_stop_at_what_is_none(scanner):
    text = "time (ms) | forward: 1.0 | optimizer: 2.0 iteration 5/ 10 | consumed samples: 3 | forward: 9.0\ntime (ms)\n"
    text += "time (ms) | a: 1.0 | b: 2.1"
    assert timers(scan(scanner(CAP), text)) == {"forward": ([1], [1.0]), "a": ([3], [1.0])}


def test_rows_of_timers_need_their_header(scanner):
    assert timers(scan(scanner(CAP), "    save-checkpoint ....................: (1.0, 2.0)\n")) == {}


def test_a_block_is_handed_over_up_to_its_end(scanner):
    text = "--- arguments ---\n  lr ....... 1\n--- end of arguments ---\n  seed ..... 2\n"
    notes = scan(scanner(CAP), text).notes
    assert [(number, bool(kinds & Kind.BLOCK)) for number, kinds, _ in notes] == [(1, False), (2, True), (3, True)]


def test_a_block_without_its_end_is_bounded(scanner):
    [anchor] = [anchor for anchor in ANCHORS if anchor.text == b"- arguments -"]
    notes = scan(scanner(CAP), "--- arguments ---\n" + "x\n" * (anchor.follow + 50)).notes
    assert len(notes) == anchor.follow + 1


@pytest.mark.parametrize(
    "text",
    ["1", "-1.5", "+2.", ".5", "1e5", "1.5E-05", "1e+22", "123456789012345678901234567890", "0.1", "8.7e-323", "1e-400", "1e400",
     "-0.0", "9007199254740993", "1.7976931348623157e308", "nan", "-NaN", "Infinity", "-inf", "0000000000000000000000001", "1" * 64,
     "3.14159265358979323846",
     "", ".", "+", "1e", "1e+", "--1", "0x10", "1_000", "1" * 65, "1.5 ", "in", "infinit", "1.2.3",
     "12345678", "1234567890123456", "0.00000012345678"],
)  # fmt: skip
def test_numbers_are_read_as_python_reads_them(text):
    needs_native()
    expected = parse_number(text.encode())
    for pad in ("", " "):
        batch = scan(make_scanner(CAP), f" iteration 1/ 1 | elapsed time per iteration (s): 1.0 | grad norm:{pad}{text} | {TAIL}\n")
        [got] = column(batch, "grad_norm")
        stripped = parse_number(text.strip().encode())
        assert got == stripped or (math.isnan(got) and (stripped is None or math.isnan(stripped)))
    assert expected is None or expected == float(text) or math.isnan(expected)


def test_random_numbers_are_read_as_python_reads_them():
    needs_native()
    draw = random.Random(7)
    texts = [f"{draw.uniform(-1, 1) * 10 ** draw.randrange(-300, 300):.{draw.randrange(20)}{draw.choice('eEfg')}}" for _ in range(3000)]
    texts = [text for text in texts if len(text) <= 64]
    lines = "".join(
        f" iteration {number}/ 1 | elapsed time per iteration (s): 1 | grad norm: {text} |\n" for number, text in enumerate(texts)
    )
    assert column(scan(make_scanner(CAP), lines), "grad_norm") == [float(text) for text in texts]


def test_both_scanners_find_the_same_however_the_text_is_cut():
    needs_native()
    for seed in range(12):
        text = mutated_text(250, seed)
        draw = random.Random(seed)
        cap = draw.choice((40, 200, CAP))
        expected = scan(PythonScanner(cap), text)
        assert scan(make_scanner(cap), text) == expected
        for scanner in (make_scanner, PythonScanner):
            cuts = [draw.randrange(len(text)) for _ in range(draw.choice((1, 30, 400)))]
            assert scan(scanner(cap), text, cuts) == expected


def test_only_the_timers_that_were_asked_for(scanner):
    text = (
        "time (ms) | forward: 1.0 | save-checkpoint: 20.0 | optimizer: 3.0\n"
        "time (ms) | forward: 1.0 | optimizer: 3.0\n"
        "(min, max) time across ranks (ms):\n    forward ......: (1.0, 2.0)\n    save-checkpoint ......: (3.0, 4.0)\n"
        "the timer save-checkpoint is not here\nsave-checkpoint: 5.0 | other: 1.0\n"
    )
    assert timers(scan(scanner(CAP, ["save-checkpoint", "load-checkpoint"]), text)) == {"save-checkpoint": ([1, 5], [20.0, 4.0])}
    assert timers(scan(scanner(CAP, []), text)) == {}
    assert set(timers(scan(scanner(CAP), text))) == {"forward", "save-checkpoint", "optimizer"}


def test_leaving_out_timers_changes_nothing_else():
    needs_native()
    wanted = ("save-checkpoint", "forward-compute")
    for seed in range(12):
        # An escape sequence inside a name hides it from the search for names, which is made on the text as it is.
        text = mutated_text(250, seed).replace(b"\x1b", b"")
        everything, some = scan(make_scanner(CAP), text), scan(make_scanner(CAP, wanted), text)
        assert some == scan(PythonScanner(CAP, wanted), text)
        one, other = (
            batch._replace(timers=[], notes=[(line, kinds & ~Kind.TIMER_LINE, note) for line, kinds, note in batch.notes])
            for batch in (some, everything)
        )
        assert one == other
        assert timers(some) == {name: found for name, found in timers(everything).items() if name in wanted}


def test_taking_in_between_changes_nothing(scanner):
    text = ("\n".join(LINES) + "\n").encode()
    whole, parts = scan(scanner(CAP), text), []
    made = scanner(CAP)
    for start in range(0, len(text), 100):
        piece = text[start : start + 100]
        made.feed(piece, len(piece))
        parts.append(Batch(*made.take()))
    made.finish()
    parts.append(Batch(*made.take()))
    assert b"".join(part.iteration for part in parts) == whole.iteration
    assert [note for part in parts for note in part.notes] == whole.notes


def test_anchors_fit_the_scanner():
    for anchor in ANCHORS:
        assert len(anchor.text) == 2 or len(anchor.text) >= 7, anchor
        assert b"\n" not in anchor.text and b"\r" not in anchor.text
    native = native_module()
    if native is not None:
        with pytest.raises(ValueError, match="2 bytes, or 7"):
            native.LogScanner([(b"short", 1, 0, b"")], b"", CAP)
        with pytest.raises(ValueError, match="cap = 0"):
            native.LogScanner([], b"", 0)
        with pytest.raises(ValueError, match="beyond the buffer"):
            native.LogScanner([], b"", 1).feed(b"abc", 4)
