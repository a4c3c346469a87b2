//! Commands on volumes: creating, changing, deleting, and what they take.

use stratablk_layers as layers;
use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::lifecycle::ResizeOptions;
use stratablk_layers::store::VolumeSource;
use stratablk_layers::units::SECTOR_BYTES;

use super::super::convert;
use super::super::error::{ApiError, Result};
use super::super::events::Happening;
use super::super::types::{
    ByteRange, Deleted, Import, ImportRequest, Job, JobOptions, Recovered, UsageList, Volume,
    VolumeChange, VolumeRequest, VolumeType,
};
use super::{Commands, absolute, check_reach};
use crate::confine::reach::Want;

impl Commands {
    /// Creates a volume.
    ///
    /// # Errors
    /// `Invalid`, `Exists`, `NotFound`, `NoSpace`, `Io`.
    pub fn create_volume(&self, request: VolumeRequest) -> Result<Volume> {
        let source = match (request.size_bytes, request.base, request.from) {
            (Some(bytes), None, None) => VolumeSource::Size(bytes),
            (None, Some(path), None) => {
                let path = absolute("base", path)?;
                check_reach("base", &path, Want::Read)?;
                VolumeSource::Base(path)
            }
            (None, None, Some(from)) => match from.snapshot {
                Some(snapshot) => VolumeSource::Snapshot {
                    volume: from.volume,
                    snapshot,
                },
                None => VolumeSource::Volume(from.volume),
            },
            _ => {
                return Err(ApiError::invalid(
                    "size_bytes",
                    "give exactly one of size_bytes, base and from",
                ));
            }
        };
        self.create_of(&request.name, &source, convert::kind(request.kind))
    }

    /// Creates a normal volume from a source that is known to be whole.
    ///
    /// # Errors
    /// `Invalid`, `Exists`, `NotFound`, `NoSpace`, `Io`.
    pub fn create(&self, name: &str, source: &VolumeSource) -> Result<Volume> {
        self.create_of(name, source, VolumeKind::Normal)
    }

    /// Creates a volume of any type.
    fn create_of(&self, name: &str, source: &VolumeSource, kind: VolumeKind) -> Result<Volume> {
        let info = self
            .store
            .create_volume_of(name, source, kind)
            .map_err(sized)?;
        tracing::info!(volume = %info.name, bytes = info.size_bytes, "created");
        self.events.tell(Happening::VolumeCreated {
            volume: info.name.clone(),
        });
        Ok(self.view(info))
    }

    /// Deletes a volume with its snapshots.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is attached.
    pub fn delete_volume(&self, name: &str) -> Result<Deleted> {
        if let Some(attachment) = self.attachments.view(name) {
            return Err(ApiError::busy(format!(
                "volume {name:?} is attached to {}; detach it first",
                attachment.socket
            )));
        }
        self.store.delete_volume(name)?;
        tracing::info!(volume = %name, "deleted");
        self.events.tell(Happening::VolumeDeleted {
            volume: name.to_owned(),
        });
        Ok(Deleted {
            deleted: name.to_owned(),
        })
    }

    /// Changes the type or the size of a volume.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`; `Busy` while it is in use (a larger size is possible then); `NoSpace`, `Io`.
    pub fn change_volume(&self, name: &str, change: VolumeChange) -> Result<Volume> {
        match (change.kind, change.size_bytes) {
            (Some(kind), None) => {
                for (field, given) in [("shrink", change.shrink), ("force", change.force)] {
                    if given {
                        return Err(ApiError::invalid(field, "only with size_bytes"));
                    }
                }
                self.set_type(name, kind)
            }
            (None, Some(bytes)) => {
                let options = ResizeOptions {
                    shrink: change.shrink,
                    force: change.force,
                };
                self.resize(name, bytes, options)
            }
            _ => Err(ApiError::invalid(
                "type",
                "give exactly one of type and size_bytes",
            )),
        }
    }

    /// Gives a volume another type.
    fn set_type(&self, name: &str, kind: VolumeType) -> Result<Volume> {
        self.check_at_rest(name)?;
        self.store
            .set_kind(name, convert::kind(kind))
            .map_err(|error| ApiError::from(error).renamed("kind", "type"))?;
        tracing::info!(volume = %name, %kind, "type changed");
        self.events.tell(Happening::VolumeTypeChanged {
            volume: name.to_owned(),
            kind,
        });
        self.volume(name)
    }

    /// Gives a volume another size, and tells its guest.
    fn resize(&self, name: &str, bytes: u64, options: ResizeOptions) -> Result<Volume> {
        let info = self.store.resize(name, bytes, options).map_err(sized)?;
        tracing::info!(volume = %name, bytes = info.size_bytes, "resized");
        self.attachments.notify_resize(name);
        self.events.tell(Happening::VolumeResized {
            volume: name.to_owned(),
            size_bytes: info.size_bytes,
        });
        Ok(self.view(info))
    }

    /// Makes a volume independent of all layers below its active one.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`; `Busy` if it is being flattened already.
    pub fn flatten(&self, name: &str, options: JobOptions) -> Result<Job> {
        super::jobs::check_rate(options.rate_bytes_per_s)?;
        // The job gets its limit before it begins.
        let _held = options.rate_bytes_per_s.map(|_| self.store.hold_new_jobs());
        let job = self.store.flatten(name)?;
        self.job_begun(job.id, options.rate_bytes_per_s)
    }

    /// Lets a volume that has failed take writes again, after what can be saved was saved.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it has not failed; `Busy` while it is in use; `NoSpace`, `Io` if the host fails again.
    pub fn recover(&self, name: &str) -> Result<Recovered> {
        self.check_at_rest(name)?;
        let report = self.store.recover_volume(name)?;
        tracing::warn!(
            volume = %name, cause = %report.cause, written = report.written_bytes,
            unreadable = report.unreadable_bytes, "recovered"
        );
        self.events.tell(Happening::VolumeRecovered {
            volume: name.to_owned(),
        });
        let unreadable = report.unreadable.iter().map(|range| ByteRange {
            offset: range.start.0.saturating_mul(SECTOR_BYTES),
            bytes: range.count.saturating_mul(SECTOR_BYTES),
        });
        Ok(Recovered {
            volume: name.to_owned(),
            unreadable: unreadable.collect(),
            cause: report.cause,
            written_bytes: report.written_bytes,
            unreadable_bytes: report.unreadable_bytes,
        })
    }

    /// Creates a volume with the content of an image, which a job copies.
    ///
    /// # Errors
    /// As `create_volume`.
    pub fn import(&self, request: ImportRequest) -> Result<Import> {
        super::jobs::check_rate(request.rate_bytes_per_s)?;
        let image = absolute("image", request.image)?;
        check_reach("image", &image, Want::Read)?;
        // The job gets its limit before it begins.
        let _held = request.rate_bytes_per_s.map(|_| self.store.hold_new_jobs());
        // The layers know an image only as the base that it is at first.
        let job = (self.store.import(&request.name, &image))
            .map_err(|error| ApiError::from(error).renamed("base", "image"))?;
        tracing::info!(volume = %request.name, image = %image.display(), "importing");
        self.events.tell(Happening::VolumeCreated {
            volume: request.name.clone(),
        });
        let job = self.job_begun(job.id, request.rate_bytes_per_s)?;
        Ok(Import {
            volume: self.volume(&request.name)?,
            job,
        })
    }

    /// What a volume, or each of them, takes on the host.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn usage(&self, volume: Option<&str>) -> Result<UsageList> {
        let volumes = self.store.usage(volume)?.into_iter();
        Ok(UsageList {
            volumes: volumes.map(convert::usage).collect(),
        })
    }

    /// Checks that no guest has started a volume.
    ///
    /// # Errors
    /// `Busy`.
    pub(super) fn check_at_rest(&self, name: &str) -> Result<()> {
        let running = self
            .attachments
            .view(name)
            .map_or(0, |attachment| attachment.rings_running);
        if running == 0 {
            return Ok(());
        }
        Err(ApiError::busy(format!(
            "volume {name:?} is used by a running guest; shut the guest down (or `stratablk volume detach {name}`) first"
        )))
    }
}

/// An error of the layers, which say "size" where the request says its unit as well.
fn sized(error: layers::Error) -> ApiError {
    match error {
        error @ layers::Error::Invalid { .. } => {
            ApiError::from(error).renamed("size", "size_bytes")
        }
        error => error.into(),
    }
}
