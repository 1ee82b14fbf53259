//! Who is calling and what they may do.
//!
//! # Layout
//! In the order a request meets them:
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`pki`] | authorities, leaves, sealed keys, join tokens, kubeconfigs |
//! | [`authn`] | [`Authenticator`]: credentials to [`Identity`] |
//! | [`x509`] | client certificates |
//! | [`service_account`], [`jwt`] | service-account tokens and their form |
//! | [`bootstrap_token`] | tokens for joining machines |
//! | [`impersonation`] | acting as somebody else |
//! | [`identity`] | [`UserInfo`] and [`Identity`], the request extension that only authentication can make |
//! | [`attributes`] | [`Attributes`] of a request, [`Decision`], upstream's forbidden texts |
//! | [`authorizer`] | [`Authorizer`]: the chain of authorizers |
//! | [`node`] | the node authorizer |
//! | [`rbac`] | roles, bindings, the bootstrap policy |
//! | [`reviews`], [`token_request`] | answers to access and token reviews; fresh service-account tokens |
//! | [`certificates`], [`signer`] | certificate signing requests; the built-in signers |
//! | [`follow`] | loops over the few objects under one prefix |
//! | [`security`] | [`Security`]: all of it put together, in the order that the server starts it |
//! | [`live`], [`objects`] | how all of them read the store |
//!
//! # Tasks
//! | task | owns | starts | ends |
//! | --- | --- | --- | --- |
//! | certificate signers | nothing | [`Security::spawn_signer`] | with the server |

pub mod attributes;
pub mod authn;
pub mod authorizer;
pub mod bootstrap_token;
pub mod certificates;
pub mod follow;
pub mod identity;
pub mod impersonation;
pub mod jwt;
pub mod live;
pub mod node;
pub mod objects;
pub mod pki;
pub mod rbac;
pub mod reviews;
pub mod security;
pub mod service_account;
pub mod signer;
pub mod token_request;
pub mod x509;

pub use attributes::{Attributes, Decision};
pub use authn::{Authenticator, PeerCertificate};
pub use authorizer::Authorizer;
pub use identity::{Identity, UserInfo};
pub use security::Security;
pub use service_account::ServiceAccountTokens;
