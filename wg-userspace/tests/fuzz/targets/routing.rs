//! Allowed IPs against a plain list that is searched from end to end.

use std::net::IpAddr;

use ipnet::IpNet;
use wg_common::id::PeerId;
use wg_userspace::routing::AllowedIps;

use super::Input;

/// Prefixes with their owners, in the order in which they were given.
#[derive(Default)]
struct Model(Vec<(IpNet, PeerId)>);

impl Model {
    fn insert(&mut self, net: IpNet, peer: PeerId) -> Option<PeerId> {
        let before = self.take(net);
        self.0.push((net, peer));
        before
    }

    fn take(&mut self, net: IpNet) -> Option<PeerId> {
        let at = self.0.iter().position(|(known, _)| *known == net)?;
        Some(self.0.remove(at).1)
    }

    fn owner(&self, addr: IpAddr) -> Option<PeerId> {
        let around = self.0.iter().filter(|(net, _)| net.contains(&addr));
        around.max_by_key(|(net, _)| net.prefix_len()).map(|(_, peer)| *peer)
    }

    fn of_peer(&self, peer: PeerId) -> Vec<IpNet> {
        self.0.iter().filter(|(_, owner)| *owner == peer).map(|(net, _)| *net).collect()
    }
}

/// Each step is an operation, a peer and a prefix.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (mut ours, mut model) = (AllowedIps::default(), Model::default());
    let mut snapshots = Vec::new();
    while !input.is_empty() {
        let operation = input.byte();
        let peer = PeerId(u32::from(operation >> 4 & 3));
        let addr = address(&mut input, operation & 8 != 0);
        let bits = if addr.is_ipv4() { 33 } else { 129 };
        let net = IpNet::new(addr, input.byte() % bits).expect("a length of this version");
        match operation % 8 {
            0..4 => assert_eq!(ours.insert(net, peer), model.insert(net.trunc(), peer)),
            4 | 5 => {
                let is_its = model.0.contains(&(net.trunc(), peer));
                assert_eq!(ours.remove(net, peer), is_its);
                if is_its {
                    model.take(net.trunc());
                }
            }
            6 => {
                ours.remove_peer(peer);
                model.0.retain(|(_, owner)| *owner != peer);
            }
            _ if snapshots.len() < 4 => {
                snapshots.push((ours.snapshot(), addr, model.owner(addr)));
            }
            _ => {}
        }
        assert_eq!(ours.len(), model.0.len());
        let table = ours.snapshot();
        for (known, _) in &model.0 {
            for addr in [known.network(), known.broadcast(), addr] {
                assert_eq!(table.lookup(addr), model.owner(addr), "{addr}");
            }
        }
    }
    for peer in (0..4).map(PeerId) {
        assert_eq!(ours.of_peer(peer).collect::<Vec<_>>(), model.of_peer(peer));
    }
    for (table, addr, owner) in snapshots {
        assert_eq!(table.lookup(addr), owner, "a snapshot changed");
    }
}

/// Few bits, at places where tables have their seams, so that prefixes meet.
fn address(input: &mut Input<'_>, is_v6: bool) -> IpAddr {
    let [a, b] = input.array();
    if is_v6 {
        IpAddr::from([0xfd, a & 0x81, 0, 0, 0, 0, 0, b & 3, a & 3, 0, 0, 0, 0, 0, b, a])
    } else {
        IpAddr::from([a & 0x83, b & 0x81, a, b])
    }
}

/// Prefixes inside one another, taken away from the outside in and from the inside out.
pub fn seeds() -> Vec<Vec<u8>> {
    let steps = |lens: &[u8], v6: u8| -> Vec<u8> {
        let give = lens.iter().enumerate().flat_map(|(i, len)| [(i as u8) << 4 | v6, 1, 1, *len]);
        let take =
            lens.iter().enumerate().flat_map(|(i, len)| [(i as u8) << 4 | 4 | v6, 1, 1, *len]);
        give.chain([7 | v6, 1, 1, 0]).chain(take).collect()
    };
    vec![
        steps(&[0, 8, 24, 32], 0),
        steps(&[32, 17, 16, 15], 0),
        steps(&[0, 64, 128, 65], 8),
        [0, 1, 1, 24, 16, 1, 1, 25, 6, 0, 0, 0, 7, 1, 1, 0, 22, 0, 0, 0].to_vec(),
    ]
}
