//! What every write passes after it was authorized and before it is stored: plug-ins that fill in and plug-ins that refuse.
//!
//! The API service calls [`Admission::mutate`], applies schema and strategy, then calls [`Admission::validate`]; or
//! [`Admission::admit`] where nothing lies between (deletes, connects).
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`request`] | [`Request`], [`Operation`] |

pub mod request;

pub use request::{Operation, Request, Warnings};

use crate::apiserver::status::Status;

/// The chain of plug-ins in upstream's order. Cheap to clone.
#[derive(Clone, Default)]
pub struct Admission {}

impl Admission {
    /// The mutating phase: may change `request.object`.
    pub async fn mutate(&self, _request: &mut Request<'_>) -> Result<Warnings, Status> {
        Ok(Warnings::new())
    }

    /// The validating phase: changes nothing but may charge quotas, so call it last and once per attempt.
    pub async fn validate(&self, _request: &Request<'_>) -> Result<Warnings, Status> {
        Ok(Warnings::new())
    }

    /// Both phases.
    pub async fn admit(&self, request: &mut Request<'_>) -> Result<Warnings, Status> {
        let mut warnings = self.mutate(request).await?;
        warnings.extend(self.validate(request).await?);
        Ok(warnings)
    }
}
