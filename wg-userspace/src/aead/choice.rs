//! Which back end seals and opens: what was asked for, what this CPU has, and whether what it has
//! agrees with `ring` on this very machine.

use std::fmt;
use std::sync::OnceLock;

use wg_common::protocol::{KEY_LEN, TAG_LEN};

use super::{AeadKey, Avx512Aead, BatchAead, Job, RingAead};

/// Which back end to use. They differ in nothing but speed.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    PartialEq,
    clap::ValueEnum,
    serde::Deserialize,
    serde::Serialize,
)]
pub enum AeadChoice {
    /// The fastest that this CPU has.
    #[default]
    Auto,
    /// Packet by packet, on every CPU.
    Ring,
    /// Many packets at once, on x86-64 CPUs with AVX-512.
    Avx512,
}

impl AeadChoice {
    /// Whether this CPU has what was chosen: the same answer that [`choose`] gives, without a test.
    ///
    /// # Errors
    /// If it has not, with what is missing.
    pub fn check(self) -> Result<(), Unsupported> {
        self.candidate().map(drop)
    }

    /// The back end that is chosen, if it does what it should.
    fn candidate(self) -> Result<&'static dyn BatchAead, Unsupported> {
        match self {
            Self::Ring => Ok(&RingAead),
            Self::Auto => Ok(avx512().unwrap_or(&RingAead)),
            Self::Avx512 => avx512().ok_or_else(|| Unsupported { missing: missing_for_avx512() }),
        }
    }
}

/// A back end was asked for that needs what this CPU has not.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "the AEAD back end avx512 needs of the CPU what this one has not: {}; leave it to `--aead auto`",
    missing.join(", ")
)]
pub struct Unsupported {
    /// Names of features, as /proc/cpuinfo and compilers have them.
    missing: Vec<&'static str>,
}

/// What [`choose`] found.
pub struct Chosen {
    /// The back end to use.
    pub aead: &'static dyn BatchAead,
    /// The one that should have been used, and what it did: it is `ring` instead.
    pub rejected: Option<(&'static str, Difference)>,
}

/// Chooses the back end of this process: once, when it starts, since it tests it (in less than a
/// millisecond).
///
/// # Errors
/// If this CPU has not what was asked for.
pub fn choose(choice: AeadChoice) -> Result<Chosen, Unsupported> {
    Ok(tested(choice.candidate()?))
}

/// All back ends that this CPU has, `ring` first: for tests and benchmarks. They are not tested.
pub fn back_ends() -> Vec<&'static dyn BatchAead> {
    let ring: &'static dyn BatchAead = &RingAead;
    [ring].into_iter().chain(avx512()).collect()
}

fn tested(candidate: &'static dyn BatchAead) -> Chosen {
    match self_test(candidate) {
        Ok(()) => Chosen { aead: candidate, rejected: None },
        Err(difference) => {
            Chosen { aead: &RingAead, rejected: Some((candidate.name(), difference)) }
        }
    }
}

/// The AVX-512 back end, if this CPU has it.
fn avx512() -> Option<&'static dyn BatchAead> {
    static DETECTED: OnceLock<Option<Avx512Aead>> = OnceLock::new();
    DETECTED.get_or_init(Avx512Aead::detect).as_ref().map(|aead| aead as &dyn BatchAead)
}

/// What this CPU lacks of what the AVX-512 back end needs.
#[cfg(target_arch = "x86_64")]
fn missing_for_avx512() -> Vec<&'static str> {
    macro_rules! missing {
        ($($feature:tt)*) => {
            [$(($feature, is_x86_feature_detected!($feature))),*]
        };
    }
    let features =
        missing!["avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512ifma" "avx512vbmi2" "bmi2"];
    features.into_iter().filter(|(_, is_there)| !is_there).map(|(name, _)| name).collect()
}

/// What this CPU lacks of what the AVX-512 back end needs.
#[cfg(not(target_arch = "x86_64"))]
fn missing_for_avx512() -> Vec<&'static str> {
    vec!["x86-64"]
}

/// How a back end differs from `ring`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Difference {
    what: Fault,
    /// Place of the packet in its batch.
    place: usize,
    /// Bytes of the packet, without the tag.
    packet_len: usize,
}

/// What a back end did wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fault {
    /// Sealed bytes are others.
    Sealed,
    /// Opened bytes are others.
    Opened,
    /// A good packet is refused.
    Refused,
    /// A packet that was changed is accepted.
    Accepted,
    /// Bytes behind the tag have changed.
    Overrun,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            Fault::Sealed => "sealed otherwise",
            Fault::Opened => "opened otherwise",
            Fault::Refused => "refused as it came",
            Fault::Accepted => "accepted though it was changed",
            Fault::Overrun => "written beyond its end",
        };
        let Self { place, packet_len, .. } = self;
        write!(f, "packet {place} of a batch, of {packet_len} bytes, was {what}")
    }
}

/// Packets of a batch of the self-test: two full passes of the widest back end.
const BATCH_LEN: usize = 64;
/// Bytes of packets in uniform batches: about the edges of Poly1305's and of ChaCha20's blocks, and
/// of four of the latter.
const LENS: [usize; 14] = [0, 1, 15, 16, 17, 48, 63, 64, 65, 127, 128, 255, 256, 272];
/// Longest packet of the self-test, in the batch where lengths are mixed.
const PACKET_LEN_MAX: usize = 1440;
/// Bytes behind each tag that are nobody's.
const FENCE_LEN: usize = 64;
const FENCE: u8 = 0xa5;
/// Bytes from one packet to the next: odd, so that each has another alignment.
const STRIDE: usize = PACKET_LEN_MAX + TAG_LEN + FENCE_LEN + 1;

/// Compares a back end with `ring`: sealing and opening, in every place of a batch, with uniform and
/// with mixed lengths; and a changed packet in every place, with its neighbours.
///
/// # Errors
/// At the first difference.
pub fn self_test(aead: &dyn BatchAead) -> Result<(), Difference> {
    let test = SelfTest { aead, keys: (0..BATCH_LEN).map(key).collect() };
    let mixed = |place| place * 193 % (PACKET_LEN_MAX + 1);
    for len in LENS {
        test.batch(|_| len)?;
    }
    test.batch(mixed)?;
    // What is left of a batch after full passes is another way through a back end.
    for count in [1, 2, 3, 5, 9, 17, 33] {
        test.packets(count, mixed, |_| None)?;
    }
    Ok(())
}

/// A key of the self-test: everybody may know it.
fn key(place: usize) -> AeadKey {
    AeadKey::new(&std::array::from_fn::<_, KEY_LEN, _>(|i| (place * 37 + i * 11) as u8))
}

struct SelfTest<'a> {
    aead: &'a dyn BatchAead,
    keys: Vec<AeadKey>,
}

impl SelfTest<'_> {
    /// Full batches of packets whose lengths depend on their places: all good; then each third
    /// changed, until each was.
    fn batch(&self, packet_len: impl Fn(usize) -> usize + Copy) -> Result<(), Difference> {
        self.packets(BATCH_LEN, packet_len, |_| None)?;
        for third in 0..3 {
            // Somewhere in the packet or in its tag.
            let changed = |place: usize| {
                let sealed_len = packet_len(place) + TAG_LEN;
                (place % 3 == third).then_some((place * 7 + third) % sealed_len)
            };
            self.packets(BATCH_LEN, packet_len, changed)?;
        }
        Ok(())
    }

    /// Seals `count` packets, changes the bytes that `changed` names, and opens them.
    fn packets(
        &self,
        count: usize,
        packet_len: impl Fn(usize) -> usize,
        changed: impl Fn(usize) -> Option<usize>,
    ) -> Result<(), Difference> {
        let mut frames = vec![FENCE; count * STRIDE];
        for (place, frame) in frames.chunks_exact_mut(STRIDE).enumerate() {
            let packet = frame[..packet_len(place)].iter_mut().enumerate();
            packet.for_each(|(i, byte)| *byte = (place * 101 + i * 29) as u8);
        }
        let plain = frames.clone();
        let mut expected = frames.clone();
        let compare = |frames: &[u8], expected: &[u8], fault| {
            let pairs = frames.chunks_exact(STRIDE).zip(expected.chunks_exact(STRIDE));
            for (place, (frame, expected)) in pairs.enumerate() {
                let packet_len = packet_len(place);
                let sealed_len = packet_len + TAG_LEN;
                let difference = |what| Err(Difference { what, place, packet_len });
                // Opened packets leave something in the place of the tag, and failed ones everywhere.
                let (compared, fault) = match fault {
                    Fault::Sealed => (sealed_len, fault),
                    _ if changed(place).is_some() => (0, fault),
                    _ => (packet_len, fault),
                };
                if frame[..compared] != expected[..compared] {
                    return difference(fault);
                }
                if frame[sealed_len..].iter().any(|&byte| byte != FENCE) {
                    return difference(Fault::Overrun);
                }
            }
            Ok(())
        };

        RingAead.seal(&mut self.jobs(&mut expected, &packet_len));
        self.aead.seal(&mut self.jobs(&mut frames, &packet_len));
        compare(&frames, &expected, Fault::Sealed)?;

        for (place, frame) in frames.chunks_exact_mut(STRIDE).enumerate() {
            if let Some(at) = changed(place) {
                frame[at] ^= 1 << (place % 8);
            }
        }
        let mut jobs = self.jobs(&mut frames, &packet_len);
        // What a buffer's last user may have left.
        jobs.iter_mut().enumerate().for_each(|(place, job)| job.ok = changed(place).is_some());
        self.aead.open(&mut jobs);
        for (place, job) in jobs.iter().enumerate() {
            let is_good = changed(place).is_none();
            if job.ok != is_good {
                let what = if is_good { Fault::Refused } else { Fault::Accepted };
                return Err(Difference { what, place, packet_len: packet_len(place) });
            }
        }
        compare(&frames, &plain, Fault::Opened)
    }

    /// A job for each frame. Some share a key, and counters use all of their bits.
    fn jobs<'a>(
        &'a self,
        frames: &'a mut [u8],
        packet_len: &impl Fn(usize) -> usize,
    ) -> Vec<Job<'a>> {
        let frames = frames.chunks_exact_mut(STRIDE).enumerate();
        let jobs = frames.map(|(place, frame)| {
            let counter = (place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            Job::new(&self.keys[place & !1], counter, &mut frame[..packet_len(place) + TAG_LEN])
        });
        jobs.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ring`, but for one fault in one place of the batch.
    struct Broken {
        what: Fault,
        place: usize,
        /// Only packets of at least this length.
        packet_len: usize,
    }

    impl Broken {
        fn breaks(&self, what: Fault, job: &Job<'_>) -> bool {
            self.what == what && job.buffer.len() >= self.packet_len + TAG_LEN
        }
    }

    impl BatchAead for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }

        fn seal(&self, jobs: &mut [Job<'_>]) {
            RingAead.seal(jobs);
            if let Some(job) = jobs.get_mut(self.place)
                && self.breaks(Fault::Sealed, job)
            {
                *job.buffer.last_mut().unwrap() ^= 1;
            }
        }

        fn open(&self, jobs: &mut [Job<'_>]) {
            RingAead.open(jobs);
            let Some(job) = jobs.get_mut(self.place) else { return };
            if self.breaks(Fault::Opened, job) {
                job.buffer[0] ^= 0x80;
            } else if self.breaks(Fault::Refused, job) {
                job.ok = false;
            } else if self.breaks(Fault::Accepted, job) {
                job.ok = true;
            }
        }
    }

    #[test]
    fn a_fault_in_any_place_is_found() {
        for place in 0..BATCH_LEN {
            for what in [Fault::Sealed, Fault::Opened, Fault::Refused, Fault::Accepted] {
                let packet_len = if what == Fault::Opened { 1 } else { 0 };
                let found = self_test(&Broken { what, place, packet_len }).unwrap_err();
                assert_eq!((found.what, found.place), (what, place));
            }
        }
    }

    #[test]
    fn a_fault_of_long_packets_only_is_found() {
        let what = Fault::Sealed;
        let found = self_test(&Broken { what, place: 7, packet_len: 1300 }).unwrap_err();
        assert_eq!((found.place, found.packet_len), (7, 1351));
    }

    /// `ring`, but a job's result goes one further, as in a loop that forgot a lane.
    struct Shifted;

    impl BatchAead for Shifted {
        fn name(&self) -> &'static str {
            "shifted"
        }

        fn seal(&self, jobs: &mut [Job<'_>]) {
            RingAead.seal(jobs);
        }

        fn open(&self, jobs: &mut [Job<'_>]) {
            RingAead.open(jobs);
            let results: Vec<bool> = jobs.iter().map(|job| job.ok).collect();
            jobs.iter_mut().skip(1).zip(results).for_each(|(job, ok)| job.ok = ok);
        }
    }

    #[test]
    fn ring_takes_the_place_of_a_back_end_that_differs() {
        let chosen = tested(&Shifted);
        assert_eq!(chosen.aead.name(), "ring");
        let (name, difference) = chosen.rejected.unwrap();
        assert_eq!(name, "shifted");
        assert_eq!(
            difference.to_string(),
            "packet 1 of a batch, of 0 bytes, was refused as it came"
        );
    }

    #[test]
    fn what_this_cpu_has_passes_and_is_taken() {
        for aead in back_ends() {
            assert_eq!(self_test(aead), Ok(()), "{}", aead.name());
        }
        assert_eq!(choose(AeadChoice::Ring).ok().unwrap().aead.name(), "ring");
        let fastest = back_ends().last().unwrap().name();
        let chosen = choose(AeadChoice::Auto).ok().unwrap();
        assert_eq!((chosen.aead.name(), chosen.rejected), (fastest, None));
    }

    #[test]
    fn what_this_cpu_has_not_is_refused_with_what_is_missing() {
        let missing = missing_for_avx512();
        match choose(AeadChoice::Avx512) {
            Ok(chosen) => assert_eq!((chosen.aead.name(), missing), ("avx512", Vec::new())),
            Err(refused) => {
                assert!(!missing.is_empty(), "it is here, and not found");
                assert_eq!(refused, Unsupported { missing });
            }
        }
        let refused = Unsupported { missing: vec!["avx512ifma", "avx512vbmi2"] };
        assert_eq!(
            refused.to_string(),
            "the AEAD back end avx512 needs of the CPU what this one has not: avx512ifma, \
             avx512vbmi2; leave it to `--aead auto`"
        );
    }
}
