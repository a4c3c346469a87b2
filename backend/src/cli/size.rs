//! Sizes as people write and read them: powers of 1024.

/// The suffixes, each 1024 times the one before.
const SUFFIXES: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// The bytes that a size such as `10G`, `512MiB` or `4096` means.
///
/// # Errors
/// Words for a person who wrote something else.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| {
        "write a whole number of bytes, or one with K, M, G or T, such as 10G".to_owned()
    })?;
    let shift = shift_of(suffix)
        .ok_or_else(|| format!("unknown unit {suffix:?}; use K, M, G or T, such as 10G"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "more than 64 bits can count".to_owned())
}

/// A new size for something that has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    Exactly(u64),
    /// So many bytes more than now.
    More(u64),
}

/// The size that `10G` or `+10G` means.
///
/// # Errors
/// As [`parse`].
pub fn parse_new(text: &str) -> Result<NewSize, String> {
    match text.strip_prefix('+') {
        Some(more) => parse(more).map(NewSize::More),
        None => parse(text).map(NewSize::Exactly),
    }
}

/// Bytes a second; `None`: no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub Option<u64>);

/// The rate that `50M`, `50M/s` or `none` means.
///
/// # Errors
/// As [`parse`]; a rate of 0.
pub fn parse_rate(text: &str) -> Result<Rate, String> {
    if text == "none" {
        return Ok(Rate(None));
    }
    match parse(text.strip_suffix("/s").unwrap_or(text))? {
        0 => Err("with 0 bytes a second it would never end; pause the job instead".into()),
        rate => Ok(Rate(Some(rate))),
    }
}

/// By how many bits a suffix shifts: `G`, `g`, `GB` and `GiB` are all 30.
fn shift_of(suffix: &str) -> Option<u32> {
    let mut letters = suffix.chars();
    let Some(first) = letters.next() else {
        return Some(0);
    };
    if !matches!(letters.as_str(), "" | "B" | "iB" | "b" | "ib") {
        return None;
    }
    let first = first.to_ascii_uppercase();
    if first == 'B' {
        return letters.as_str().is_empty().then_some(0);
    }
    let index = SUFFIXES.iter().position(|s| *s == first)?;
    Some(10 * (u32::try_from(index).ok()? + 1))
}

/// A size in three or four characters and its unit: `4 KiB`, `1.5 GiB`, `10 GiB`.
pub fn show(bytes: u64) -> String {
    let mut unit = None;
    let (mut whole, mut rest) = (bytes, 0);
    for suffix in SUFFIXES {
        if whole < 1024 {
            break;
        }
        rest = whole % 1024;
        whole /= 1024;
        unit = Some(suffix);
    }
    let Some(unit) = unit else {
        return format!("{bytes} B");
    };
    // Rounded down, so that nothing is shown as larger than it is.
    let tenths = rest * 10 / 1024;
    if whole < 100 && tenths > 0 {
        format!("{whole}.{tenths} {unit}iB")
    } else {
        format!("{whole} {unit}iB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512B", 512),
            ("1k", 1 << 10),
            ("512M", 512 << 20),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("10GB", 10 << 30),
            ("1T", 1 << 40),
            ("15E", 15 << 60),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "1.5G",
            "10X",
            "10GG",
            "10 G",
            "16E",
            "99999999999999999999",
            "1BB",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn new_sizes_and_rates_are_read() {
        assert_eq!(parse_new("+1K"), Ok(NewSize::More(1024)));
        assert_eq!(parse_new("1K"), Ok(NewSize::Exactly(1024)));
        assert!(parse_new("++1").is_err());
        assert_eq!(parse_rate("1M/s"), Ok(Rate(Some(1 << 20))));
        assert_eq!(parse_rate("1M"), Ok(Rate(Some(1 << 20))));
        assert_eq!(parse_rate("none"), Ok(Rate(None)));
        assert!(parse_rate("0").is_err() && parse_rate("/s").is_err());
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(show(bytes), text);
        }
    }
}
