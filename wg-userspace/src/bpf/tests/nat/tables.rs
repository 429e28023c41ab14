//! Packets in, packets out: each row is a gateway with its rules and some packets, each with what becomes of it.

use std::net::IpAddr;

use wg_common::nat::map::{
    AllowRule, External, FlowKind, ForwardRule, NatRule, Protocol, RuleSet, SEEN_IN, SEEN_OUT,
    ring, rule_flags, slot_index,
};
use wg_common::outcome::{DropReason, NatEvent};

use super::lab::Lab;
use super::life::{EXTERNALS, PORT_FIRST, check_sums, no_rules};
use super::memory::{LISTENED, Place, key, prefix};
use super::packets::{
    ACK, Checksum, Content, ICMP, ICMPV6, Packet, SYN, TCP, UDP, ends as ends_of, right,
};
use crate::bpf::{NatOptions, NatVerdict};
use crate::require_root;
use crate::sys::netns::in_new_netns;

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Is {
    /// Out of a NIC, to a next hop whose link address is known.
    Out,
    /// Out of a NIC; the kernel asks for the link address.
    OutToUnknown,
    /// Into the tunnel.
    In,
    Pass(NatEvent),
    Drop(DropReason),
    /// Its sender is told by an ICMP error with this type, code and last word of its header; or that would be one
    /// error more than he is sent in a second.
    Told(u8, u8, u32),
}
use Is::{Drop, In, Out, OutToUnknown, Pass, Told};

const FOREIGN: Is = Pass(NatEvent::PassedForeign);
const ALLOWED: Is = Pass(NatEvent::PassedAllowed);
const TO_REFUSE: Is = Pass(NatEvent::PassedToRefuse);

/// A packet, and what becomes of it.
struct Step {
    nic: Option<usize>,
    packet: Vec<u8>,
    gso_size: u32,
    is: Is,
    /// What leaves.
    left: Vec<u8>,
    /// An event that is counted besides.
    besides: Option<NatEvent>,
}

impl Step {
    fn gso(self, gso_size: u32) -> Self {
        Self { gso_size, ..self }
    }

    fn besides(self, event: NatEvent) -> Self {
        Self { besides: Some(event), ..self }
    }

    /// Both with bytes behind them that are no part of the packet.
    fn padded(mut self) -> Self {
        self.packet.extend([0xee; 9]);
        self.left.extend([0xee; 9]);
        self
    }
}

/// A packet that leaves as another one, less a hop.
fn leaves(nic: Option<usize>, packet: &Packet, is: Is, left: Packet) -> Step {
    let left = Packet { ttl: left.ttl - 1, ..left }.bytes();
    Step { nic, packet: packet.bytes(), gso_size: 0, is, left, besides: None }
}

/// A packet that does not leave, or as it is.
fn stays(nic: Option<usize>, packet: &Packet, is: Is) -> Step {
    stays_raw(nic, packet.bytes(), is)
}

fn stays_raw(nic: Option<usize>, packet: Vec<u8>, is: Is) -> Step {
    Step { nic, left: packet.clone(), packet, gso_size: 0, is, besides: None }
}

const TUN: Option<usize> = None;
const NIC: Option<usize> = Some(0);

type At = (IpAddr, u16);

/// Who speaks, in one family.
struct Ends {
    is_v4: bool,
    inner: At,
    /// To whom a port is forwarded, and by which one he is reached.
    server: At,
    forwarded: At,
    remote: At,
    /// Its next hop's link address is not known.
    far: At,
    router: IpAddr,
    external: At,
    unowned: At,
    /// This host.
    own: At,
}

fn ends(is_v4: bool) -> Ends {
    let of =
        |v4: &str, v6: &str, port| -> At { (if is_v4 { v4 } else { v6 }.parse().unwrap(), port) };
    Ends {
        is_v4,
        inner: of("10.9.0.2", "fd09::2", 4000),
        server: of("10.9.0.3", "fd09::3", 80),
        forwarded: of("192.0.2.1", "2001:db8::1", 8080),
        remote: of("203.0.113.9", "2001:db8:9::9", 53),
        far: of("198.51.100.7", "2001:db8:51::7", 53),
        router: of("203.0.113.1", "2001:db8:9::1", 0).0,
        external: of("192.0.2.1", "2001:db8::1", PORT_FIRST),
        unowned: of("10.8.0.2", "fd08::2", 4000),
        own: of("10.9.0.1", "fd09::1", 53),
    }
}

/// What is spoken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Speech {
    Tcp,
    Udp,
    UdpWithoutChecksum,
    Echo,
}
use Speech::{Echo, Tcp, Udp, UdpWithoutChecksum};

const SPEECHES: [Speech; 4] = [Tcp, Udp, UdpWithoutChecksum, Echo];

impl Speech {
    fn packet(self, from: At, to: At, is_answer: bool, data: Vec<u8>) -> Packet {
        let ports = [from.1, to.1];
        let content = match self {
            Tcp => Content::Tcp { ports, flags: if is_answer { SYN | ACK } else { SYN }, data },
            Udp => Content::Udp { ports, has_checksum: true, data },
            UdpWithoutChecksum => Content::Udp { ports, has_checksum: false, data },
            // The identifier is the asking one's.
            Echo => {
                Content::Echo { is_request: !is_answer, id: ports[usize::from(is_answer)], data }
            }
        };
        Packet::new(from.0, to.0, content)
    }

    fn asks(self, from: At, to: At) -> Packet {
        self.packet(from, to, false, b"An odd number of bytes.".to_vec())
    }

    fn answers(self, from: At, to: At) -> Packet {
        self.packet(from, to, true, vec![0xff; 40])
    }

    fn protocol(self, is_v4: bool) -> u8 {
        match self {
            Tcp => TCP,
            Udp | UdpWithoutChecksum => UDP,
            Echo if is_v4 => ICMP,
            Echo => ICMPV6,
        }
    }

    fn slots(self) -> Protocol {
        match self {
            Tcp => Protocol::Tcp,
            Udp | UdpWithoutChecksum => Protocol::Udp,
            Echo => Protocol::Echo,
        }
    }
}

/// An ICMP error about a packet that has gone a hop, of which it quotes all or no more than it must.
fn error(from: IpAddr, to: IpAddr, kind: [u8; 2], about: Packet, is_short: bool) -> Packet {
    let about = Packet { ttl: about.ttl - 1, ..about };
    let mut quoted = about.bytes();
    if is_short {
        quoted.truncate(if from.is_ipv4() { 28 } else { 48 });
    }
    Packet::new(from, to, Content::Error { kind, rest: [0, 0, 5, 0x14], quoted })
}

fn kinds(is_v4: bool) -> [[u8; 2]; 4] {
    if is_v4 { [[3, 3], [3, 4], [11, 0], [12, 0]] } else { [[1, 4], [2, 0], [3, 0], [4, 0]] }
}

/// All addresses are there, and no rule uses them.
fn quiet(place: Place) -> Box<RuleSet> {
    let mut rules = no_rules(place, 1);
    for (at, (address, nic)) in rules.externals.iter_mut().zip(EXTERNALS) {
        *at = External { address: key(address), nic: place.nics[nic], generation: 0 };
    }
    rules.external_count = EXTERNALS.len() as u32;
    rules
}

fn masquerade(place: Place) -> Box<RuleSet> {
    let mut rules = quiet(place);
    let rule = |from, nic: usize, external_first| NatRule {
        from,
        out: place.nics[nic],
        external_first,
        external_count: 1,
    };
    rules.nat[0] = rule(prefix("0.0.0.0", 0), 0, 0);
    rules.nat[1] = rule(prefix("fd09::", 64), 0, 3);
    rules.nat[2] = rule(prefix("10.9.0.0", 24), 1, 2);
    rules.nat_count = 3;
    rules
}

fn forwards(place: Place) -> Box<RuleSet> {
    let mut rules = masquerade(place);
    let all = [true, false].into_iter().flat_map(|is_v4| [(is_v4, Tcp), (is_v4, Udp)]);
    for (rule, (is_v4, speech)) in rules.forward.iter_mut().zip(all) {
        let Ends { server, forwarded, .. } = ends(is_v4);
        *rule = ForwardRule {
            external: forwarded.0.into(),
            to: server.0.into(),
            nic: place.nics[0],
            port: forwarded.1.to_be(),
            to_port: server.1.to_be(),
            protocol: speech.slots() as u32,
        };
    }
    rules.forward_count = 4;
    rules
}

/// From the inner address to the remote one, whatever it is; and to the forwarded port's owner.
fn allows(place: Place) -> Box<RuleSet> {
    let mut rules = quiet(place);
    rules.flags = rule_flags::DENY;
    for (number, is_v4) in [true, false].into_iter().enumerate() {
        let Ends { inner, remote, .. } = ends(is_v4);
        rules.allow[number] = AllowRule {
            from: prefix(&inner.0.to_string(), if is_v4 { 32 } else { 128 }),
            to: prefix(&remote.0.to_string(), if is_v4 { 32 } else { 128 }),
            protocol: 0,
            port_first: 0,
            port_last: u16::MAX,
            counter: number as u32,
        };
    }
    rules.allow_count = 2;
    rules
}

/// Plays a row, and leaves the tables as they are then.
#[track_caller]
fn play(lab: &mut Lab, name: &str, rules: &RuleSet, steps: &[Step]) {
    lab.clear();
    lab.swap_rules(rules);
    for (number, step) in steps.iter().enumerate() {
        let ran = lab.run(step.nic, &step.packet, step.gso_size);
        let name = format!("{name}, packet {number}, {:?}: {ran:02x?}", step.is);
        if let Told(kind, code, rest) = step.is {
            if ran.drops == [DropReason::AnswerLimited] {
                assert_eq!(ran.verdict, NatVerdict::Drop, "{name}");
                continue;
            }
            assert_eq!((ran.verdict, &ran.drops), (NatVerdict::Redirect, &vec![]), "{name}");
            assert!(ran.events.contains(&NatEvent::Answered), "{name}");
            let [from, to] = ends_of(&step.packet).unwrap();
            assert_eq!(ends_of(&ran.packet), Some([to, from]), "{name}");
            let is_v4 = from.is_ipv4();
            let (at, protocol, max) = if is_v4 { (20, 1, 576) } else { (40, 58, 1280) };
            assert_eq!(ran.packet[if is_v4 { 9 } else { 6 }], protocol, "{name}");
            assert_eq!(ran.packet[at..at + 2], [kind, code], "{name}");
            assert_eq!(ran.packet[at + 4..at + 8], rest.to_be_bytes(), "{name}");
            assert!(step.packet.starts_with(&ran.packet[at + 8..]), "{name}: as it was sent");
            let whole = at + 8 + step.packet.len();
            assert_eq!(ran.packet.len(), whole.min(max) & !3, "{name}");
            let sums = right(&ran.packet);
            assert!(sums.contains(&Checksum::Upper), "{name}");
            assert_eq!(sums.contains(&Checksum::Header), is_v4, "{name}");
            continue;
        }
        let (verdict, drops, event) = match step.is {
            Out | OutToUnknown => (NatVerdict::Redirect, vec![], Some(NatEvent::TranslatedOut)),
            In => (NatVerdict::Redirect, vec![], Some(NatEvent::TranslatedIn)),
            Pass(event) => (NatVerdict::Next, vec![], Some(event)),
            Drop(reason) => (NatVerdict::Drop, vec![reason], None),
            Told(..) => unreachable!("looked at above"),
        };
        assert_eq!((ran.verdict, &ran.drops), (verdict, &drops), "{name}");
        let mut events: Vec<_> = event.into_iter().chain(step.besides).collect();
        let mut found = ran.events.clone();
        // Once in about a second the kernel looks after a next hop that is known.
        if step.is == OutToUnknown {
            events.push(NatEvent::Resolved);
        } else if ran.is_stale {
            found.retain(|event| *event != NatEvent::Resolved);
        }
        events.sort_by_key(|event| *event as u8);
        assert_eq!(found, events, "{name}");
        if step.is == Out && !ran.is_stale {
            assert!(ran.is_addressed(), "{name}");
        }
        if verdict != NatVerdict::Drop {
            assert_eq!(ran.packet, step.left, "{name}");
            check_sums(&step.packet, &ran.packet);
            // What is expected was summed up from scratch, so that this is a look at the row as well.
            assert_eq!(right(&step.packet), right(&ran.packet), "{name}");
        }
    }
}

/// Runs rows in both families, with everything that is spoken.
fn with_all(test: &'static str, rows: impl Fn(&mut Lab, &str, &Ends, Speech) + Send + Sync) {
    require_root!();
    in_new_netns(|| {
        let Some(mut lab) = Lab::new(test, Lab::options()) else { return };
        for is_v4 in [true, false] {
            for speech in SPEECHES {
                let name = format!("{speech:?}, {}", if is_v4 { "IPv4" } else { "IPv6" });
                rows(&mut lab, &name, &ends(is_v4), speech);
            }
        }
    });
}

#[test]
fn what_is_masqueraded_goes_out_and_answers_come_back() {
    with_all("what_is_masqueraded_goes_out_and_answers_come_back", |lab, name, e, speech| {
        let rules = masquerade(lab.place);
        let (asks, answers) =
            (speech.asks(e.inner, e.remote), speech.answers(e.remote, e.external));
        let out = || leaves(TUN, &asks, Out, speech.asks(e.external, e.remote));
        let back = || leaves(NIC, &answers, In, speech.answers(e.remote, e.inner));
        play(lab, name, &rules, &[out(), back(), out(), back().padded(), out().padded()]);

        // The flow, what answers from elsewhere are known by, the mapping and the slot.
        let protocol = speech.protocol(e.is_v4);
        let port = |port| if speech == Echo { 0 } else { u16::to_be(port) };
        let flows = lab.flows();
        assert_eq!(flows.len(), if speech == Echo { 1 } else { 2 }, "{name}");
        let (key, flow) = flows
            .iter()
            .find(|(key, _)| key.remote_port == port(e.remote.1))
            .unwrap_or_else(|| panic!("{name}: {flows:?}"));
        assert_eq!((key.inner, key.remote), (e.inner.0.into(), e.remote.0.into()), "{name}");
        assert_eq!((key.inner_port, key.protocol), (e.inner.1.to_be(), protocol), "{name}");
        assert_eq!(flow.kind, FlowKind::Source as u8, "{name}");
        assert_eq!(flow.external, e.external.0.into(), "{name}");
        assert_eq!(flow.external_port, e.external.1.to_be(), "{name}");
        assert_eq!((flow.nic, flow.packets), (lab.place.nics[0], [3, 2]), "{name}");
        let lens = [3 * asks.bytes().len() + 9, 2 * answers.bytes().len() + 9];
        assert_eq!(flow.bytes, lens.map(|len| len as u64), "{name}");
        if speech != Tcp {
            assert_eq!(flow.state, SEEN_OUT | SEEN_IN, "{name}");
        }
        let external = if e.is_v4 { 0 } else { 3 };
        assert_eq!(flow.slot, slot_index(ring(external, speech.slots()), 0), "{name}");
        let slot = lab.slots()[&flow.slot];
        assert_eq!((slot.inner, slot.inner_port), (e.inner.0.into(), e.inner.1.to_be()), "{name}");
        assert_eq!((slot.generation, slot.generation % 2), (flow.generation, 1), "{name}");
        let mappings = lab.mappings();
        let [(key, mapping)] = mappings.iter().collect::<Vec<_>>()[..] else {
            panic!("{name}: {mappings:?}")
        };
        assert_eq!((key.inner, key.inner_port), (slot.inner, slot.inner_port), "{name}");
        assert_eq!((key.protocol, key.nic), (protocol, lab.place.nics[0]), "{name}");
        assert_eq!((mapping.slot, mapping.generation), (flow.slot, slot.generation), "{name}");
    });
}

#[test]
fn ways_ports_and_strangers() {
    with_all("ways_ports_and_strangers", |lab, name, e, speech| {
        let rules = masquerade(lab.place);
        let asks = |from: At, to: At| speech.asks(from, to);
        let out = |is, from: At, by: At, to: At| leaves(TUN, &asks(from, to), is, asks(by, to));
        let to_far = out(OutToUnknown, e.inner, e.external, e.far);
        play(lab, &format!("{name}, next hop unknown"), &rules, &[to_far]);
        if e.is_v4 {
            let other: At = ("172.31.5.5".parse().unwrap(), 53);
            let by: At = ("172.31.0.1".parse().unwrap(), PORT_FIRST);
            let steps = [
                out(OutToUnknown, e.inner, by, other),
                leaves(Some(1), &speech.answers(other, by), In, speech.answers(other, e.inner)),
                // It is not the first NIC's.
                stays(NIC, &speech.answers(other, by), FOREIGN),
            ];
            play(lab, &format!("{name}, the other NIC"), &rules, &steps);
        }

        // Mappings are the same whoever is spoken with, and end with the ports.
        let inner = |port| (e.inner.0, port);
        let by = |port| (e.external.0, port);
        let mut steps = vec![out(Out, inner(1), by(PORT_FIRST), e.remote)];
        steps.push(out(OutToUnknown, inner(1), by(PORT_FIRST), e.far));
        if speech == Echo {
            steps.push(out(Out, inner(2), by(LISTENED), e.remote));
            steps.push(out(Out, inner(3), by(PORT_FIRST + 2), e.remote));
        } else {
            let listened = out(Out, inner(2), by(PORT_FIRST + 2), e.remote);
            steps.push(listened.besides(NatEvent::PortInUse));
        }
        steps.push(out(Out, inner(4), by(PORT_FIRST + 3), e.remote));
        steps.push(stays(TUN, &asks(inner(5), e.remote), Drop(DropReason::NoPort)));
        steps.push(out(Out, inner(1), by(PORT_FIRST), e.remote));
        play(lab, &format!("{name}, ports"), &rules, &steps);

        let stranger = speech.answers((e.router, 53), e.external);
        let is = if speech == Echo { FOREIGN } else { Drop(DropReason::Unsolicited) };
        let steps = [
            stays(NIC, &stranger, FOREIGN),
            out(Out, e.inner, e.external, e.remote),
            stays(NIC, &stranger, is),
            stays(NIC, &speech.answers(e.remote, (e.external.0, 1234)), FOREIGN),
            stays(TUN, &asks(e.unowned, e.remote), Drop(DropReason::SourceUnowned)),
            // To this host, to another peer, and to nobody: the kernel's.
            stays(TUN, &asks(e.inner, e.own), FOREIGN),
            stays(TUN, &asks(e.inner, (e.server.0, 9)), FOREIGN),
        ];
        play(lab, &format!("{name}, strangers"), &rules, &steps);
        play(
            lab,
            &format!("{name}, no rules"),
            &quiet(lab.place),
            &[
                stays(TUN, &asks(e.inner, e.remote), FOREIGN),
                stays(NIC, &speech.answers(e.remote, e.inner), FOREIGN),
            ],
        );
        assert!(lab.flows().is_empty() && lab.mappings().is_empty());
    });
}

#[test]
fn errors_go_both_ways_with_what_they_quote() {
    with_all("errors_go_both_ways_with_what_they_quote", |lab, name, e, speech| {
        let mut steps = vec![
            leaves(TUN, &speech.asks(e.inner, e.remote), Out, speech.asks(e.external, e.remote)),
            leaves(
                NIC,
                &speech.answers(e.remote, e.external),
                In,
                speech.answers(e.remote, e.inner),
            ),
        ];
        for kind in kinds(e.is_v4) {
            for is_short in [true, false] {
                // A router and the remote host, about what was asked; then the inner one about the answer.
                for from in [e.router, e.remote.0] {
                    let about =
                        |to: At| error(from, to.0, kind, speech.asks(to, e.remote), is_short);
                    steps.push(leaves(NIC, &about(e.external), In, about(e.inner)));
                }
                let about = |from: At| {
                    error(from.0, e.remote.0, kind, speech.answers(e.remote, from), is_short)
                };
                steps.push(leaves(TUN, &about(e.inner), Out, about(e.external)));
            }
        }
        let unknown = error(
            e.router,
            e.external.0,
            kinds(e.is_v4)[0],
            speech.asks((e.external.0, PORT_FIRST + 3), e.remote),
            false,
        );
        steps.push(stays(NIC, &unknown, FOREIGN));
        let unknown = error(
            e.inner.0,
            e.remote.0,
            kinds(e.is_v4)[0],
            speech.answers(e.remote, (e.inner.0, 9)),
            false,
        );
        steps.push(stays(TUN, &unknown, Drop(DropReason::UnrelatedError)));
        let rules = masquerade(lab.place);
        play(lab, name, &rules, &steps);
        let before = if speech == Echo { 1 } else { 2 };
        assert_eq!(lab.flows().len(), before, "{name}: errors begin nothing");
    });
}

#[test]
fn forwarded_ports_are_reached_from_both_sides() {
    with_all("forwarded_ports_are_reached_from_both_sides", |lab, name, e, speech| {
        if speech == Echo {
            return;
        }
        let rules = forwards(lab.place);
        let there =
            leaves(NIC, &speech.asks(e.remote, e.forwarded), In, speech.asks(e.remote, e.server));
        let back = leaves(
            TUN,
            &speech.answers(e.server, e.remote),
            Out,
            speech.answers(e.forwarded, e.remote),
        );
        let mut steps = vec![there, back];
        for kind in kinds(e.is_v4) {
            for is_short in [true, false] {
                let about =
                    |to: At| error(e.router, to.0, kind, speech.answers(to, e.remote), is_short);
                steps.push(leaves(NIC, &about(e.forwarded), In, about(e.server)));
                let about =
                    |to: At| error(to.0, e.remote.0, kind, speech.asks(e.remote, to), is_short);
                steps.push(leaves(TUN, &about(e.server), Out, about(e.forwarded)));
            }
        }
        steps.push(stays(NIC, &speech.asks(e.remote, (e.forwarded.0, 8081)), FOREIGN));
        steps.push(stays(Some(1), &speech.asks(e.remote, e.forwarded), FOREIGN));
        play(lab, name, &rules, &steps);
        let flows = lab.flows();
        let [(key, flow)] = flows.iter().collect::<Vec<_>>()[..] else {
            panic!("{name}: {flows:?}")
        };
        assert_eq!((key.inner, key.inner_port), (e.server.0.into(), e.server.1.to_be()), "{name}");
        assert_eq!(flow.kind, FlowKind::Forward as u8, "{name}");
        assert_eq!((flow.external_port, flow.packets), (e.forwarded.1.to_be(), [1, 1]), "{name}");

        // From inside: the server sees who asks, who asks sees the outer address.
        play(
            lab,
            &format!("{name}, hairpin"),
            &rules,
            &[
                leaves(TUN, &speech.asks(e.inner, e.forwarded), In, speech.asks(e.inner, e.server)),
                leaves(
                    TUN,
                    &speech.answers(e.server, e.inner),
                    In,
                    speech.answers(e.forwarded, e.inner),
                ),
                stays(TUN, &speech.asks(e.unowned, e.forwarded), Drop(DropReason::SourceUnowned)),
            ],
        );
    });
}

#[test]
fn what_is_not_allowed_is_dropped_and_what_is_passes_untouched() {
    let test = "what_is_not_allowed_is_dropped_and_what_is_passes_untouched";
    with_all(test, |lab, name, e, speech| {
        let rules = allows(lab.place);
        let counter = u32::from(!e.is_v4);
        let before = lab.nat.allowed(counter).unwrap();
        let denied = Drop(DropReason::NotAllowed);
        let kind = kinds(e.is_v4)[0];
        let about = error(e.router, e.inner.0, kind, speech.asks(e.inner, e.remote), false);
        let unrelated = error(e.router, e.inner.0, kind, speech.asks(e.server, e.remote), false);
        // What is known of fragments outlives rows.
        let id = 0x200 + speech as u16;
        let first = Packet { fragment: Some((0, true)), id, ..speech.asks(e.inner, e.remote) };
        let later = Packet {
            fragment: Some((64, false)),
            content: Content::Other { protocol: speech.protocol(e.is_v4), data: vec![7; 33] },
            ..first.clone()
        };
        play(
            lab,
            name,
            &rules,
            &[
                stays(NIC, &speech.answers(e.remote, e.inner), denied),
                stays(TUN, &speech.asks(e.inner, e.remote), ALLOWED),
                stays(NIC, &speech.answers(e.remote, e.inner), ALLOWED),
                stays(NIC, &about, ALLOWED),
                stays(NIC, &unrelated, Drop(DropReason::UnrelatedError)),
                stays(TUN, &later, Drop(DropReason::FragmentUnknown)),
                stays(TUN, &first, ALLOWED),
                stays(TUN, &later, ALLOWED),
                stays(TUN, &speech.asks(e.server, e.remote), denied),
                stays(TUN, &speech.asks(e.inner, e.server), denied),
                stays(NIC, &speech.asks(e.remote, e.server), denied),
                stays(TUN, &speech.asks(e.unowned, e.remote), Drop(DropReason::SourceUnowned)),
                // The host's own.
                stays(NIC, &speech.asks(e.remote, e.forwarded), FOREIGN),
            ],
        );
        assert_eq!(lab.nat.allowed(counter).unwrap() - before, 1, "{name}: it began one flow");
        assert!(lab.flows().values().all(|flow| flow.kind == FlowKind::Plain as u8), "{name}");
    });
}

#[test]
fn hops_and_sizes() {
    with_all("hops_and_sizes", |lab, name, e, speech| {
        let rules = masquerade(lab.place);
        let asks = |ttl| Packet { ttl, ..speech.asks(e.inner, e.remote) };
        let answers = |ttl| Packet { ttl, ..speech.answers(e.remote, e.external) };
        let there =
            |ttl| leaves(TUN, &asks(ttl), Out, Packet { ttl, ..speech.asks(e.external, e.remote) });
        let back = |ttl| {
            leaves(NIC, &answers(ttl), In, Packet { ttl, ..speech.answers(e.remote, e.inner) })
        };
        play(
            lab,
            &format!("{name}, hops"),
            &rules,
            &[
                stays(TUN, &asks(1), TO_REFUSE),
                stays(TUN, &asks(0), TO_REFUSE),
                there(2),
                back(255),
                stays(TUN, &asks(1), TO_REFUSE),
                stays(NIC, &answers(1), Told(if e.is_v4 { 11 } else { 3 }, 0, 0)),
                stays(NIC, &answers(0), Told(if e.is_v4 { 11 } else { 3 }, 0, 0)),
            ],
        );

        // As large as the devices take, one byte more, and super-packets of such.
        let head = (if e.is_v4 { 20 } else { 40 }) + if speech == Tcp { 20 } else { 8 };
        let of = |from, to, is_answer, len: usize, dont_fragment| {
            let data = (0..len).map(|byte| byte as u8).collect();
            Packet { dont_fragment, ..speech.packet(from, to, is_answer, data) }
        };
        let out = |len, df| {
            leaves(
                TUN,
                &of(e.inner, e.remote, false, len, df),
                Out,
                of(e.external, e.remote, false, len, df),
            )
        };
        let too_large = |len, df| {
            let is = if df || !e.is_v4 { TO_REFUSE } else { Drop(DropReason::TooLarge) };
            stays(TUN, &of(e.inner, e.remote, false, len, df), is)
        };
        let back = |len| {
            leaves(
                NIC,
                &of(e.remote, e.external, true, len, true),
                In,
                of(e.remote, e.inner, true, len, true),
            )
        };
        let too_large_back = |len| {
            let told = if e.is_v4 { Told(3, 4, 1420) } else { Told(2, 0, 1420) };
            stays(NIC, &of(e.remote, e.external, true, len, true), told)
        };
        let mut steps = vec![
            out(1500 - head, true),
            out(1500 - head, false),
            too_large(1501 - head, true),
            too_large(1501 - head, false),
            back(1420 - head),
            too_large_back(1421 - head),
        ];
        if speech != Echo {
            let segment = |mtu: usize| (mtu - head) as u32;
            steps.extend([
                out(3000, true).gso(segment(1500)),
                out(3000, false).gso(500),
                too_large(3000, true).gso(segment(1501)),
                too_large(3000, false).gso(segment(1501)),
                back(3000).gso(segment(1420)),
                too_large_back(3000).gso(segment(1421)),
            ]);
        }
        play(lab, &format!("{name}, sizes"), &rules, &steps);
    });
}

#[test]
fn fragments_follow_their_first_one() {
    with_all("fragments_follow_their_first_one", |lab, name, e, speech| {
        // What is known of fragments outlives rows.
        let id = 0x100 + speech as u16;
        let first = |packet| Packet { fragment: Some((0, true)), id, ..packet };
        let later = |from: At, to: At, offset, more| {
            let data = vec![0x5a; 64];
            let content = Content::Other { protocol: speech.protocol(e.is_v4), data };
            Packet { fragment: Some((offset, more)), id, ..Packet::new(from.0, to.0, content) }
        };
        let out = |offset, more| {
            leaves(
                TUN,
                &later(e.inner, e.remote, offset, more),
                Out,
                later(e.external, e.remote, offset, more),
            )
        };
        let back = |offset, more| {
            leaves(
                NIC,
                &later(e.remote, e.external, offset, more),
                In,
                later(e.remote, e.inner, offset, more),
            )
        };
        let unknown = Drop(DropReason::FragmentUnknown);
        let mut steps = vec![
            stays(TUN, &later(e.inner, e.remote, 64, false), unknown),
            stays(NIC, &later(e.remote, e.external, 64, false), FOREIGN),
            leaves(
                TUN,
                &first(speech.asks(e.inner, e.remote)),
                Out,
                first(speech.asks(e.external, e.remote)),
            ),
            out(64, true),
            out(128, false),
            leaves(
                NIC,
                &first(speech.answers(e.remote, e.external)),
                In,
                first(speech.answers(e.remote, e.inner)),
            ),
            back(64, true),
            back(128, false),
            stays(
                NIC,
                &Packet { ttl: 1, ..later(e.remote, e.external, 128, false) },
                Drop(DropReason::HopLimit),
            ),
            stays(TUN, &Packet { id: 0x900, ..later(e.inner, e.remote, 64, false) }, unknown),
            stays(TUN, &later(e.inner, e.far, 64, false), unknown),
        ];
        if speech == Tcp {
            // It could be another header when they are put together.
            let early = later(e.inner, e.remote, 8, true);
            steps.push(stays(TUN, &early, Drop(DropReason::Untranslatable)));
        }
        let rules = masquerade(lab.place);
        play(lab, name, &rules, &steps);
    });
}

#[test]
fn what_cannot_be_translated_does_not_leave() {
    with_all("what_cannot_be_translated_does_not_leave", |lab, name, e, speech| {
        let asks = speech.asks(e.inner, e.remote);
        let dropped = Drop(DropReason::Untranslatable);
        let with_options = |packet: Packet, kind| {
            let len = if e.is_v4 { 4 } else { 6 };
            Packet { options: Some((kind, [1, 4, 0, 0, 0, 0][..len].to_vec())), ..packet }
        };
        let at = |at: usize, byte: u8| {
            let mut bytes = asks.bytes();
            bytes[at] = byte;
            bytes
        };
        let len = asks.bytes().len();
        let (len_at, head) = if e.is_v4 { (3, 20) } else { (5, 40) };
        let least = if e.is_v4 { 20 + 7 } else { 7 };
        let other = |protocol| {
            Packet::new(e.inner.0, e.remote.0, Content::Other { protocol, data: vec![1; 40] })
        };
        let mut steps = vec![
            // Longer than it is, shorter than its headers, cut off.
            stays_raw(TUN, at(len_at, 250), dropped),
            stays_raw(TUN, at(len_at, least), dropped),
            stays_raw(TUN, asks.bytes()[..len - 1].to_vec(), dropped),
            stays_raw(TUN, asks.bytes()[..head].to_vec(), dropped),
            stays_raw(
                NIC,
                {
                    let mut bytes = speech.answers(e.remote, e.external).bytes();
                    bytes.pop();
                    bytes
                },
                FOREIGN,
            ),
            stays(TUN, &other(47), dropped),
            stays(TUN, &other(50), dropped),
            // A redirect is nobody's to give from here.
            stays(
                TUN,
                &error(
                    e.inner.0,
                    e.remote.0,
                    if e.is_v4 { [5, 0] } else { [137, 0] },
                    speech.answers(e.remote, e.inner),
                    false,
                ),
                dropped,
            ),
        ];
        if e.is_v4 {
            steps.push(stays(TUN, &with_options(asks.clone(), 0), dropped));
            steps.push(stays_raw(TUN, at(0, 0x44), dropped));
            steps.push(stays_raw(TUN, at(0, 0x4f), dropped));
        } else {
            for kind in [0, 43, 51, 60, 135, 139, 140] {
                steps.push(stays(TUN, &with_options(asks.clone(), kind), dropped));
            }
        }
        if speech != Echo {
            steps.push(stays(TUN, &speech.asks((e.inner.0, 0), e.remote), dropped));
            steps.push(stays(TUN, &speech.asks(e.inner, (e.remote.0, 0)), dropped));
        }
        // Neither IPv4 nor IPv6, whatever the device says.
        steps.push(stays_raw(TUN, at(0, 0x55), FOREIGN));
        let rules = masquerade(lab.place);
        play(lab, name, &rules, &steps);
        assert!(lab.flows().is_empty(), "{name}");
        // By the other NIC, to an address that is no port's.
        play(
            lab,
            name,
            &rules,
            &[
                stays(NIC, &with_options(speech.answers(e.remote, e.external), 60), FOREIGN),
                stays(
                    NIC,
                    &Packet::new(
                        e.remote.0,
                        e.external.0,
                        Content::Other { protocol: 47, data: vec![1; 40] },
                    ),
                    FOREIGN,
                ),
            ],
        );
    });
}

#[test]
fn a_full_table_begins_no_flow_and_keeps_those_that_are() {
    require_root!();
    in_new_netns(|| {
        let test = "a_full_table_begins_no_flow_and_keeps_those_that_are";
        let options = NatOptions { flows: 4, mappings: 2, ..Lab::options() };
        let Some(mut lab) = Lab::new(test, options) else { return };
        let e = ends(true);
        let rules = masquerade(lab.place);
        let out = |inner: At, by: At, to| leaves(TUN, &Udp.asks(inner, to), Out, Udp.asks(by, to));
        let (second, by) = ((e.inner.0, 4001), (e.external.0, PORT_FIRST + 2));
        let full = Drop(DropReason::FlowsFull);
        play(
            &mut lab,
            test,
            &rules,
            &[
                // A flow of UDP has two entries.
                out(e.inner, e.external, e.remote),
                out(second, by, e.remote).besides(NatEvent::PortInUse),
                stays(TUN, &Udp.asks(e.inner, (e.router, 9)), full),
                stays(TUN, &Udp.asks((e.inner.0, 4002), e.remote), full),
                out(e.inner, e.external, e.remote),
                leaves(NIC, &Udp.answers(e.remote, by), In, Udp.answers(e.remote, second)),
            ],
        );
        assert_eq!((lab.flows().len(), lab.mappings().len()), (4, 2));
    });
}

#[test]
fn an_address_that_is_gone_and_ways_that_are_none() {
    with_all("an_address_that_is_gone_and_ways_that_are_none", |lab, name, e, speech| {
        let mut rules = masquerade(lab.place);
        for external in &mut rules.externals {
            external.address = wg_common::map::AddressKey([0; 4]);
        }
        let none = Drop(DropReason::NoExternal);
        play(lab, name, &rules, &[stays(TUN, &speech.asks(e.inner, e.remote), none)]);
        rules.nat.iter_mut().for_each(|rule| rule.external_count = 0);
        play(lab, name, &rules, &[stays(TUN, &speech.asks(e.inner, e.remote), none)]);
        // The kernel says that nobody is there.
        let nobody = if e.is_v4 { "100.64.0.1" } else { "2001:db8:64::1" };
        let to = (nobody.parse().unwrap(), 53);
        play(lab, name, &rules, &[stays(TUN, &speech.asks(e.inner, to), FOREIGN)]);
        assert!(lab.flows().is_empty(), "{name}");
    });
}
