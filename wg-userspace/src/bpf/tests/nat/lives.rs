//! Random lives of a gateway, of which each packet goes through the program in the kernel and through the engine over
//! tables in memory: both decide the same, write the same, and end with the same tables.

use std::cell::RefCell;
use std::collections::HashMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use wg_common::nat::engine::{Segments, Verdict, Work, answer, from_nic, from_tunnel};
use wg_common::nat::map::{Flow, PORTS_LEN, RuleSet, Slot};
use wg_common::nat::packet::Buffer;
use wg_common::outcome::{DropReason, NatEvent};

use super::lab::{Lab, Ran};
use super::life::{EXTERNALS, Life, RING_LEN, Step, check_sums, no_rules};
use super::memory::{Memory, Owned};
use crate::bpf::NatVerdict;
use crate::require_root;
use crate::sys::clock;
use crate::sys::netns::in_new_netns;

/// Both sides.
struct Two {
    lab: Lab,
    memory: Memory,
    rules: Box<RuleSet>,
    verdicts: HashMap<String, u32>,
}

/// What does not depend on when it was.
fn timeless(flow: &Flow) -> Flow {
    Flow { last_seen_ns: 0, created_ns: 0, ..*flow }
}

impl Two {
    fn new(lab: Lab) -> Self {
        let memory = Memory::new(lab.place);
        let rules = no_rules(lab.place, 0);
        Self { lab, memory, rules, verdicts: HashMap::new() }
    }

    /// Nothing is left of a life but what is known of fragments, on both sides.
    fn clear(&mut self) {
        self.lab.clear();
        self.memory.flows.clear();
        self.memory.mappings.clear();
        self.memory.slots = self.lab.slots();
        self.memory.free.clear();
        for ring in 0..3 * EXTERNALS.len() as u32 {
            (0..RING_LEN).for_each(|port| self.memory.free_port(ring, port));
        }
    }

    fn live(&mut self, script: &[u8]) -> Result<(), TestCaseError> {
        self.clear();
        let mut life = Life::new(script, self.lab.place);
        while let Some(step) = life.next() {
            match step {
                Step::Rules(rules) => {
                    self.lab.swap_rules(&rules);
                    self.rules = rules;
                }
                Step::Ends { ring, port } => {
                    let slot = ring * PORTS_LEN + port;
                    self.lab.nat.end_slot(slot).unwrap();
                    if self.memory.end_slot(slot) {
                        self.memory.free_port(ring, port);
                        prop_assert!(self.lab.nat.free_port(ring, port));
                    }
                }
                Step::Packet { nic, bytes, gso_size } => {
                    if let Some(goes_out) = self.packet(nic, &bytes, gso_size)? {
                        life.sent(goes_out.0, goes_out.1);
                    }
                }
            }
        }
        self.compare_tables()
    }

    fn packet(
        &mut self,
        nic: Option<usize>,
        packet: &[u8],
        gso_size: u32,
    ) -> Result<Option<(bool, Vec<u8>)>, TestCaseError> {
        let header_len = if packet[0] >> 4 == 6 { 40 } else { 20 };
        if packet.len() < header_len {
            // The kernel takes no such for a test run.
            return Ok(None);
        }
        let ran = self.lab.run(nic, packet, gso_size);
        let (mut bytes, mut work) = (packet.to_vec(), Work::EMPTY);
        let memory = &mut self.memory;
        memory.now_ns = clock::boot_now().boot_ns();
        memory.ifindex = nic.map_or(self.lab.place.tun, |nic| self.lab.place.nics[nic]);
        memory.segments = Segments { len: gso_size, count: 0 };
        if gso_size != 0 {
            memory.segments.count = (packet.len() as u32 + 14).div_ceil(gso_size);
        }
        memory.answers = !ran.drops.contains(&DropReason::AnswerLimited);
        let mut buffer = Buffer::finished(&mut bytes);
        let judged = match nic {
            // No device lets anything else out of the tunnel.
            None => from_tunnel(&mut buffer, memory, &self.rules, &mut work),
            Some(_) => from_nic(&mut buffer, memory, &self.rules, &mut work),
        };
        *self.verdicts.entry(format!("{judged:?}")).or_default() += 1;
        let is_answered = matches!(judged, Verdict::Answer(_));
        let verdict = match judged {
            Verdict::Answer(error) => {
                let mut owned = Owned(bytes);
                let verdict = answer(&mut owned, memory, &self.rules, &mut work, error);
                bytes = owned.0;
                verdict
            }
            verdict => verdict,
        };
        let mut events = std::mem::take(&mut memory.events);
        let (expected, counted) = match verdict {
            Verdict::Pass(event) => (NatVerdict::Next, Ok(event)),
            Verdict::Drop(reason) => (NatVerdict::Drop, Err(reason)),
            Verdict::Out | Verdict::In if is_answered => {
                (NatVerdict::Redirect, Ok(NatEvent::Answered))
            }
            Verdict::Out => (NatVerdict::Redirect, Ok(NatEvent::TranslatedOut)),
            Verdict::In => (NatVerdict::Redirect, Ok(NatEvent::TranslatedIn)),
            Verdict::Answer(_) => panic!("an answer is not answered"),
        };
        let mut drops = Vec::new();
        counted.map_or_else(|reason| drops.push(reason), |event| events.push(event));
        let Ran { verdict: found, packet: left, drops: dropped, events: happened, .. } = ran;
        prop_assert_eq!(found, expected, "{:?} of the engine", verdict);
        let mut happened: Vec<_> =
            happened.into_iter().filter(|event| *event != NatEvent::Resolved).collect();
        happened.sort_by_key(|event| *event as u8);
        events.sort_by_key(|event| *event as u8);
        prop_assert_eq!((&dropped, &happened), (&drops, &events), "{:?} of the engine", verdict);
        match verdict {
            Verdict::Out | Verdict::In if is_answered => {
                prop_assert_eq!(&left, &bytes, "{:?}", judged);
                Ok(None)
            }
            Verdict::Out | Verdict::In => {
                prop_assert_eq!(&left, &bytes, "{:?}", verdict);
                check_sums(packet, &left);
                Ok(Some((verdict == Verdict::Out, left)))
            }
            Verdict::Pass(_) => {
                prop_assert_eq!(&left[..], packet, "it passes as it is");
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    fn compare_tables(&mut self) -> Result<(), TestCaseError> {
        let (flows, memory) = (self.lab.flows(), &self.memory);
        for (key, flow) in &memory.flows {
            let found = flows.get(key).map(timeless);
            prop_assert_eq!(found, Some(timeless(flow)), "{:?}", key);
        }
        prop_assert_eq!(flows.len(), memory.flows.len());
        prop_assert_eq!(self.lab.mappings(), memory.mappings.clone());
        for (index, slot) in self.lab.slots() {
            let timeless = |slot: &Slot| Slot { last_seen_ns: 0, ..*slot };
            let found = memory.slots.get(&index).map(timeless);
            prop_assert_eq!(found, Some(timeless(&slot)), "slot {}", index);
        }
        for (ring, free) in &memory.free {
            let count = self.lab.nat.free_port_count(*ring);
            prop_assert_eq!(count as usize, free.len(), "ring {}", ring);
        }
        Ok(())
    }
}

#[test]
fn the_kernel_decides_and_writes_what_the_engine_does() {
    require_root!();
    in_new_netns(|| {
        let test = "the_kernel_decides_and_writes_what_the_engine_does";
        let Some(lab) = Lab::new(test, Lab::options()) else { return };
        let two = RefCell::new(Two::new(lab));
        let scripts = proptest::collection::vec(any::<u8>(), 100..1500);
        let outcome =
            TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(200) })
                .run(&scripts, |script| two.borrow_mut().live(&script));
        let two = two.into_inner();
        let mut verdicts: Vec<_> = two.verdicts.iter().collect();
        verdicts.sort();
        println!("{test}: {verdicts:#?}");
        if let Err(error) = outcome {
            panic!("{error}");
        }
        // Lives are about something.
        for verdict in ["Out", "In", "Pass(PassedAllowed)", "Drop(Unsolicited)", "Drop(NotAllowed)"]
        {
            assert!(two.verdicts.contains_key(verdict), "{verdict} never was");
        }
    });
}
