//! The back end for CPUs with AVX-512: a block of ChaCha20, or a packet of Poly1305, in each lane.
//!
//! A vector has sixteen lanes of 32 bits, or eight of 64. What one packet gives to do in parallel
//! does not fill them, and has to be set up for each packet; a batch fills them, whatever its keys,
//! counters and lengths.
//!
//! ```text
//! jobs ─ jobs.rs: packets, by length ─ chunks of 32 ─┬─ chacha.rs: passes over 32 blocks
//!                                                    └─ poly1305.rs: groups of 8 packets
//!
//! a pass      set A, lanes 0…15                       set B, lanes 16…31
//!           ┌────┬────┬────┬────┬────┬────┬─   ─┐   ┌────┬─   ─┬────┬────┐    row w has word w of the
//!  state    │p0·0│p1·0│p2·0│p0·1│p0·2│p0·3│  …  │   │p1·1│  …  │p2·2│    │    state of each lane;
//!  row w    └────┴────┴────┴────┴────┴────┴─   ─┘   └────┴─   ─┴────┴────┘    p1·2: packet 1, block 2
//!             one-time keys: first in the first pass; data after them             (0: its one-time key)
//!
//!  rounds.rs: all rows, 20 rounds ── transpose.rs: lane l becomes vector l ── XOR into the packet
//!      └── chacha.rs: words 0…7 of block 0, joined to 64 bits: r and s, packet p in lane p
//!
//! a group     ┌────────┬────────┬─   ─┬────────┐
//!  Poly1305   │   p0   │   p1   │  …  │   p7   │   three limbs of h in three vectors, four blocks a step
//!             └────────┴────────┴─   ─┴────────┘
//! ```
//!
//! Sealing: passes, and each group's tags as soon as its packets are through. Opening: the first pass,
//! of which only the one-time keys are used at first; then each group's tags, and the passes of those
//! packets whose tag was right. **A packet that fails is never written to**: it stays as it came,
//! unless `ring` did the batch (see `is_worth_it`), which has no such rule.
//!
//! # Time does not depend on secrets
//! There are branches and addresses that depend on lengths, on how many jobs there are, on which keys
//! are *the same object*, and on whether a tag was right: all of that is known to whoever sees the
//! packets. On the bytes of keys, key stream, plaintext and tags there is none: ChaCha20 adds, XORs
//! and turns; Poly1305 multiplies with `vpmadd52`, whose time is the same for all numbers, and chooses
//! by masks; tags are compared as a whole. Nothing is looked up in tables.
//!
//! That is what the code says. What the compiler made of it (1.95, release) was run one instruction at a
//! time with keys and packets of zeros, of ones and random: it executed the same instructions, which
//! reached the same addresses. Measured, no difference in time is seen either
//! (`benches/benches/constant_time.rs`; figures in `benches/README.md`).
//!
//! # What is wiped
//! Each thread has one `Scratch`, in which states, key stream, one-time keys and powers of `r` are
//! kept. A call overwrites it with zeros when it ends, also by a panic, and, if it ends well, all
//! vector and mask registers. What the compiler puts on the stack on its own account is not wiped:
//! limbs of `r`, of its powers and of sums, where Poly1305 needs more registers than there are; and
//! the tags that were computed. Key stream and keys it does not put there, in the builds looked at.
//! Keys themselves are the caller's.
//!
//! # What is unsafe
//! Loads and stores by address, and the assembly. Functions with `target_feature` are safe to call from
//! each other; into them there are two calls, which need an [`Avx512Aead`], and that comes from
//! [`Avx512Aead::detect`] alone. Addresses of packets come from `jobs::Packet`, which borrows the
//! buffers; partial blocks are loaded and stored under a mask of the bytes that exist.
//!
//! # Why there is none for AVX2
//! With half as wide vectors, half as many registers and no `vpmadd52`, the same method sealed 64 bytes
//! twice as fast as `ring` but 1,440 bytes at 0.78 times its speed, and mixes of sizes at 0.72 to 0.92
//! times. `ring` serves these CPUs.

mod batch;
mod chacha;
mod jobs;
#[cfg(test)]
mod model;
mod poly1305;
mod rounds;
mod scratch;
#[cfg(test)]
mod tests;
mod transpose;

pub use self::batch::Avx512Aead;
use super::{BatchAead, Job, RingAead};

/// What this back end and `ring` cost, in twentieths of a cycle of a Xeon of 2023: what `ring` needs
/// more for every packet and byte, and this back end more for a batch and for each byte of its longest
/// packet (in Poly1305 that has a lane to itself, however idle the others are).
const RING_PACKET: usize = 20 * 500;
const RING_BYTE: usize = 22;
const LANES_BATCH: usize = 20 * 1650;
const LANES_LONGEST_BYTE: usize = 31;

impl BatchAead for Avx512Aead {
    fn name(&self) -> &'static str {
        "avx512"
    }

    fn seal(&self, jobs: &mut [Job<'_>]) {
        if is_worth_it(jobs) { self.seal_in_lanes(jobs) } else { RingAead.seal(jobs) }
    }

    fn open(&self, jobs: &mut [Job<'_>]) {
        if is_worth_it(jobs) { self.open_in_lanes(jobs) } else { RingAead.open(jobs) }
    }
}

/// Whether lanes are likely faster than `ring`: not for one packet, for two or three short ones, or
/// where one packet is nearly all there is.
fn is_worth_it(jobs: &[Job<'_>]) -> bool {
    if jobs.len() < 2 {
        return false;
    }
    let (mut total, mut longest) = (0_usize, 0);
    for job in jobs {
        total += job.buffer.len();
        longest = longest.max(job.buffer.len());
    }
    let ring = RING_PACKET * jobs.len() + RING_BYTE.saturating_mul(total);
    ring >= LANES_BATCH.saturating_add(LANES_LONGEST_BYTE.saturating_mul(longest))
}
