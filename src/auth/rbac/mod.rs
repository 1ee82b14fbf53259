//! Role-based access control, evaluated from the roles and bindings in the store.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`rule`] | [`PolicyRule`]: what one rule allows and covers |
//! | [`index`] | [`RbacIndex`]: roles and bindings by subject; the evaluation |
//! | [`bootstrap`] | the roles and bindings every cluster starts with (`bootstrap_policy.txt`), kept in place |

pub mod bootstrap;
pub mod index;
pub mod rule;

pub use index::{RbacIndex, Verdict};
pub use rule::{PolicyRule, missing_rules};
