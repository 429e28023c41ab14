//! Numbers of the WireGuard protocol, each with its source (§ = section of the whitepaper).

use core::time::Duration;

/// Noise construction string (§5.4).
pub const CONSTRUCTION: &[u8; 37] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
/// Prologue of the handshake (§5.4).
pub const IDENTIFIER: &[u8; 34] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Label of the mac1 key (§5.4.4).
pub const LABEL_MAC1: &[u8; 8] = b"mac1----";
/// Label of the cookie key (§5.4.7).
pub const LABEL_COOKIE: &[u8; 8] = b"cookie--";

/// Bytes of a public, private or preshared key.
pub const KEY_LEN: usize = 32;
/// Bytes of a Poly1305 tag.
pub const TAG_LEN: usize = 16;
/// Bytes of mac1 and of mac2 (§5.4.4).
pub const MAC_LEN: usize = 16;
/// Bytes of a TAI64N timestamp (§5.4.2).
pub const TIMESTAMP_LEN: usize = 12;

/// Message type byte of a handshake initiation (§5.4.2).
pub const TYPE_INITIATION: u8 = 1;
/// Message type byte of a handshake response (§5.4.3).
pub const TYPE_RESPONSE: u8 = 2;
/// Message type byte of a cookie reply (§5.4.7).
pub const TYPE_COOKIE_REPLY: u8 = 3;
/// Message type byte of transport data (§5.4.6).
pub const TYPE_TRANSPORT: u8 = 4;

/// Bytes of a handshake initiation (§5.4.2).
pub const INITIATION_LEN: usize = 148;
/// Bytes of a handshake response (§5.4.3).
pub const RESPONSE_LEN: usize = 92;
/// Bytes of a cookie reply (§5.4.7).
pub const COOKIE_REPLY_LEN: usize = 64;
/// Bytes before the sealed packet in a transport data message: type, reserved, index, counter (§5.4.6).
pub const TRANSPORT_HEADER_LEN: usize = 16;
/// Bytes that a transport data message adds to its (padded) packet (§5.4.6).
pub const TRANSPORT_OVERHEAD: usize = TRANSPORT_HEADER_LEN + TAG_LEN;
/// Shortest transport data message: a keepalive.
pub const TRANSPORT_MIN_LEN: usize = TRANSPORT_OVERHEAD;
const _: () = assert!(TRANSPORT_OVERHEAD == 32);
/// Sealed packets are padded to a multiple of this many bytes (§5.4.6), but not beyond the MTU.
pub const PADDING_MULTIPLE: usize = 16;
/// MTU of a device when nothing else is known: 1500 less 80 bytes of IPv6, UDP and transport overhead.
pub const DEFAULT_MTU: usize = 1420;

/// Messages after which the initiator makes a new handshake (§6.1, *Rekey-After-Messages*).
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// Counter at which a keypair must no longer seal or open anything (§6.1, *Reject-After-Messages*).
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Age at which the initiator makes a new handshake when it sends (§6.1, *Rekey-After-Time*).
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age at which a keypair is dead (§6.1, *Reject-After-Time*).
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// Time a handshake goes without being given up (§6.1, *Rekey-Attempt-Time*).
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Time between two initiations to one peer (§6.1, *Rekey-Timeout*).
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Greatest jitter added to [`REKEY_TIMEOUT`] (§6.1: "plus some jitter"; the kernel: a third of a second).
pub const REKEY_TIMEOUT_JITTER_MAX: Duration = Duration::from_millis(333);
/// Silence after received data that a keepalive ends (§6.1, *Keepalive-Timeout*).
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Counters that the replay window remembers (the kernel's `COUNTER_BITS_TOTAL`).
pub const REPLAY_WINDOW_LEN: u64 = 8192;
/// Packets that wait for one peer's keypair (the kernel's `MAX_STAGED_PACKETS`).
pub const STAGED_PACKETS_MAX: usize = 128;
/// Least time between two initiations that one peer may have answered: 50 a second
/// (the kernel's `INITIATIONS_PER_SECOND`).
pub const INITIATION_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// TOS byte of handshake messages: DSCP AF41 (the kernel's `HANDSHAKE_DSCP`).
pub const HANDSHAKE_TOS: u8 = 0x88;
/// Age at which a responder's cookie secret is replaced (§5.4.7: every two minutes).
pub const COOKIE_SECRET_LIFETIME: Duration = Duration::from_secs(120);
/// Time for which an initiator uses a cookie: its secret's lifetime, less 5 s for its way
/// (the kernel's `COOKIE_SECRET_MAX_AGE - COOKIE_SECRET_LATENCY`).
pub const COOKIE_LIFETIME: Duration = Duration::from_secs(115);
/// Handshake messages that wait for the handshake pool (the kernel's `MAX_QUEUED_INCOMING_HANDSHAKES`).
pub const HANDSHAKE_QUEUE_LEN: usize = 4096;
/// Under load, handshake messages a second of one source (the kernel's `PACKETS_PER_SECOND`).
pub const SOURCE_MESSAGES_PER_SECOND: u32 = 20;
/// Under load, handshake messages of one source at once (the kernel's `PACKETS_BURSTABLE`).
pub const SOURCE_MESSAGES_BURST: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_the_whitepapers() {
        assert_eq!(u128::from(REKEY_AFTER_MESSAGES), 1 << 60);
        assert_eq!(u128::from(REJECT_AFTER_MESSAGES), (1 << 64) - (1 << 13) - 1);
        let seconds = [
            (REKEY_AFTER_TIME, 120),
            (REJECT_AFTER_TIME, 180),
            (REKEY_ATTEMPT_TIME, 90),
            (REKEY_TIMEOUT, 5),
            (KEEPALIVE_TIMEOUT, 10),
        ];
        for (time, seconds) in seconds {
            assert_eq!(time, Duration::from_secs(seconds));
        }
    }

    #[test]
    fn jitter_is_the_kernels_third_of_a_second() {
        assert_eq!(REKEY_TIMEOUT_JITTER_MAX, Duration::from_millis(1000 / 3));
    }

    #[test]
    fn the_last_counters_never_leave_the_window_behind() {
        // However far a window moves, its highest counter does not come round to 0.
        assert!(REJECT_AFTER_MESSAGES.checked_add(REPLAY_WINDOW_LEN).is_some());
    }
}
