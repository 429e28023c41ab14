//! Host names of endpoints, looked up as wg(8) does.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    time::Duration,
};

use super::{Code, Failure};

/// Tries that wg(8) makes when the name service is out of order for the moment.
const RETRIES_DEFAULT: u32 = 15;

/// The first wait between two tries; each is longer by a fifth, up to [`WAIT_MAX`].
const WAIT_MIN: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(20);

/// Tries after the first, from `WG_ENDPOINT_RESOLUTION_RETRIES`: a number or `infinity`.
pub fn retries() -> u32 {
    retries_of(std::env::var("WG_ENDPOINT_RESOLUTION_RETRIES").ok().as_deref())
}

fn retries_of(variable: Option<&str>) -> u32 {
    match variable {
        Some("infinity") => u32::MAX,
        Some(number) => number.parse().unwrap_or(RETRIES_DEFAULT),
        None => RETRIES_DEFAULT,
    }
}

/// The first address of a host name, which may be an address with a scope.
pub fn resolve(host: &str, port: u16, mut retries: u32) -> Result<SocketAddr, Failure> {
    let mut wait = WAIT_MIN;
    loop {
        let error = match (host, port).to_socket_addrs() {
            Ok(mut addresses) => match addresses.next() {
                Some(address) => return Ok(address),
                None => io::Error::from(io::ErrorKind::NotFound),
            },
            Err(error) => error,
        };
        let line = format!("endpoint `{host}:{port}`: {error}");
        if !is_temporary(&error) {
            let hint =
                format_args!("correct the name; `getent ahosts {host}` shows what this host finds");
            return Err(Failure::new(Code::Runtime, line).and(hint));
        }
        if retries == 0 {
            let hint = format_args!(
                "see whether the name server answers (`getent ahosts {host}`); \
                 `WG_ENDPOINT_RESOLUTION_RETRIES` says how often it is asked"
            );
            return Err(Failure::new(Code::Runtime, line).and(hint));
        }
        eprintln!("tidegate: {line}; trying again in {:.2} s", wait.as_secs_f32());
        std::thread::sleep(wait);
        wait = (wait * 6 / 5).min(WAIT_MAX);
        retries = retries.saturating_sub(u32::from(retries != u32::MAX));
    }
}

/// Whether the name service may know more later. The standard library gives getaddrinfo(3)'s
/// `EAI_AGAIN` only as text; it is glibc's and musl's in any locale, as nobody calls setlocale(3).
fn is_temporary(error: &io::Error) -> bool {
    let text = error.to_string();
    text.contains("Temporary failure in name resolution") || text.contains("Try again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_need_no_name_service() {
        let address =
            |host, port| resolve(host, port, 0).unwrap_or_else(|_| panic!("{host} is an address"));
        assert_eq!(address("10.0.0.1", 51820), "10.0.0.1:51820".parse().unwrap());
        assert_eq!(address("fd00::1", 1), "[fd00::1]:1".parse().unwrap());
        // The loopback has index 1 in every namespace.
        assert_eq!(address("fe80::1%lo", 1), "[fe80::1%1]:1".parse().unwrap());
    }

    #[test]
    fn retries_are_counted_as_by_wg() {
        assert_eq!(retries_of(None), 15);
        assert_eq!(retries_of(Some("3")), 3);
        assert_eq!(retries_of(Some("infinity")), u32::MAX);
        assert_eq!(retries_of(Some("many")), 15);
    }

    #[test]
    fn only_a_name_service_out_of_order_is_asked_again() {
        let error =
            |text: &str| io::Error::other(format!("failed to lookup address information: {text}"));
        assert!(is_temporary(&error("Temporary failure in name resolution")));
        assert!(!is_temporary(&error("Name or service not known")));
    }
}
