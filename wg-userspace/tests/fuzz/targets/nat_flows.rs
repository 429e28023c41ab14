//! A life of a gateway that translates, over tables in memory: nothing panics, no checksum that was right leaves
//! wrong, what is translated has lost a hop and bears other ends, what passes is untouched, and nothing that a rule
//! covers passes untranslated.

pub mod life;
pub mod memory;
pub mod packets;

use std::net::IpAddr;

use wg_common::map::AddressKey;
use wg_common::nat::engine::{Segments, Tables as _, Verdict, Work, answer, from_nic, from_tunnel};
use wg_common::nat::map::{Flow, FlowKind, NO_SLOT, PORTS_LEN, RuleSet};
use wg_common::nat::packet::{Buffer, Sums};
use wg_common::nat::tuple::Kind;
use wg_common::outcome::NatEvent;

use life::{EXTERNALS, Life, RING_LEN, Step, check_sums, no_rules};
use memory::{Memory, Owned, Place};
use packets::{Checksum, ends, right};

const PLACE: Place = Place { tun: 7, nics: [3, 4] };

/// A life.
pub fn run(data: &[u8]) {
    let mut life = Life::new(data, PLACE);
    let mut memory = Memory::new(PLACE);
    let mut rules = no_rules(PLACE, 0);
    for ring in 0..3 * EXTERNALS.len() as u32 {
        (0..RING_LEN).for_each(|port| memory.free_port(ring, port));
    }
    while let Some(step) = life.next() {
        match step {
            Step::Rules(next) => {
                rules = next;
                // What is known of fragments is not judged again.
                memory.fragments.clear();
            }
            Step::Ends { ring, port } => {
                if memory.end_slot(ring * PORTS_LEN + port) {
                    memory.free_port(ring, port);
                }
            }
            Step::Packet { nic, bytes, gso_size } => {
                memory.now_ns += 1 << 20;
                if let Some(sent) = packet(&mut memory, &rules, nic, &bytes, gso_size) {
                    life.sent(sent.0, sent.1);
                }
            }
        }
        check_tables(&mut memory);
    }
}

/// One packet; what it became, and whether it goes out of a NIC, if it goes anywhere.
fn packet(
    memory: &mut Memory,
    rules: &RuleSet,
    nic: Option<usize>,
    before: &[u8],
    gso_size: u32,
) -> Option<(bool, Vec<u8>)> {
    let mut bytes = before.to_vec();
    let (mut whole, mut work) = (Sums::Whole(Buffer::whole(before)), Work::EMPTY);
    if gso_size != 0 {
        whole = Sums::Finished;
    }
    let count = if gso_size == 0 { 0 } else { (before.len() as u32).div_ceil(gso_size) };
    memory.segments = Segments { len: gso_size, count };
    memory.ifindex = nic.map_or(PLACE.tun, |nic| PLACE.nics[nic]);
    let mut buffer = Buffer { bytes: &mut bytes, sums: whole };
    let verdict = match nic {
        None => from_tunnel(&mut buffer, memory, rules, &mut work),
        Some(_) => from_nic(&mut buffer, memory, rules, &mut work),
    };
    let whole = buffer.sums;
    match verdict {
        Verdict::Out | Verdict::In => {
            check_sums(before, &bytes);
            if let Sums::Whole(sum) = whole {
                let now = Buffer::whole(&bytes);
                assert_eq!(sum % 0xffff, now % 0xffff, "the sum of all of the packet");
            }
            assert_eq!(bytes.len(), before.len());
            let ttl = if bytes[0] >> 4 == 4 { 8 } else { 7 };
            assert_eq!(bytes[ttl] + 1, before[ttl]);
            assert!(nic.is_none() || verdict == Verdict::In, "what comes in goes inside");
            let [from, to] = ends(&bytes).expect("it has");
            if verdict == Verdict::Out {
                let is_external = EXTERNALS.iter().any(|(own, _)| ip(own) == from);
                assert!(is_external, "{from} went out: {:?}", work.tuple());
            } else {
                assert!(memory.is_owned(&AddressKey::from(to)), "{to} is nobody's");
            }
            Some((verdict == Verdict::Out, bytes))
        }
        _ => {
            if let Verdict::Pass(event) = verdict {
                assert_eq!(bytes, before, "what passes is untouched");
                let is_refused = event == NatEvent::PassedToRefuse;
                if nic.is_none() && !is_refused {
                    check_uncovered(memory, rules, &work);
                }
            }
            if let Verdict::Answer(error) = verdict {
                assert_eq!(bytes, before, "what is answered is untouched");
                assert!(nic.is_some() || memory.is_owned(&work.tuple().source));
                let mut packet = Owned(bytes);
                match answer(&mut packet, memory, rules, &mut work, error) {
                    Verdict::Out | Verdict::In => {
                        let [from, to] = ends(before).expect("it has");
                        assert_eq!(ends(&packet.0), Some([to, from]), "it goes back");
                        let max = if from.is_ipv4() { 576 } else { 1280 };
                        assert!(packet.0.len() <= max, "every host takes it");
                        let has_header_sum = right(&packet.0).contains(&Checksum::Header);
                        assert_eq!(has_header_sum, from.is_ipv4());
                    }
                    Verdict::Drop(_) => {}
                    verdict => panic!("an answer: {verdict:?}"),
                }
            }
            None
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Nothing that a rule gives another source goes out as it is, but in answer to who may speak to it as it is.
fn check_uncovered(memory: &mut Memory, rules: &RuleSet, work: &Work) {
    use wg_common::nat::engine::Route;

    let tuple = work.tuple();
    if *tuple == *Work::EMPTY.tuple() {
        // It has no IP header.
        return;
    }
    let Route::Out(to) = memory.route(tuple, 0) else { return };
    let covered = rules.nat[..rules.nat_count as usize]
        .iter()
        .any(|rule| rule.out == to && rule.from.distance(&tuple.source) == 0);
    let flow = memory.flows.get(&tuple.flow_from_inside());
    let is_plain =
        |flow: &Flow| [FlowKind::Plain as u8, FlowKind::PlainInbound as u8].contains(&flow.kind);
    let began_outside = if tuple.kind == Kind::Error {
        // About a flow of its sender's own.
        memory.flows.iter().any(|(key, flow)| {
            is_plain(flow) && (key.inner, key.remote) == (tuple.source, tuple.destination)
        })
    } else {
        flow.is_some_and(|flow| flow.kind == FlowKind::PlainInbound as u8)
    };
    assert!(to == PLACE.tun || !covered || began_outside, "{tuple:?} left as it was");
}

/// The tables hold together.
fn check_tables(memory: &mut Memory) {
    let flows: Vec<_> = memory.flows.values().copied().collect();
    for flow in flows {
        let has_slot = flow.slot != NO_SLOT;
        assert_eq!(has_slot, flow.kind == FlowKind::Source as u8, "{flow:?}");
        if has_slot {
            let slot = memory.slots[&flow.slot];
            assert!(slot.generation >= flow.generation, "{slot:?} of {flow:?}");
        }
    }
    // Nobody has a slot whose port is free.
    for (ring, free) in &memory.free {
        for port in free {
            let slot = memory.slots.get(&(ring * PORTS_LEN + port));
            assert!(slot.is_none_or(|slot| slot.generation % 2 == 0), "{slot:?} of {port}");
        }
    }
}

/// Lives of each kind of rules: who is inside speaks, is answered, and hears of errors.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for flags in [0b010, 0b1010, 0b100_0001, 0b110_1011, 0b100] {
        for choice in 0..2_u8 {
            // Rules: flags, externals, then choices; then packets out, their answers, errors about both.
            let mut seed = vec![flags, 0, 0, 0, 0, choice, 0, 0, 0, choice, 0, 0, 0, 0];
            for kind in [0, 4, 8, 3] {
                seed.extend([255, 0xf0 | choice, 0, 0, 0, 1, 0xa5, 2, kind, 0, 0xfe, 0]);
                seed.extend([30, 0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 0, 0, 0]);
            }
            seeds.push(seed.clone());
            seed.extend([3, flags ^ 1, 0, 0, 0, 0, choice]);
            seed.extend(seeds[0].clone());
            seeds.push(seed);
        }
    }
    seeds
}
