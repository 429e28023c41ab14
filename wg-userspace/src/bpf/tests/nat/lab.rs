//! The programs on a host as [`memory`](super::memory) has it, made of real devices in a namespace.

use std::collections::HashMap;
use std::net::{TcpListener, UdpSocket};
use std::process::Command;

use wg_common::nat::map::{Flow, FlowKey, Mapping, MappingKey, PORTS_LEN, RuleSet, Slot};
use wg_common::outcome::{DropReason, NatEvent};

use super::life::{EXTERNALS, RING_LEN};
use super::memory::{LISTENED, OWN, OWNED, Place};
use crate::bpf::{BpfError, Nat, NatCounters, NatHook, NatOptions, NatVerdict};
use crate::sys::netns::report_skipped;
use crate::sys::{clock, link};
use crate::tun::{Tun, TunQueue};

/// The link addresses of the first NIC, and of the next hop by it that is known.
const NIC_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
const HOP_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x22];

/// What a run of a program came to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ran {
    pub verdict: NatVerdict,
    /// From the IP header on.
    pub packet: Vec<u8>,
    /// The first twelve bytes of the frame.
    pub macs: [u8; 12],
    /// The counters that moved.
    pub drops: Vec<DropReason>,
    pub events: Vec<NatEvent>,
    /// Whether a flow's look at the next hop, once in about a second, may have come since all was cleared.
    pub is_stale: bool,
}

impl Ran {
    /// Whether the frame goes to the next hop that is known.
    pub fn is_addressed(&self) -> bool {
        self.macs[..6] == HOP_MAC && self.macs[6..] == NIC_MAC
    }
}

/// The namespace's devices, and the programs.
pub struct Lab {
    pub nat: Nat,
    pub place: Place,
    counters: NatCounters,
    /// When all was cleared.
    cleared: u64,
    _tun: Vec<TunQueue>,
    _sockets: (UdpSocket, TcpListener),
}

/// About a second, of those in which a flow's next hop is looked after once.
fn second() -> u64 {
    clock::boot_now().boot_ns() >> 30
}

pub fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
}

/// The devices, routes and neighbours; to be called in a namespace of its own.
fn make_host() -> (Place, Vec<TunQueue>) {
    let tun = Tun::open("tun", 1).unwrap();
    ip("link add nic0 type veth peer name far0");
    ip("link add nic1 type veth peer name far1");
    ip("link set nic0 address 02:00:00:00:00:11");
    for device in ["tun", "nic0", "nic1", "far0", "far1"] {
        if device == "tun" {
            ip("link set tun mtu 1420");
        }
        ip(&format!("link set {device} up"));
    }
    for (address, device) in OWN.iter().zip(["tun", "nic0", "nic0", "nic1", "tun", "nic0"]) {
        let (len, nodad) = if address.contains(':') { (128, "nodad") } else { (32, "") };
        ip(&format!("addr add {address}/{len} dev {device} {nodad}"));
    }
    for (address, len) in OWNED {
        ip(&format!("route add {address}/{len} dev tun"));
    }
    for neighbour in ["192.0.2.254 dev nic0", "2001:db8::254 dev nic0"] {
        ip(&format!("neigh replace {neighbour} lladdr 02:00:00:00:00:22 nud permanent"));
    }
    for route in [
        "192.0.2.0/24 dev nic0",
        "2001:db8::/64 dev nic0",
        "172.31.0.0/16 dev nic1",
        "2001:db8:31::/48 dev nic1",
        "198.51.100.0/24 via 192.0.2.253",
        "2001:db8:51::/48 via 2001:db8::253",
        "unreachable 100.64.0.0/10",
        "unreachable 2001:db8:64::/48",
        "default via 192.0.2.254",
        "default via 2001:db8::254 dev nic0",
    ] {
        ip(&format!("route add {route}"));
    }
    for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{knob}"), "1").unwrap();
    }
    let nics = ["nic0", "nic1"].map(|name| link::index(name).unwrap());
    (Place { tun: link::index("tun").unwrap(), nics }, tun.into_queues())
}

impl Lab {
    /// In a namespace of its own: everything, without rules. `None`, after saying so, where the process may not
    /// load programs.
    pub fn new(test: &str, options: NatOptions) -> Option<Self> {
        let mut nat = match Nat::load_for_runs(options) {
            Ok(nat) => nat,
            Err(error @ BpfError::NotPermitted) => {
                report_skipped(test, &error.to_string());
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let (place, tun) = make_host();
        for (address, len) in OWNED {
            nat.set_owned(address.parse().unwrap(), len, true).unwrap();
        }
        let at = ("::", LISTENED);
        let sockets = (UdpSocket::bind(at).unwrap(), TcpListener::bind(at).unwrap());
        let counters = nat.counters().unwrap();
        let mut lab = Self { nat, place, counters, cleared: 0, _tun: tun, _sockets: sockets };
        lab.clear();
        Some(lab)
    }

    /// As many externals as the tests have.
    pub fn options() -> NatOptions {
        NatOptions { externals: EXTERNALS.len() as u32, ..NatOptions::default() }
    }

    /// No flow, no mapping, nobody has a slot, and in each ring are its first ports.
    pub fn clear(&mut self) {
        for key in self.flows().into_keys() {
            self.nat.remove_flow(&key).unwrap();
        }
        for key in self.mappings().into_keys() {
            self.nat.remove_mapping(&key).unwrap();
        }
        for ring in 0..self.nat.external_count() * 3 {
            self.nat.clear_ring(ring);
            for port in 0..RING_LEN {
                self.nat.end_slot(ring * PORTS_LEN + port).unwrap();
                assert!(self.nat.free_port(ring, port));
            }
        }
        self.cleared = second();
    }

    pub fn swap_rules(&mut self, rules: &RuleSet) {
        self.nat.swap_rules(rules).unwrap();
    }

    pub fn flows(&self) -> HashMap<FlowKey, Flow> {
        self.nat.flows().map(Result::unwrap).collect()
    }

    pub fn mappings(&self) -> HashMap<MappingKey, Mapping> {
        self.nat.mappings().map(Result::unwrap).collect()
    }

    /// All slots that tests use, by their numbers.
    pub fn slots(&self) -> HashMap<u32, Slot> {
        let indexes = (0..self.nat.external_count() * 3)
            .flat_map(|ring| (0..RING_LEN).map(move |port| ring * PORTS_LEN + port));
        indexes.map(|index| (index, self.nat.slot(index).unwrap())).collect()
    }

    /// Runs a program on a packet that comes out of the tunnel, or by a NIC.
    pub fn run(&mut self, nic: Option<usize>, packet: &[u8], gso_size: u32) -> Ran {
        let (hook, ifindex) = match nic {
            None => (NatHook::Tun, self.place.tun),
            Some(nic) => (NatHook::Nic, self.place.nics[nic]),
        };
        let ethertype = if packet[0] >> 4 == 6 { [0x86, 0xdd] } else { [8, 0] };
        let frame = [&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8][..], &ethertype, packet].concat();
        let ran = self.nat.test_run(hook, ifindex, &frame, gso_size, 1).unwrap();
        let is_stale = self.cleared != second();
        let (before, after) = (self.counters, self.nat.counters().unwrap());
        self.counters = after;
        let times = |count: u64| std::iter::repeat_n((), count as usize);
        let drops = DropReason::ALL.iter().flat_map(|reason| {
            times(after.dropped(*reason) - before.dropped(*reason)).map(|()| *reason)
        });
        let events = NatEvent::ALL
            .iter()
            .flat_map(|event| times(after.event(*event) - before.event(*event)).map(|()| *event));
        Ran {
            verdict: ran.verdict,
            packet: ran.frame[14..].to_vec(),
            macs: *ran.frame.first_chunk().unwrap(),
            drops: drops.collect(),
            events: events.collect(),
            is_stale,
        }
    }
}
