"""Can the alarms of the benchmark ring? Tests of what it says about figures and about the machine."""
import os
import subprocess
import sys
import unittest

import host
from table import Row, Target, number, render


def row(a_rates, b_rates, target=Target(1.0, "")):
    """A row with these rates."""
    return Row("case", "ours", "theirs", "op/s", target, a_rates, b_rates)


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
        self.assertEqual(drifting.ratios(), [2, 2, 2])

    def test_one_wild_pair_does_not_decide(self):
        self.assertEqual(row([300, 90, 90], [100, 100, 100]).verdict(), "BELOW")

    def test_the_table_shows_spread_and_verdict(self):
        lines = render([row([90, 110, 120], [100, 100, 100])]).splitlines()
        self.assertIn("1.10", lines[2])
        self.assertIn("0.90..1.20", lines[2])
        self.assertIn("PASS (>= 1)", lines[2])

    def test_numbers_are_short(self):
        self.assertEqual([number(value) for value in (12, 9999, 12345, 345678, 1234567, 4e9)],
                         ["12", "9999", "12.3k", "346k", "1.2M", "4.0G"])


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
