//! Which datagrams of a batch can cross the kernel as one message.

use wg_common::headers::{ETHERNET_LEN, IPV6_LEN, UDP_LEN};

use crate::sys::mmsg::Outgoing;

/// Datagrams of one run at most: every kernel that knows runs takes as many.
pub const RUN_LEN_MAX: usize = 64;
/// Bytes of one run at most. With its headers it is shorter than 64 KiB, or else the kernel cuts it up
/// before a device that could take it whole.
pub const RUN_BYTES_MAX: usize = 65_535 - ETHERNET_LEN - IPV6_LEN - UDP_LEN;

/// How many of `datagrams`, from the first on, make a run: they have the same endpoint and TOS, and the
/// first one's length, but that the last may be shorter. At least 1, unless there are none.
///
/// What is empty goes alone: behind others it would not be sent at all.
pub fn run_len(datagrams: &[Outgoing<'_>]) -> usize {
    let Some((first, others)) = datagrams.split_first() else { return 0 };
    let piece_len = first.bytes.len();
    if piece_len == 0 {
        return 1;
    }
    let fitting = (RUN_BYTES_MAX / piece_len).min(RUN_LEN_MAX).saturating_sub(1);
    let same = |other: &&Outgoing<'_>| other.bytes.len() == piece_len && is_alike(first, other);
    let whole = 1 + others.iter().take(fitting).take_while(same).count();
    let bytes_left = RUN_BYTES_MAX.saturating_sub(whole * piece_len);
    let has_shorter = whole < RUN_LEN_MAX
        && datagrams.get(whole).is_some_and(|last| {
            (1..piece_len).contains(&last.bytes.len())
                && last.bytes.len() <= bytes_left
                && is_alike(first, last)
        });
    whole + usize::from(has_shorter)
}

fn is_alike(one: &Outgoing<'_>, other: &Outgoing<'_>) -> bool {
    one.tos == other.tos
        && (std::ptr::eq(one.endpoint, other.endpoint) || one.endpoint == other.endpoint)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wg_common::endpoint::{Endpoint, LocalSource};

    use super::*;

    fn endpoints() -> [Endpoint; 4] {
        let one = Endpoint::configured("192.0.2.1:1".parse().unwrap());
        let other_port = Endpoint::configured("192.0.2.1:2".parse().unwrap());
        let local = |last| LocalSource { addr: [10, 0, 0, last].into(), ifindex: 1 };
        [
            one,
            other_port,
            Endpoint { local: Some(local(1)), ..one },
            Endpoint { local: Some(local(2)), ..one },
        ]
    }

    /// What may be a run, said of all of it at once.
    fn is_run(datagrams: &[Outgoing<'_>]) -> bool {
        let lens: Vec<usize> = datagrams.iter().map(|d| d.bytes.len()).collect();
        let (Some(&last), Some(&first)) = (lens.last(), lens.first()) else { return false };
        let heads = datagrams.iter().map(|d| (*d.endpoint, d.tos));
        lens.len() == 1
            || heads.collect::<std::collections::HashSet<_>>().len() == 1
                && lens[..lens.len() - 1].iter().all(|&len| len == first)
                && last <= first
                && last > 0
                && lens.len() <= 64
                && lens.iter().sum::<usize>() <= 65_473
    }

    const LENS: &[usize] = &[1000, 1024, 1452, 1490, 32_736, 32_737, 65_473, 65_474];

    proptest! {
        #[test]
        fn a_run_is_the_longest_beginning_that_may_be_one(
            stretches in prop::collection::vec(
                (0..4_usize, 0..2_u8, prop_oneof![4 => 0..4_usize, 1 => prop::sample::select(LENS)], 1..70_usize),
                1..6,
            ),
        ) {
            let endpoints = endpoints();
            let payload = vec![0; 65_474];
            let datagrams: Vec<Outgoing<'_>> = stretches
                .iter()
                .flat_map(|&(endpoint, tos, len, count)| {
                    let one = Outgoing { bytes: &payload[..len], endpoint: &endpoints[endpoint], tos };
                    std::iter::repeat_n(one, count)
                })
                .collect();
            let mut rest = &datagrams[..];
            while !rest.is_empty() {
                let longest = (1..=rest.len()).take_while(|&len| is_run(&rest[..len])).last();
                let len = run_len(rest);
                prop_assert_eq!(Some(len), longest);
                rest = &rest[len..];
            }
        }
    }

    #[test]
    fn limits_are_exact() {
        let endpoint = endpoints()[0];
        let payload = vec![0; 65_474];
        let run = |lens: &[usize]| {
            let datagrams: Vec<_> = lens
                .iter()
                .map(|&len| Outgoing { bytes: &payload[..len], endpoint: &endpoint, tos: 0 })
                .collect();
            run_len(&datagrams)
        };
        assert_eq!(run(&[]), 0);
        assert_eq!(run(&[1; 65]), 64);
        assert_eq!(run(&[1452; 64]), 45, "65,340 bytes");
        assert_eq!(run(&[[1452; 45].as_slice(), &[133]].concat()), 46, "65,473 bytes");
        assert_eq!(run(&[[1452; 45].as_slice(), &[134]].concat()), 45);
        assert_eq!(run(&[[2; 63].as_slice(), &[1, 1]].concat()), 64);
        assert_eq!(run(&[[2; 64].as_slice(), &[1]].concat()), 64);
        assert_eq!(run(&[100, 99, 99]), 2, "the shorter one is the last");
        assert_eq!(run(&[100, 101]), 1);
        assert_eq!((run(&[100, 0]), run(&[0, 0])), (1, 1));
        assert_eq!((run(&[65_473, 1]), run(&[65_474, 65_474])), (1, 1));
    }
}
