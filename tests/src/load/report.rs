//! What a run showed, as one line for people or one JSON document for programs.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::run::Measurement;

/// The upper end of the first step of the histogram in a report.
const HISTOGRAM_FIRST_NS: u64 = 100;
/// How much wider each step is than the one before: fine enough to draw, coarse enough to keep.
const HISTOGRAM_STEP: f64 = 1.1;

/// The result of `stratablk-load`. Latencies in nanoseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Operations that completed.
    pub operations: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Of these, writes; with flushes, a write and its flush are one.
    pub writes: u64,
    /// The time it took.
    pub seconds: f64,
    /// Operations a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// The arithmetic mean.
    pub latency_ns_mean: f64,
    /// Half were at most this.
    pub latency_ns_p50: u64,
    /// 9 in 10 were at most this.
    pub latency_ns_p90: u64,
    /// 99 in 100 were at most this.
    pub latency_ns_p99: u64,
    /// 999 in 1000 were at most this.
    pub latency_ns_p999: u64,
    /// The longest.
    pub latency_ns_max: u64,
    /// The longest time between two completions.
    pub gap_ns_max: u64,
    /// CPU time of the back-end in user mode.
    pub server_user_seconds: Option<f64>,
    /// CPU time of the back-end in the kernel.
    pub server_system_seconds: Option<f64>,
    /// Stamped blocks whose content was checked.
    pub verified_blocks: u64,
    /// The latencies as pairs: at most so many nanoseconds (and more than the pair before), so many operations.
    pub latency_histogram: Vec<(u64, u64)>,
    /// Completions by time, if that was asked for.
    pub timeline: Option<TimelineReport>,
    /// Everything random follows from it.
    pub seed: u64,
}

/// Completions by time.
#[derive(Clone, Debug, Serialize)]
pub struct TimelineReport {
    /// The length of a slice in seconds.
    pub slice_seconds: f64,
    /// Operations that completed in each slice.
    pub operations: Vec<u64>,
}

impl Report {
    /// Of a measurement with requests of `block_bytes`, and the blocks that were checked after it.
    pub fn new(measurement: &Measurement, block_bytes: u64, swept_blocks: u64, seed: u64) -> Self {
        let operations = measurement.reads + measurement.writes;
        let seconds = measurement.elapsed.as_secs_f64();
        let rate = |count: u64| {
            if seconds > 0.0 {
                as_f64(count) / seconds
            } else {
                0.0
            }
        };
        let latency = &measurement.latency;
        Self {
            operations,
            reads: measurement.reads,
            writes: measurement.writes,
            seconds,
            iops: rate(operations),
            bytes_per_second: rate(operations.saturating_mul(block_bytes)),
            latency_ns_mean: latency.mean(),
            latency_ns_p50: latency.value_at_quantile(0.5),
            latency_ns_p90: latency.value_at_quantile(0.9),
            latency_ns_p99: latency.value_at_quantile(0.99),
            latency_ns_p999: latency.value_at_quantile(0.999),
            latency_ns_max: latency.max(),
            gap_ns_max: u64::try_from(measurement.gap_max.as_nanos()).unwrap_or(u64::MAX),
            server_user_seconds: measurement.server.map(|time| time.user.as_secs_f64()),
            server_system_seconds: measurement.server.map(|time| time.system.as_secs_f64()),
            verified_blocks: measurement.verified_blocks + swept_blocks,
            latency_histogram: latency
                .iter_log(HISTOGRAM_FIRST_NS, HISTOGRAM_STEP)
                .filter(|step| step.count_since_last_iteration() > 0)
                .map(|step| (step.value_iterated_to(), step.count_since_last_iteration()))
                .collect(),
            timeline: measurement
                .timeline
                .as_ref()
                .map(|timeline| TimelineReport {
                    slice_seconds: timeline.slice().as_secs_f64(),
                    operations: timeline.counts().to_vec(),
                }),
            seed,
        }
    }
}

/// For rates, where the last bits do not matter.
#[expect(
    clippy::cast_precision_loss,
    reason = "rates of counts beyond 2^53 need no more precision"
)]
fn as_f64(count: u64) -> f64 {
    count as f64
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let latency = Duration::from_nanos;
        write!(
            f,
            "{} operations in {:.2} s: {:.0} a second, {:.1} MiB/s; latency p50 {:?} p99 {:?} p99.9 {:?} max {:?}; \
             longest gap {:?}",
            self.operations,
            self.seconds,
            self.iops,
            self.bytes_per_second / f64::from(1 << 20),
            latency(self.latency_ns_p50),
            latency(self.latency_ns_p99),
            latency(self.latency_ns_p999),
            latency(self.latency_ns_max),
            latency(self.gap_ns_max),
        )?;
        if let (Some(user), Some(system)) = (self.server_user_seconds, self.server_system_seconds) {
            write!(f, "; back-end CPU {user:.2} s user, {system:.2} s system")?;
        }
        if self.verified_blocks > 0 {
            write!(f, "; {} stamped blocks verified", self.verified_blocks)?;
        }
        write!(f, "; seed {}", self.seed)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use hdrhistogram::Histogram;

    use super::*;

    #[test]
    fn rates_follow_from_counts_and_time() {
        let mut latency = Histogram::new_with_bounds(1, 1_000_000, 3).unwrap();
        for nanoseconds in 1..=1000 {
            latency.record(nanoseconds * 100).unwrap();
        }
        let measurement = Measurement {
            reads: 600,
            writes: 400,
            elapsed: Duration::from_millis(500),
            latency,
            gap_max: Duration::from_micros(7),
            server: None,
            verified_blocks: 5,
            timeline: None,
        };
        let report = Report::new(&measurement, 4096, 10, 1);
        assert!((report.iops - 2000.0).abs() < 1e-6);
        assert!((report.bytes_per_second - 8_192_000.0).abs() < 1e-3);
        assert!(
            (49_900..=50_100).contains(&report.latency_ns_p50),
            "{}",
            report.latency_ns_p50
        );
        assert!(
            (98_900..=99_200).contains(&report.latency_ns_p99),
            "{}",
            report.latency_ns_p99
        );
        assert_eq!(report.verified_blocks, 15);
        let counted: u64 = report
            .latency_histogram
            .iter()
            .map(|(_, count)| count)
            .sum();
        assert_eq!(counted, 1000);
        assert!(
            report
                .to_string()
                .starts_with("1000 operations in 0.50 s: 2000 a second")
        );
    }
}
