//! Who is calling and what they may do.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`identity`] | [`UserInfo`] and [`Identity`], the request extension that only authentication can make |
//! | [`attributes`] | [`Attributes`] of a request, [`Decision`], upstream's forbidden texts |
//! | [`authorizer`] | [`Authorizer`]: the chain of authorizers |

pub mod attributes;
pub mod authorizer;
pub mod identity;

pub use attributes::{Attributes, Decision};
pub use authorizer::Authorizer;
pub use identity::{Identity, UserInfo};
