//! The cookies that we demand while we are under load (§5.4.7).

use std::net::SocketAddr;

use rand_core::CryptoRng;
use wg_common::protocol::COOKIE_SECRET_LIFETIME;
use wg_common::time::Now;

use crate::noise::{Cookie, CookieSecret, check_mac2};

/// Tells each address its cookie, and knows it again. Keeps nothing of any address: a cookie is made
/// anew from the secret whenever it is needed.
#[derive(Debug, Default)]
pub struct Cookies {
    /// The secret and when it was made. Made when it is needed: a device that was never under load
    /// has none.
    secret: Option<(CookieSecret, Now)>,
}

impl Cookies {
    /// The cookie of `from`. That of an older secret counts no more, as in the kernel.
    pub fn cookie(&mut self, from: SocketAddr, rng: &mut impl CryptoRng, now: Now) -> Cookie {
        self.secret.take_if(|(_, made)| now.since(*made) >= COOKIE_SECRET_LIFETIME);
        let (secret, _) = self.secret.get_or_insert_with(|| (CookieSecret::generate(rng), now));
        secret.cookie(from)
    }

    /// Checks mac2 of a handshake message from `from`. Its sender has received at `from` what we sent
    /// there.
    ///
    /// # Errors
    /// The cookie that mac2 should have been made with.
    pub fn check(
        &mut self,
        message: &[u8],
        from: SocketAddr,
        rng: &mut impl CryptoRng,
        now: Now,
    ) -> Result<(), Cookie> {
        let cookie = self.cookie(from, rng, now);
        if check_mac2(&cookie, message) { Ok(()) } else { Err(cookie) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000);
    const TICK: Duration = Duration::from_nanos(1);

    fn from(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_secret_is_another_after_two_minutes() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut cookies = Cookies::default();
        let one = from("192.0.2.1:1000");
        let first = *cookies.cookie(one, &mut rng, START).expose();
        let almost = START + (COOKIE_SECRET_LIFETIME - TICK);
        assert_eq!(*cookies.cookie(one, &mut rng, almost).expose(), first);
        let second = *cookies.cookie(one, &mut rng, START + COOKIE_SECRET_LIFETIME).expose();
        assert_ne!(second, first);
        // Its own two minutes begin when it was made.
        let later = START + COOKIE_SECRET_LIFETIME * 2;
        let almost = START + (COOKIE_SECRET_LIFETIME * 2 - TICK);
        assert_eq!(*cookies.cookie(one, &mut rng, almost).expose(), second);
        assert_ne!(*cookies.cookie(one, &mut rng, later).expose(), second);
    }

    #[test]
    fn secrets_differ_between_devices() {
        let mut rng = StdRng::seed_from_u64(1);
        let one = from("192.0.2.1:1000");
        let [a, b] = [(), ()].map(|()| *Cookies::default().cookie(one, &mut rng, START).expose());
        assert_ne!(a, b);
    }
}
