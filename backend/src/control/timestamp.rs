//! An instant as the control API shows it: RFC 3339 in UTC with nanoseconds, which sorts as text and loses nothing in
//! JSON (a count of nanoseconds since 1970 no longer fits the numbers of many JSON readers).

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Seconds of a day.
const DAY_S: u64 = 86_400;
/// Nanoseconds of a second.
const SECOND_NS: u64 = 1_000_000_000;

/// Nanoseconds since the start of 1970, UTC. Every `u64` is a valid instant (the last is in 2554).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The time of the host's clock.
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }
}

/// Year, month (1 to 12) and day (1 to 31) of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Counts in eras of 400 years (146,097 days) that begin on 1 March of a year divisible by 400, so that the leap day is the
/// last of its year.
fn date_of(day: u64) -> (u64, u64, u64) {
    let shifted = day + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (
        era * 400 + year_of_era + u64::from(month <= 2),
        month,
        day_of_month,
    )
}

/// The reverse of [`date_of`], or `None` for a date before 1970 or one that the calendar does not have.
fn day_of(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1970..=2600).contains(&year) || !(1..=12).contains(&month) || day == 0 {
        return None;
    }
    let march_year = year - u64::from(month <= 2);
    let year_of_era = march_year % 400;
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let since_1970 = (march_year / 400 * 146_097 + day_of_era).checked_sub(719_468)?;
    // A day past the end of its month comes back as another date.
    (date_of(since_1970) == (year, month, day)).then_some(since_1970)
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 / SECOND_NS;
        let (year, month, day) = date_of(seconds / DAY_S);
        let of_day = seconds % DAY_S;
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        let nanos = self.0 % SECOND_NS;
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z"
        )
    }
}

/// A text that is not an instant in the form that [`Timestamp`] prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a time such as 2026-01-31T12:00:00.000000000Z")]
pub struct NotATimestamp;

impl FromStr for Timestamp {
    type Err = NotATimestamp;

    fn from_str(text: &str) -> Result<Self, NotATimestamp> {
        let (date, rest) = text.split_once('T').ok_or(NotATimestamp)?;
        let (time, nanos) = rest
            .strip_suffix('Z')
            .and_then(|r| r.split_once('.'))
            .ok_or(NotATimestamp)?;
        let numbers = |part: &str, separator: char, widths: [usize; 3]| {
            let mut parts = part.split(separator);
            let mut out = [0u64; 3];
            for (slot, width) in out.iter_mut().zip(widths) {
                *slot = number(parts.next()?, width)?;
            }
            parts.next().is_none().then_some(out)
        };
        let parsed = || {
            let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
            let [hour, minute, second] = numbers(time, ':', [2, 2, 2])?;
            let nanos = number(nanos, 9)?;
            if hour > 23 || minute > 59 || second > 59 {
                return None;
            }
            let seconds = day_of(year, month, day)? * DAY_S + hour * 3600 + minute * 60 + second;
            seconds.checked_mul(SECOND_NS)?.checked_add(nanos)
        };
        parsed().map(Self).ok_or(NotATimestamp)
    }
}

/// A number of exactly `width` digits.
fn number(text: &str, width: usize) -> Option<u64> {
    (text.len() == width && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_instants_print_as_the_calendar_says() {
        for (ns, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400_000_000_001, "2000-02-29T00:00:00.000000001Z"),
            (1_709_251_199_999_999_999, "2024-02-29T23:59:59.999999999Z"),
            (1_735_689_600_000_000_000, "2025-01-01T00:00:00.000000000Z"),
            (u64::MAX, "2554-07-21T23:34:33.709551615Z"),
        ] {
            assert_eq!(Timestamp(ns).to_string(), text);
            assert_eq!(text.parse(), Ok(Timestamp(ns)));
        }
    }

    #[test]
    fn every_day_of_four_centuries_comes_back() {
        for day in 0..4 * 36_525 {
            let (year, month, dom) = date_of(day);
            assert_eq!(day_of(year, month, dom), Some(day), "{year}-{month}-{dom}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "2025-01-01",
            "2025-02-30T00:00:00.000000000Z",
            "2025-13-01T00:00:00.000000000Z",
            "2025-01-01T24:00:00.000000000Z",
            "2025-01-01T00:00:00.0Z",
            "2025-01-01T00:00:00.000000000",
            "2025-+1-01T00:00:00.000000000Z",
            "2599-01-01T00:00:00.000000000Z",
        ] {
            assert_eq!(text.parse::<Timestamp>(), Err(NotATimestamp), "{text}");
        }
    }
}
