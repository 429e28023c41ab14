//! Two sessions and the wire between them, whose every move the input decides: who begins, what
//! arrives, twice, late, altered or never, what time does, what is reconfigured. When the input has
//! ended and the wire is whole again, both must hear each other in the time that timers allow.

use std::collections::HashSet;
use std::time::Duration;

use wg_common::time::Now;
use wg_userspace::key::PresharedKey;

use super::Input;
use super::host::{Host, START, address};

const MS: Duration = Duration::from_millis(1);
/// Steps of time, so that limits are met and passed.
const STEPS_MS: [u64; 16] = [
    0, 1, 10, 21, 333, 999, 4_999, 5_333, 10_000, 15_333, 25_000, 90_000, 119_999, 165_000,
    179_999, 540_000,
];
/// Messages on the wire; more are lost.
const WIRE_LEN_MAX: usize = 32;
/// Data that nobody answers leads to a handshake after 15.333 s; one that had begun just before is
/// repeated after 5.333 s. Twice, since the first one may cross another.
const HEALED_AFTER: Duration = Duration::from_secs(45);

struct Message {
    to: usize,
    from: u8,
    bytes: Vec<u8>,
}

struct World {
    hosts: [Host; 2],
    wire: Vec<Message>,
    now: Now,
    /// Number of the next packet, which is its content.
    packet: u32,
    sent: HashSet<(usize, Vec<u8>)>,
}

impl World {
    /// Takes what the hosts have sent to the wire, to wherever it is addressed.
    fn collect(&mut self) {
        for from in [0, 1] {
            let other = self.hosts[1 - from].address.remote;
            for (bytes, to) in std::mem::take(&mut self.hosts[from].outbox) {
                if to.remote == other && self.wire.len() < WIRE_LEN_MAX {
                    self.wire.push(Message { to: 1 - from, from: from as u8 + 1, bytes });
                }
            }
        }
    }

    fn deliver(&mut self, message: &Message) -> bool {
        let (host, now) = (&mut self.hosts[message.to], self.now);
        let before = host.received.len();
        let accepted = host.receive(&message.bytes, address(message.from), now).is_ok();
        for packet in &host.received[before..] {
            let is_others = self.sent.remove(&(1 - message.to, packet.clone()));
            assert!(is_others, "what was opened was sent by the other, and comes once");
        }
        self.check();
        accepted
    }

    fn send(&mut self, host: usize) {
        self.packet += 1;
        let packet = self.packet.to_le_bytes().to_vec();
        self.sent.insert((host, packet.clone()));
        self.hosts[host].send(&packet, self.now);
    }

    /// Lets time pass; timers run when it has.
    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        for host in &mut self.hosts {
            let mut turns = 0;
            while host.session.poll_timeout().is_some_and(|due| due <= self.now) {
                host.handle_timeout(self.now);
                turns += 1;
                assert!(turns < 8, "timers that ran are not due again");
            }
        }
        self.check();
    }

    fn check(&self) {
        self.hosts.iter().for_each(Host::check);
    }
}

/// Each two bytes are an operation and its argument.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let hosts = Host::pair();
    let mut world = World { hosts, wire: Vec::new(), now: START, packet: 0, sent: HashSet::new() };
    // Handshakes cost a millisecond: inputs that are longer show nothing new.
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        step(&mut world, &mut input);
        world.collect();
        world.check();
    }
    heal(&mut world);
}

fn step(world: &mut World, input: &mut Input<'_>) {
    let (operation, argument) = (input.byte(), input.byte());
    let host = usize::from(operation >> 7);
    let at = usize::from(argument).checked_rem(world.wire.len());
    match operation % 16 {
        0 => {
            let now = world.now;
            world.hosts[host].initiate(now);
        }
        1..=3 => {
            if let Some(at) = at {
                let message = world.wire.remove(at);
                world.deliver(&message);
            }
        }
        // Once more, now or later.
        4 => {
            if let Some(at) = at {
                let Message { to, from, ref bytes } = world.wire[at];
                let copy = Message { to, from, bytes: bytes.clone() };
                world.deliver(&copy);
            }
        }
        5 => drop(at.map(|at| world.wire.remove(at))),
        6 => {
            if let Some(at) = at {
                let mut message = world.wire.remove(at);
                let (place, bits) =
                    (usize::from(input.number()) % message.bytes.len(), input.byte());
                message.bytes[place] ^= bits;
                // Nobody is under load, so that nobody looks at mac2.
                let is_mac2 = message.bytes.len() >= 92 && place + 16 >= message.bytes.len();
                let accepted = world.deliver(&message);
                assert!(bits == 0 || is_mac2 || !accepted, "an altered message was accepted");
            }
        }
        7..=9 => world.send(host),
        10 | 11 => world.pass(MS * STEPS_MS[usize::from(argument % 16)] as u32),
        12 => {
            let Host { session, indexes, .. } = &mut world.hosts[host];
            session.clear(indexes);
        }
        13 => {
            let key = PresharedKey::from_bytes([argument & 1; 32]);
            world.hosts[host].session.set_preshared_key(key);
        }
        14 => {
            let interval = Duration::from_secs(u64::from(argument & 31));
            let now = world.now;
            world.hosts[host].session.set_persistent_keepalive(Some(interval), now);
        }
        _ => world.hosts[host].indexes.exhausted = argument & 1 != 0,
    }
}

/// With the same key, indexes, addresses and a wire that loses nothing, both hear each other again.
fn heal(world: &mut World) {
    world.wire.clear();
    for number in [0, 1] {
        let other = world.hosts[1 - number].address;
        let host = &mut world.hosts[number];
        host.session.set_preshared_key(PresharedKey::default());
        host.indexes.exhausted = false;
        host.set_endpoint(other);
    }
    let end = world.now + HEALED_AFTER;
    let mut heard = [false; 2];
    while world.now < end && heard != [true; 2] {
        world.pass(MS * 500);
        let before = [0, 1].map(|host| world.hosts[host].received.len());
        world.send(0);
        world.send(1);
        world.collect();
        while !world.wire.is_empty() {
            let message = world.wire.remove(0);
            world.deliver(&message);
            world.collect();
        }
        for (heard, (host, before)) in heard.iter_mut().zip(world.hosts.iter().zip(before)) {
            *heard |= host.received.len() > before;
        }
    }
    assert_eq!(heard, [true; 2], "the tunnel does not come back");
    let now = world.now;
    world.hosts.iter_mut().for_each(|host| host.rest(now));
}

/// A handshake with data both ways, a rekey, crossing handshakes, losses, what an operator does.
pub fn seeds() -> Vec<Vec<u8>> {
    const B: u8 = 128;
    let connect = [0, 0, 1, 0, 1, 0, 1, 0, 7, 0, B | 7, 0, 1, 0, 1, 0];
    let rekey = [10, 12, 10, 1, 7, 0, 1, 0, 1, 0, 1, 0, 1, 0];
    let operate = [13, 1, B | 13, 1, 0, 0, 1, 0, 1, 0, 12, 0, B | 14, 5, 10, 6, 10, 6, 1, 0, 15, 1];
    vec![
        connect.to_vec(),
        [&connect[..], &rekey, &rekey].concat(),
        [&[B | 7, 0, 0, 0, 7, 0, B, 0], &connect[..]].concat(),
        [0, 0, B, 0, 1, 0, 1, 0, 1, 0, 1, 0, 7, 0, B | 7, 0, 1, 0].to_vec(),
        [&connect[..], &operate, &connect].concat(),
        [&connect[..], &[7, 0, 4, 0, 4, 0, 6, 0, 20, 0, 1, 7, 0, 10, 9, 10, 15]].concat(),
        [0, 0, 4, 0, 4, 0, 6, 0, 9, 0, 3, 10, 7, 5, 0, 10, 11, 10, 7, 10, 7].to_vec(),
    ]
}
