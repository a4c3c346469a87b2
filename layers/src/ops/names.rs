//! Which names volumes and snapshots may have.

use crate::error::{Error, Result};
use crate::limits::NAME_BYTES_MAX;

/// Refuses a name that scripts, paths or `VOLUME@SNAPSHOT` could stumble over.
///
/// # Errors
/// `Invalid`, with what is allowed.
pub fn check(field: &'static str, name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    let starts_well = name
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    if fits && starts_well && name.chars().all(allowed) {
        return Ok(());
    }
    Err(Error::Invalid {
        field,
        what: format!(
            "{name:?} cannot be used; take 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes or underscores, \
             starting with a letter, digit or underscore"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn names_that_scripts_can_rely_on() {
        for good in ["a", "web-1", "Db_2.old", "0", "_x", &"n".repeat(64)] {
            assert!(check("name", good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-x",
            ".x",
            "a/b",
            "a@b",
            "a b",
            "a\nb",
            "\u{e4}",
            &"n".repeat(65),
        ] {
            assert!(check("name", bad).is_err(), "{bad}");
        }
    }
}
