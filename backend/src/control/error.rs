//! Why a control command was refused or failed: the errors of the layers and of attaching, as status codes and words.

use std::io;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use stratablk_layers as layers;

use super::types::{ErrorBody, ErrorDetail, ErrorKind};

/// The result of a control command.
pub type Result<T, E = ApiError> = std::result::Result<T, E>;

/// A refusal or failure as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", detail.message)]
pub struct ApiError {
    /// The status code of the reply.
    pub status: StatusCode,
    /// The body of the reply.
    pub detail: ErrorDetail,
}

impl ApiError {
    /// An error without a field.
    pub fn new(status: StatusCode, kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            status,
            detail: ErrorDetail {
                kind,
                field: None,
                message: message.into(),
            },
        }
    }

    /// A field of the request that cannot be as it is.
    pub fn invalid(field: &str, what: impl AsRef<str>) -> Self {
        let message = format!("{field}: {}", what.as_ref());
        Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            ErrorKind::Invalid,
            message,
        )
        .of(field)
    }

    /// Something else is in the way.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, ErrorKind::Busy, message)
    }

    /// The daemon is overloaded or about to exit.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Unavailable,
            message,
        )
    }

    /// A fault of the daemon itself.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            ErrorKind::Internal,
            message,
        )
    }

    /// The same error, about this field.
    pub fn of(mut self, field: &str) -> Self {
        self.detail.field = Some(field.to_owned());
        self
    }

    /// An error of the layers about a field of theirs, as one about the field of the request that it came from.
    pub fn renamed(mut self, theirs: &str, ours: &str) -> Self {
        if self.detail.field.as_deref() != Some(theirs) || self.detail.kind != ErrorKind::Invalid {
            return self;
        }
        let message = &self.detail.message;
        let rest = message
            .strip_prefix(theirs)
            .and_then(|rest| rest.strip_prefix(": "));
        if let Some(rest) = rest {
            self.detail.message = format!("{ours}: {rest}");
        }
        self.of(ours)
    }
}

impl From<layers::Error> for ApiError {
    fn from(error: layers::Error) -> Self {
        use layers::Error as E;

        let message = error.to_string();
        let failed = |kind| Self::new(StatusCode::INTERNAL_SERVER_ERROR, kind, message.clone());
        match error {
            E::Invalid { field, .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                ErrorKind::Invalid,
                message,
            )
            .of(field),
            E::NotFound { kind, .. } => {
                Self::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, message).of(kind)
            }
            E::Exists { .. } => {
                Self::new(StatusCode::CONFLICT, ErrorKind::Exists, message).of("name")
            }
            E::Busy { .. } => Self::busy(message),
            E::BaseChanged { .. } => {
                Self::new(StatusCode::CONFLICT, ErrorKind::BaseChanged, message)
            }
            E::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                ErrorKind::NoSpace,
                message,
            ),
            E::Io { .. } | E::Catalog { .. } => failed(ErrorKind::Io),
            E::Corrupt { .. } => failed(ErrorKind::Corrupt),
            E::Unsupported { .. } => failed(ErrorKind::Unsupported),
            E::Failed { .. } => failed(ErrorKind::Failed),
            _ => failed(ErrorKind::Internal),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, axum::Json(ErrorBody { error: self.detail })).into_response()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_field_of_the_layers_is_told_by_the_name_it_has_in_the_request() {
        let invalid = || {
            ApiError::from(layers::Error::Invalid {
                field: "kind",
                what: "odd".into(),
            })
        };
        let renamed = invalid().renamed("kind", "type");
        assert_eq!(renamed.detail.field.as_deref(), Some("type"));
        assert_eq!(renamed.detail.message, "type: odd");
        assert_eq!(invalid().renamed("name", "as"), invalid());
    }

    #[test]
    fn each_kind_of_error_has_its_status() {
        let io = |kind: io::ErrorKind| layers::Error::Io {
            op: "create",
            path: PathBuf::from("/x"),
            source: kind.into(),
        };
        let cases = [
            (
                layers::Error::Invalid {
                    field: "size_bytes",
                    what: "odd".into(),
                },
                422,
                ErrorKind::Invalid,
                Some("size_bytes"),
            ),
            (
                layers::Error::NotFound {
                    kind: "volume",
                    name: "web".into(),
                },
                404,
                ErrorKind::NotFound,
                Some("volume"),
            ),
            (
                layers::Error::Exists {
                    kind: "volume",
                    name: "web".into(),
                },
                409,
                ErrorKind::Exists,
                Some("name"),
            ),
            (
                layers::Error::Busy {
                    what: "held".into(),
                },
                409,
                ErrorKind::Busy,
                None,
            ),
            (
                io(io::ErrorKind::StorageFull),
                507,
                ErrorKind::NoSpace,
                None,
            ),
            (io(io::ErrorKind::NotFound), 500, ErrorKind::Io, None),
        ];
        for (error, status, kind, field) in cases {
            let message = error.to_string();
            let api = ApiError::from(error);
            assert_eq!(api.status.as_u16(), status, "{message}");
            assert_eq!(api.detail.kind, kind, "{message}");
            assert_eq!(api.detail.field.as_deref(), field, "{message}");
            assert_eq!(api.detail.message, message);
        }
    }
}
