//! The users and groups of this host, by `/etc/passwd` and `/etc/group`.
//!
//! Read by hand: the C library would load modules and speak with directory services to answer, which a confined daemon can
//! do without. Users and groups of such services are given by their numbers.

use std::fs;
use std::io;

/// A user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// The number of its own group; `None` if the user was given by a number that no name belongs to.
    pub gid: Option<u32>,
}

/// A user by name or number; `None` if there is none of that name.
///
/// # Errors
/// `/etc/passwd` cannot be read.
pub fn user(name: &str) -> io::Result<Option<User>> {
    Ok(find_user(&fs::read_to_string("/etc/passwd")?, name))
}

/// The number of a group, by name or number; `None` if there is none of that name.
///
/// # Errors
/// `/etc/group` cannot be read.
pub fn group(name: &str) -> io::Result<Option<u32>> {
    if let Ok(gid) = name.parse() {
        return Ok(Some(gid));
    }
    Ok(find_group(&fs::read_to_string("/etc/group")?, name))
}

/// A user in the text of `/etc/passwd`.
fn find_user(passwd: &str, name: &str) -> Option<User> {
    let number: Option<u32> = name.parse().ok();
    let parsed = passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (login, _) = (fields.next()?, fields.next()?);
        let uid: u32 = fields.next()?.parse().ok()?;
        let gid: u32 = fields.next()?.parse().ok()?;
        Some((login, uid, gid))
    });
    let mut found = parsed.filter(|(login, uid, _)| *login == name || number == Some(*uid));
    match (found.next(), number) {
        (Some((_, uid, gid)), _) => Some(User {
            uid,
            gid: Some(gid),
        }),
        (None, Some(uid)) => Some(User { uid, gid: None }),
        (None, None) => None,
    }
}

/// A group in the text of `/etc/group`.
fn find_group(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\n\nbroken:x\nvm:x:64055:106::/nonexistent:/bin/false\n";
        let vm = Some(User {
            uid: 64055,
            gid: Some(106),
        });
        assert_eq!(find_user(passwd, "vm"), vm);
        assert_eq!(find_user(passwd, "64055"), vm);
        let unnamed = Some(User { uid: 7, gid: None });
        assert_eq!(find_user(passwd, "7"), unnamed);
        assert_eq!(find_user(passwd, "v"), None);
        assert_eq!(find_user(passwd, "broken"), None);
        let groups = "root:x:0:\nkvm:x:106:vm,other\n";
        assert_eq!(find_group(groups, "kvm"), Some(106));
        assert_eq!(find_group(groups, "vm"), None);
    }
}
