//! The two bitmaps of a map, and the bytes of a whole new map file.

use super::header::{CheckpointPlace, Header, LayerKind, MapHeader};
use super::{Encoder, FormatError};
use crate::map::set::SectorSet;

/// The bytes of a map file that holds `set`: header, checkpoint, padding, and an empty journal. A raw base has no
/// checkpoint, whatever `set` is.
///
/// # Errors
/// What in the header's values cannot be written.
pub fn encode(
    map: &MapHeader,
    incarnation: u64,
    set: &SectorSet,
) -> Result<(Header, Vec<u8>), FormatError> {
    let (data, zero) = match map.kind {
        LayerKind::Differencing => set.to_portable(),
        LayerKind::RawBase(_) => (Vec::new(), Vec::new()),
    };
    let header = Header {
        map: map.clone(),
        incarnation,
        checkpoint: CheckpointPlace::of(&data, &zero),
    };
    let len = usize::try_from(header.checkpoint.journal_offset())
        .map_err(|_| FormatError::corrupt(0, "a checkpoint longer than the memory"))?;
    let mut out = Encoder(header.encode()?);
    out.put(out.0.len(), &data);
    out.put(out.0.len(), &zero);
    Ok((header, out.finish(len)))
}

/// The set that a checkpoint holds. `bytes` are those from the checkpoint's offset to the journal's.
///
/// # Errors
/// `Corrupt`, with the place.
pub fn decode(header: &Header, bytes: &[u8]) -> Result<SectorSet, FormatError> {
    let place = &header.checkpoint;
    let parts = usize::try_from(place.data_len)
        .ok()
        .and_then(|len| bytes.split_at_checked(len))
        .zip(usize::try_from(place.zero_len).ok())
        .and_then(|((data, rest), len)| {
            rest.split_at_checked(len)
                .map(|(zero, rest)| (data, zero, rest))
        });
    let Some((data, zero, padding)) = parts else {
        return Err(cut_off(header, place.offset() + bytes.len() as u64));
    };
    let at_data = place.offset();
    let at_zero = at_data + place.data_len;
    for (what, bytes, at, stored) in [
        ("data", data, at_data, place.data_crc),
        ("zero", zero, at_zero, place.zero_crc),
    ] {
        let computed = crc32c::crc32c(bytes);
        if computed != stored {
            return Err(FormatError::corrupt(
                at,
                format!(
                    "the checkpoint's {what} bitmap ({} bytes) has checksum {computed:#010x}, the header says {stored:#010x}",
                    bytes.len()
                ),
            ));
        }
    }
    if padding.iter().any(|byte| *byte != 0) {
        return Err(FormatError::corrupt(
            at_zero + place.zero_len,
            "bytes other than zero between the checkpoint and the journal",
        ));
    }
    if matches!(header.map.kind, LayerKind::RawBase(_)) {
        return Ok(SectorSet::everything(header.map.size));
    }
    let set = SectorSet::from_portable(data, zero).map_err(|what| {
        FormatError::corrupt(at_data, format!("the checkpoint's bitmaps: {what}"))
    })?;
    let end = header.map.sectors_end();
    for (what, last, at) in [
        ("data", set.data_runs().last(), at_data),
        ("zero", set.zero_runs().last(), at_zero),
    ] {
        let believed = crate::canary::is_set(crate::canary::Canary::BelieveCheckpoint);
        if let Some(last) = last.filter(|last| last.end().0 > end && !believed) {
            return Err(FormatError::corrupt(
                at,
                format!(
                    "the checkpoint's {what} bitmap reaches to sector {}, the disk has {}",
                    last.end(),
                    header.map.size
                ),
            ));
        }
    }
    Ok(set)
}

/// The file ends before its checkpoint does.
pub(crate) fn cut_off(header: &Header, len: u64) -> FormatError {
    FormatError::corrupt(
        len,
        format!(
            "the file ends inside of its checkpoint, which reaches to byte {}",
            header.checkpoint.end()
        ),
    )
}
