//! The socket protocol of wg(8), which userspace implementations share ("cross-platform userspace
//! implementation", <https://www.wireguard.com/xplatform/>).
//!
//! Requests and answers are lines of `key=value` and end with an empty line. [`SetParser`] makes a
//! [`SetRequest`](crate::device::SetRequest) of the lines after `set=1`; [`format_get_part`] writes
//! what answers `get=1`, a part at a time; both are pure. [`Server`] is not: it answers on the socket
//! `/var/run/wireguard/IF.sock`, which `keeper` owns as a [`Listener`], and asks a [`Handler`], which is
//! `daemon`. Of our own are the requests `tidegate=status` and `tidegate=quiesce`
//! (a line `seconds=N` may follow), answered with one line of JSON, `tidegate=resume`, and `tidegate=names`:
//! the peers whose endpoints were given as names, each by the lines `public_key=` (in hexadecimal), `host=`
//! and `port=`; the list replaces the one before. Of our own are also some lines of a peer: in both
//! directions `tidegate_name=`, what people call it (empty in a `set`: no more), and in answers
//! `tidegate_pulled=` and `tidegate_by_name=`. wg(8) passes over lines that it does not know.
//!
//! A request that fails changes nothing: it is read to its end before the handler sees it.

mod client;
mod errno;
mod get;
mod memory;
mod names;
mod places;
mod server;
mod set;
#[cfg(test)]
mod tests;

pub use self::errno::Errno;
pub use self::get::{GetCursor, PART_LEN_MAX, PeerStatus, format_get, format_get_part};
pub use self::names::{
    EndpointName, HOST_LEN_MAX, NamesParser, format_names, is_host, parse_names,
};
pub use self::server::{BindError, Handler, Listener, Server};
pub use self::set::{SetParser, SetProblem, UapiError, format_set, parse_set};

/// Where wg(8) looks for sockets.
pub const SOCKET_DIR: &str = "/var/run/wireguard";
