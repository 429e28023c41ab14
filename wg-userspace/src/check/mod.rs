//! What files that can be read will not do: findings about each of them, and about files that are
//! meant to meet.
//!
//! [`alone`] looks at one file, [`together`] at all that were given. Both make [`Finding`]s, which
//! point into the files. This room opens no file and asks nothing of the host: what needs that
//! (whether a name resolves, whether a port is free) is added as findings by `cli`, which also shows
//! them all.

mod alone;
mod finding;
mod together;

pub use self::alone::alone;
pub use self::finding::{Finding, Place, Rule, Severity};
pub use self::together::together;

use crate::config::Config;

/// A file, and what people call it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// What stands before `.conf`: the word for this end in sentences, unless a peer's name is known.
    pub name: &'a str,
    /// What the file says.
    pub config: &'a Config,
}
