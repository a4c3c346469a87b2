//! Merging layers while disks are in use. See `docs/decisions/0008-merging-in-place.md`.
