//! Names of groups. The name that all snapshots of one instant share says how many there are, so that a group of which some are
//! gone is not taken for a whole one.

use uuid::{Builder, Uuid, Version};

/// The name of a group of so many snapshots, made of a random one: a UUID of version 8 (RFC 9562, 5.8) whose last two bytes are
/// their number, little-endian; 0 where that is not known.
pub(crate) fn name_of(random: Uuid, members: usize) -> Uuid {
    let mut bytes = random.into_bytes();
    if let Some(last) = bytes.last_chunk_mut() {
        *last = u16::try_from(members).unwrap_or(0).to_le_bytes();
    }
    Builder::from_custom_bytes(bytes).into_uuid()
}

/// How many snapshots a group has had from the start, if its name says so.
pub(crate) fn members(group: Uuid) -> Option<usize> {
    if group.get_version() != Some(Version::Custom) {
        return None;
    }
    let members = u16::from_le_bytes(*group.as_bytes().last_chunk()?);
    (members > 0).then_some(usize::from(members))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_how_many_there_are() {
        let random = Uuid::from_u128(0x1234_5678_9abc_4def_8fff_ffff_ffff_ffff);
        for count in [1, 2, 300, 65_535] {
            let name = name_of(random, count);
            assert_eq!(members(name), Some(count));
            assert_ne!(name, random);
        }
        assert_eq!(members(name_of(random, 65_536)), None, "too many to say");
        assert_eq!(members(random), None, "an older name");
        assert_eq!(members(Uuid::nil()), None);
    }
}
