"""Can the alarms of the benchmark ring? Tests of what it says about figures and about the machine."""
import os
import subprocess
import sys
import unittest

from xml.etree import ElementTree

import host
import plot
import probes
from measure import Side, turns
from table import DIFFERENCE, VALUE, Row, Target, number, render, render_markdown


def row(a_values, b_values, target=Target(1.0, ""), **more):
    """A row with these figures."""
    return Row("case", "ours", "theirs", "op/s", target, a_values, b_values, **more)


def bound(value):
    """An upper bound."""
    return Target(value, "", at_most=True)


class Judgement(unittest.TestCase):
    """What the table says."""

    def test_canary_a_slow_back_end_is_below_its_target(self):
        self.assertEqual(row([90, 91, 92], [100, 100, 100]).verdict(), "BELOW")

    def test_a_fast_one_passes(self):
        self.assertEqual(row([100, 101, 99], [100, 100, 100]).verdict(), "PASS")

    def test_without_a_target_nothing_is_judged(self):
        self.assertEqual(row([1], [2], target=None).verdict(), "")

    def test_only_figures_of_one_pair_are_compared(self):
        # The machine became twice as slow between the pairs; the ratio did not change.
        drifting = row([200, 100, 50], [100, 50, 25])
        self.assertEqual(drifting.outcomes(), [2, 2, 2])

    def test_one_wild_pair_does_not_decide(self):
        self.assertEqual(row([300, 90, 90], [100, 100, 100]).verdict(), "BELOW")

    def test_the_table_shows_spread_and_verdict(self):
        lines = render([row([90, 110, 120], [100, 100, 100])]).splitlines()
        self.assertIn("1.10", lines[2])
        self.assertIn("0.90..1.20", lines[2])
        self.assertRegex(lines[2], r">= 1 +PASS$")

    def test_canary_an_upper_bound_that_is_exceeded_is_seen(self):
        slow = row([40, 41, 42], [100, 100, 100], bound(0.4))
        self.assertEqual((slow.verdict(), slow.is_missed()), ("ABOVE", True))
        self.assertRegex(render([slow]).splitlines()[2], r"<= 0.4 +ABOVE$")
        self.assertIn("**ABOVE**", render_markdown([slow]))

    def test_an_upper_bound_that_is_kept_passes(self):
        fast = row([39, 41, 38], [100, 100, 100], bound(0.4))
        self.assertEqual((fast.verdict(), fast.is_missed()), ("PASS", False))

    def test_differences_are_taken_within_rounds(self):
        gaps = row([5.0, 9.0, 3.0], [4.0, 8.0, 1.0], bound(2), kind=DIFFERENCE)
        self.assertEqual(gaps.outcomes(), [1, 1, 2])
        self.assertEqual(gaps.verdict(), "PASS")
        self.assertEqual(row([9.0], [4.0], bound(2), kind=DIFFERENCE).verdict(), "ABOVE")

    def test_a_value_is_judged_alone(self):
        self.assertEqual(row([0.04, 0.06, 0.05], [], bound(0.05), kind=VALUE).verdict(), "PASS")
        self.assertEqual(row([0.89], [], Target(0.9, ""), kind=VALUE).verdict(), "BELOW")

    def test_every_side_is_first_in_turn_and_followers_follow(self):
        sides = [Side("a", None), Side("b", None), Side("c", None), Side("after a", None, follows=0)]
        self.assertEqual([list(turns(sides, pair)) for pair in range(3)], [[0, 3, 1, 2], [1, 2, 0, 3], [2, 0, 3, 1]])

    def test_numbers_are_short(self):
        self.assertEqual([number(value) for value in (0.0123, 12, 9999, 12345, 345678, 1234567, 4e9, -12345)],
                         ["0.0123", "12", "9999", "12.3k", "346k", "1.2M", "4.0G", "-12.3k"])


class Counters(unittest.TestCase):
    """What tools and the kernel report."""

    def test_counts_of_system_calls_are_read(self):
        perf = "# started on Mon\n\n4711,,raw_syscalls:sys_enter,1000,100.00,,\n"
        strace = ("% time     seconds  usecs/call     calls    errors syscall\n"
                  " 60.00    0.001000           1       900           preadv\n"
                  "100.00    0.002000           1      1000         5 total\n")
        self.assertEqual(probes.parse_count("perf", perf), 4711)
        self.assertEqual(probes.parse_count("strace", strace), 1000)
        self.assertIsNone(probes.parse_count("perf", "<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n"))

    def test_cpu_time_of_a_process_grows_as_it_works(self):
        before = probes.cpu_nanoseconds(os.getpid())
        while probes.cpu_nanoseconds(os.getpid()) == before:
            pass
        self.assertGreater(probes.resident_bytes(os.getpid()), 1 << 20)


class Plots(unittest.TestCase):
    """What is drawn."""

    def points(self, svg):
        """The lines of a plot, as lists of coordinates."""
        lines = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
        return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines]

    def test_more_is_higher_and_later_is_further_right(self):
        line, = self.points(plot.chart("t < u & v", "x", "y", [("a", [(1, 10), (10, 1000), (100, 10000)])], True, True))
        self.assertEqual(sorted(line), line)
        self.assertEqual(sorted((y for _, y in line), reverse=True), [y for _, y in line])

    def test_what_was_measured_is_drawn(self):
        def side(label, *rates):
            return {"label": label, "reports": [{
                "iops": rate, "latency_histogram": [[1000, 3], [2000, 1]],
                "timeline": {"slice_seconds": 0.01, "operations": [5, 6, 0, 7]}} for rate in rates]}

        records = [
            {"group": "chain", "case": "read 4K QD32, depth 8", "sides": [side("a depth 8", 3, 5), side("b depth 8", 1)]},
            {"group": "depth", "case": "read 4K QD32, half in the layers", "sides": [side("a depth 1000", 4)]},
            {"group": "hot", "case": "read 4K QD1", "sides": [side("a", 1), side("b", 1)]},
            {"group": "timeline", "case": "write", "sides": [side("a", 1)]},
        ]
        self.assertEqual([len(line) for line in self.points(plot.depth_plot(records))], [2, 1])
        self.assertEqual([len(line) for line in self.points(plot.latency_plot(records, "read 4K QD1"))], [2, 2])
        self.assertEqual([len(line) for line in self.points(plot.timeline_plot(records))], [3])
        self.assertEqual(plot.merged_histogram(records[2]["sides"][0]["reports"]), [(1, 75), (2, 25)])
        self.assertIsNone(plot.latency_plot(records, "no such case"))


class Machine(unittest.TestCase):
    """What is said about the machine."""

    def test_an_idle_machine_is_fit(self):
        self.assertEqual(host.why_busy(0.01, 0.0, 0.1, 2), [])

    def test_canary_others_steal_and_load_are_noticed(self):
        self.assertEqual(len(host.why_busy(0.5, 0.2, 3.0, 2)), 3)

    def test_canary_a_foreign_process_is_seen_and_ours_is_not(self):
        spin = [sys.executable, "-c", "while True: pass"]
        with subprocess.Popen(spin) as process:
            try:
                foreign, ours = host.Watch([]), host.Watch([process.pid])
                foreign.start()
                ours.start()
                host.heaviest(seconds=0.5)
                share = foreign.stop()[0] - ours.stop()[0]
            finally:
                process.kill()
        # It had at least a fifth of one CPU, on however many there are.
        self.assertGreater(share * os.cpu_count(), 0.2)


if __name__ == "__main__":
    unittest.main()
