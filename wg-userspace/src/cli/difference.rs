//! What differs between a config file and what runs, worked out before anything is done.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::SocketAddr,
};

use ipnet::IpNet;

use super::{
    forwarding,
    ledger::Noted,
    nic_settings,
    running::{Running, RunningPeer},
    steps::{RuleKind, Step},
};
use crate::{
    config::{Config, PeerConfig},
    device::{AllowedIpChange, PacketRules, PeerChange, SetRequest},
    host::{Family, MAIN_TABLE, missing_routes},
    key::PublicKey,
};

/// What is to change on a device.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct DeviceDifference {
    /// The request that does it, but for peers that leave; it holds only what differs.
    pub request: SetRequest,
    /// The request that lets peers leave. With them their sessions are lost for good, so that it comes
    /// when nothing can fail any more.
    pub removal: SetRequest,
    /// The request that takes both back, whether or not the second was made. Sessions under a private
    /// key that was changed are lost all the same.
    pub back: SetRequest,
    /// The same for people.
    pub lines: Vec<String>,
}

/// Compares a device with a file.
///
/// `mark` is the new mark, if there is to be one. `endpoints` has those that are to be set; of peers
/// that are not in it they stay as they are.
pub fn of_device(
    running: &Running,
    config: &Config,
    mark: Option<u32>,
    endpoints: &HashMap<PublicKey, SocketAddr>,
) -> DeviceDifference {
    let mut found = DeviceDifference::default();
    let private_key = &config.interface.private_key.value;
    if running.private_key.as_ref() != Some(private_key) {
        found.request.private_key = Some(Some(private_key.clone()));
        found.back.private_key = Some(running.private_key.clone());
        let before = running.private_key.as_ref().map(|key| key.public_key());
        let before = before.map_or_else(|| "none".to_owned(), |key| key.to_string());
        found
            .line(format!("~ private key: its public key {before} → {}", private_key.public_key()));
    }
    let port = config.interface.listen_port.as_deref().copied().filter(|&port| port != 0);
    if let Some(port) = port.filter(|&port| port != running.listen_port) {
        found.request.listen_port = Some(port);
        found.back.listen_port = Some(running.listen_port);
        found.line(format!("~ listen port: {} → {port}", running.listen_port));
    }
    if let Some(mark) = mark.filter(|&mark| mark != running.fwmark) {
        found.request.fwmark = Some(mark);
        found.back.fwmark = Some(running.fwmark);
        found.line(format!("~ fwmark: {:#x} → {mark:#x}", running.fwmark));
    }
    found.packet_rules(running.rules, config);
    let in_file: HashSet<PublicKey> = config.peers.iter().map(|peer| *peer.public_key).collect();
    // What they own and is others' in the file goes over to these before that, and back afterwards.
    let gone = running.peers.iter().filter(|peer| !in_file.contains(&peer.public_key));
    for peer in gone.filter(|peer| !peer.is_pulled) {
        let remove = PeerChange { remove: true, ..PeerChange::new(peer.public_key) };
        found.removal.peers.push(remove);
        found.back.peers.push(whole(peer));
        found.line(format!("- peer {}", label(&peer.name, &peer.public_key)));
    }
    let before: HashMap<PublicKey, &RunningPeer> =
        running.peers.iter().map(|peer| (peer.public_key, peer)).collect();
    let owned = owned(config);
    for peer in &config.peers {
        let allowed_ips = owned.get(&*peer.public_key).map_or(&[][..], Vec::as_slice);
        let endpoint = endpoints.get(&*peer.public_key).copied();
        match before.get(&*peer.public_key) {
            Some(before) => found.changed(before, peer, allowed_ips, endpoint),
            None => found.added(peer, allowed_ips, endpoint),
        }
    }
    found
}

/// Who owns what when all of a file is done: of two peers with one prefix the last has it.
fn owned(config: &Config) -> HashMap<PublicKey, Vec<IpNet>> {
    let mut owner: HashMap<IpNet, PublicKey> = HashMap::new();
    for peer in &config.peers {
        owner.extend(peer.allowed_ips.iter().map(|net| (net.value.trunc(), *peer.public_key)));
    }
    let mut owned: HashMap<PublicKey, Vec<IpNet>> = HashMap::new();
    for peer in &config.peers {
        for net in peer.allowed_ips.iter().map(|net| net.value.trunc()) {
            let of_peer = owned.entry(*peer.public_key).or_default();
            if owner.get(&net) == Some(&*peer.public_key) && !of_peer.contains(&net) {
                of_peer.push(net);
            }
        }
    }
    owned
}

/// The change that makes a peer what it is now.
fn whole(peer: &RunningPeer) -> PeerChange {
    PeerChange {
        preshared_key: Some(peer.preshared_key.clone()),
        endpoint: peer.endpoint,
        persistent_keepalive: Some(peer.persistent_keepalive),
        name: Some(peer.name.clone()),
        replace_allowed_ips: true,
        allowed_ips: peer.allowed_ips.iter().copied().map(AllowedIpChange::Add).collect(),
        ..PeerChange::new(peer.public_key)
    }
}

impl DeviceDifference {
    /// Whether the device is as the file has it.
    pub fn is_none(&self) -> bool {
        self.request == SetRequest::default() && self.removal == SetRequest::default()
    }

    /// Both requests in one, for a device of which nothing else is changed.
    pub fn at_once(&self) -> SetRequest {
        let peers = [self.removal.peers.as_slice(), &self.request.peers].concat();
        SetRequest { peers, ..self.request.clone() }
    }

    fn line(&mut self, line: String) {
        self.lines.push(line);
    }

    fn packet_rules(&mut self, was: PacketRules, config: &Config) {
        let of_file = &config.interface;
        let is = PacketRules::of(of_file.mss_clamp.as_deref(), of_file.copy_dscp.as_deref());
        let word = |is_on| if is_on { "on" } else { "off" };
        if is.mss_clamp != was.mss_clamp {
            self.request.mss_clamp = Some(is.mss_clamp);
            self.back.mss_clamp = Some(was.mss_clamp);
            self.line(format!("~ MssClamp: {} → {}", word(was.mss_clamp), word(is.mss_clamp)));
        }
        if is.copy_dscp != was.copy_dscp {
            self.request.copy_dscp = Some(is.copy_dscp);
            self.back.copy_dscp = Some(was.copy_dscp);
            self.line(format!("~ CopyDscp: {} → {}", word(was.copy_dscp), word(is.copy_dscp)));
        }
    }

    fn added(&mut self, peer: &PeerConfig, allowed_ips: &[IpNet], endpoint: Option<SocketAddr>) {
        let seconds = peer.persistent_keepalive.as_deref().copied().unwrap_or(0);
        let change = PeerChange {
            preshared_key: peer.preshared_key.as_deref().cloned(),
            endpoint,
            persistent_keepalive: Some(seconds),
            name: peer.name.as_deref().cloned(),
            replace_allowed_ips: true,
            allowed_ips: allowed_ips.iter().copied().map(AllowedIpChange::Add).collect(),
            ..PeerChange::new(*peer.public_key)
        };
        let mut facts: Vec<String> = allowed_ips.iter().map(IpNet::to_string).collect();
        facts.extend(endpoint.map(|endpoint| format!("endpoint {endpoint}")));
        facts.extend((seconds != 0).then(|| format!("keepalive {seconds} s")));
        self.line(format!("+ peer {}{}", Label(peer), list(&facts)));
        self.request.peers.push(change);
        let remove = PeerChange { remove: true, ..PeerChange::new(*peer.public_key) };
        // Before those that come back, which may own what it has.
        self.back.peers.insert(0, remove);
    }

    fn changed(
        &mut self,
        before: &RunningPeer,
        peer: &PeerConfig,
        allowed_ips: &[IpNet],
        endpoint: Option<SocketAddr>,
    ) {
        let mut change = PeerChange::new(before.public_key);
        let mut back = PeerChange::new(before.public_key);
        let mut facts = Vec::new();
        let preshared_key = peer.preshared_key.as_deref().cloned().unwrap_or_default();
        if preshared_key != before.preshared_key {
            let (is, was) = (!preshared_key.is_zero(), !before.preshared_key.is_zero());
            facts.push(
                match (was, is) {
                    (false, _) => "preshared key added",
                    (true, false) => "preshared key removed",
                    (true, true) => "another preshared key",
                }
                .to_owned(),
            );
            change.preshared_key = Some(preshared_key);
            back.preshared_key = Some(before.preshared_key.clone());
        }
        let is: HashSet<&IpNet> = allowed_ips.iter().collect();
        let was: HashSet<&IpNet> = before.allowed_ips.iter().collect();
        if is != was {
            facts.extend(
                allowed_ips.iter().filter(|net| !was.contains(net)).map(|net| format!("+{net}")),
            );
            let gone = before.allowed_ips.iter().filter(|net| !is.contains(net));
            facts.extend(gone.map(|net| format!("-{net}")));
            let add = |nets: &[IpNet]| nets.iter().copied().map(AllowedIpChange::Add).collect();
            (change.replace_allowed_ips, change.allowed_ips) = (true, add(allowed_ips));
            (back.replace_allowed_ips, back.allowed_ips) = (true, add(&before.allowed_ips));
        }
        if let Some(endpoint) = endpoint.filter(|&endpoint| before.endpoint != Some(endpoint)) {
            let was = before.endpoint.map_or_else(|| "none".to_owned(), |was| was.to_string());
            facts.push(format!("endpoint {was} → {endpoint}"));
            change.endpoint = Some(endpoint);
            back.endpoint = before.endpoint;
        }
        let seconds = peer.persistent_keepalive.as_deref().copied().unwrap_or(0);
        if seconds != before.persistent_keepalive {
            facts.push(format!("keepalive {} s → {seconds} s", before.persistent_keepalive));
            change.persistent_keepalive = Some(seconds);
            back.persistent_keepalive = Some(before.persistent_keepalive);
        }
        let name = peer.name.as_deref().map_or("", String::as_str);
        if name != before.name {
            facts.push(match (&*before.name, name) {
                ("", _) => "named".to_owned(),
                (was, "") => format!("no more named {was}"),
                (was, _) => format!("renamed from {was}"),
            });
            change.name = Some(name.to_owned());
            back.name = Some(before.name.clone());
        }
        if before.is_pulled {
            // To be named is enough.
            facts.push("configured, no more pulled".to_owned());
        }
        if !facts.is_empty() {
            self.line(format!("~ peer {}{}", Label(peer), list(&facts)));
            // No request takes an endpoint away. Who had none had no session to lose, either.
            if change.endpoint.is_some() && before.endpoint.is_none() {
                let remove = PeerChange { remove: true, ..PeerChange::new(before.public_key) };
                self.back.peers.push(remove);
                back = whole(before);
            }
            self.request.peers.push(change);
            self.back.peers.push(back);
        }
    }
}

/// A peer's name and key, or its key.
pub struct Label<'a>(pub &'a PeerConfig);

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.name.as_deref().map_or("", String::as_str);
        f.write_str(&label(name, &self.0.public_key))
    }
}

/// A peer's name, if it is not empty, and its key.
fn label(name: &str, key: &PublicKey) -> String {
    if name.is_empty() { key.to_string() } else { format!("{name} ({key})") }
}

fn list(facts: &[String]) -> String {
    if facts.is_empty() { String::new() } else { format!(": {}", facts.join(", ")) }
}

/// What is to change on the host.
#[derive(Debug, Default)]
pub struct HostDifference {
    /// Steps to be done, in this order.
    pub add: Vec<Step>,
    /// Steps that are done already, by somebody else, and are ours from now on.
    pub adopt: Vec<Step>,
    /// Begun, and there.
    pub confirm: Vec<Noted>,
    /// Steps to be undone, in this order. Those that are not done were begun, and cannot be seen.
    pub remove: Vec<Noted>,
    /// Noted, but there no more.
    pub forget: Vec<Noted>,
}

/// What the interface has, whoever gave it that.
#[derive(Debug, Default)]
pub struct Present {
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// What is routed to it, with the table. Nothing is known of the routes of an interface that is down.
    pub routes: Option<HashSet<(IpNet, u32)>>,
}

impl Present {
    /// Whether what a step does is there, if that can be seen.
    fn has(&self, step: &Step) -> Option<bool> {
        match step {
            Step::Address(net) => Some(self.addresses.contains(net)),
            Step::Route { prefix, table } => {
                self.routes.as_ref().map(|routes| routes.contains(&(*prefix, *table)))
            }
            _ => None,
        }
    }

    /// Whether a noted step is done, as far as is known.
    fn is_done(&self, noted: &Noted) -> bool {
        self.has(&noted.step).unwrap_or(noted.done)
    }
}

/// Compares what was done with what a file asks for.
///
/// Only addresses, name servers, routes, rules and filters are looked at, and the mark, as far as it
/// goes with them.
pub fn of_host(noted: &[Noted], wanted: &[Step], present: &Present) -> HostDifference {
    let mut found = HostDifference::default();
    let mut seen: Vec<&Step> = Vec::new();
    for step in wanted.iter().filter(|step| is_compared(step)) {
        if seen.iter().any(|other| is_same(other, step)) {
            continue;
        }
        seen.push(step);
        let is_ours =
            noted.iter().any(|noted| present.is_done(noted) && is_same(&noted.step, step));
        match step {
            _ if is_ours => {}
            Step::Address(net) if present.addresses.contains(net) => found.adopt.push(step.clone()),
            step => found.add.push(step.clone()),
        }
    }
    for noted in noted.iter().rev().filter(|noted| is_compared(&noted.step)) {
        let is_wanted =
            present.is_done(noted) && seen.iter().any(|step| is_same(&noted.step, step));
        match (present.has(&noted.step), is_wanted) {
            (Some(false), _) => found.forget.push(noted.clone()),
            (_, false) => {
                found.remove.push(Noted { done: present.is_done(noted), ..noted.clone() });
            }
            (_, true) if !noted.done => found.confirm.push(noted.clone()),
            (_, true) => {}
        }
    }
    found
}

fn is_compared(step: &Step) -> bool {
    match step {
        Step::Hook(_) | Step::Daemon | Step::Configure | Step::Mtu(_) | Step::LinkUp => false,
        Step::Sysctl { key, .. } if nic_settings::is_one(key) => false,
        Step::Mark(_)
        | Step::Address(_)
        | Step::Dns { .. }
        | Step::Route { .. }
        | Step::Sysctl { .. }
        | Step::Rule { .. }
        | Step::Firewall { .. } => true,
    }
}

/// Whether two steps are the same but for what the host said when they were done.
pub fn is_same(one: &Step, other: &Step) -> bool {
    match (one, other) {
        (
            Step::Dns { servers, search, .. },
            Step::Dns { servers: servers2, search: search2, .. },
        ) => (servers, search) == (servers2, search2),
        (Step::Sysctl { key, value, .. }, Step::Sysctl { key: key2, value: value2, .. }) => {
            (key, value) == (key2, value2)
        }
        (Step::Rule { family, kind, .. }, Step::Rule { family: family2, kind: kind2, .. }) => {
            (family, kind) == (family2, kind2)
        }
        (
            Step::Firewall { family, mark, .. },
            Step::Firewall { family: family2, mark: mark2, .. },
        ) => (family, mark) == (family2, mark2),
        _ => one == other,
    }
}

/// The routes of the main table among `steps` that are needed: not those that a route covers which the
/// interface has of itself, by its addresses or by somebody else.
///
/// `present` are its routes now, `addresses` those that it is to have, `gone` those that it loses.
pub fn without_covered_routes(
    steps: Vec<Step>,
    noted: &[Noted],
    present: &[IpNet],
    addresses: &[IpNet],
    gone: &[IpNet],
) -> Vec<Step> {
    let ours = |net: &IpNet| {
        noted.iter().any(|noted| {
            matches!(&noted.step, Step::Route { prefix, table: MAIN_TABLE } if prefix == net)
        })
    };
    let connected = |net: &IpNet| gone.iter().any(|gone| gone.trunc() == *net);
    let is_network = |net: &&IpNet| net.prefix_len() < net.max_prefix_len();
    let stays = present.iter().filter(|net| !ours(net) && !connected(net));
    let of_itself = stays.copied().chain(addresses.iter().filter(is_network).copied());
    let allowed = steps.iter().filter_map(|step| match step {
        Step::Route { prefix, table: MAIN_TABLE } => Some(*prefix),
        _ => None,
    });
    let missing = missing_routes(allowed, of_itself);
    let is_needed = |step: &Step| match step {
        Step::Route { prefix, table: MAIN_TABLE } => missing.contains(prefix),
        _ => true,
    };
    steps.into_iter().filter(is_needed).collect()
}

/// A step for people, behind a `+` or `-`.
pub fn described(step: &Step) -> String {
    let family = |family: Family| match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    match step {
        Step::Address(net) => format!("address {net}"),
        Step::Route { prefix, table: MAIN_TABLE } => format!("route {prefix}"),
        Step::Route { prefix, table } => format!("route {prefix} in table {table}"),
        Step::Dns { servers, search, .. } => {
            let words: Vec<&str> = servers.iter().chain(search).map(String::as_str).collect();
            format!("DNS {}", words.join(", "))
        }
        Step::Sysctl { key, value, .. } => {
            format!("sysctl {} = {value}", forwarding::sysctl_name(key))
        }
        Step::Rule { family: of, kind: RuleKind::NotMarked { mark, table }, .. } => {
            format!("{} rule: without mark {mark:#x} by table {table}", family(*of))
        }
        Step::Rule { family: of, kind: RuleKind::MainWithoutDefault, .. } => {
            format!("{} rule: the main table without its default route", family(*of))
        }
        Step::Firewall { family: of, mark, .. } => {
            format!("{} filter for mark {mark:#x}", family(*of))
        }
        Step::Mark(mark) => format!("automatic mark {mark:#x}"),
        Step::Mtu(mtu) => format!("MTU {}", mtu.unwrap_or_default()),
        Step::Hook(_) | Step::Daemon | Step::Configure | Step::LinkUp => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config,
        device::{Device, Effect},
        uapi::{self, PeerStatus},
    };

    const PRIVATE: &str = "SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=";
    const KEYS: [&str; 3] = [
        "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
        "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=",
        "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=",
    ];

    fn file(interface: &str, peers: &[(usize, &str)]) -> Config {
        let mut text = format!("[Interface]\nPrivateKey = {PRIVATE}\n{interface}\n");
        for (key, lines) in peers {
            text += &format!("[Peer]\nPublicKey = {}\n{lines}\n", KEYS[*key]);
        }
        config::parse("wg0.conf", &text).unwrap()
    }

    fn address(endpoint: &config::Endpoint) -> Option<SocketAddr> {
        match endpoint {
            config::Endpoint::Address(address) => Some(*address),
            config::Endpoint::Host { .. } => None,
        }
    }

    fn device(config: &Config) -> Device {
        let mut device = Device::default();
        device.apply(SetRequest::replacing(config, address));
        device
    }

    fn running(device: &Device) -> Running {
        let text = uapi::format_get(device, device.listen_port(), &|_| PeerStatus::default());
        Running::parse(text.lines()).unwrap()
    }

    fn endpoints(config: &Config) -> HashMap<PublicKey, SocketAddr> {
        let of_peer =
            |peer: &PeerConfig| Some((*peer.public_key, address(peer.endpoint.as_deref()?)?));
        config.peers.iter().filter_map(of_peer).collect()
    }

    #[test]
    fn what_is_the_same_is_not_in_the_request() {
        let peers = [
            (0, "AllowedIPs = 10.0.0.1/32, 10.0.0.2/32\nEndpoint = 192.0.2.1:1"),
            (1, "AllowedIPs = 10.0.0.2/32\nPersistentKeepalive = 25"),
        ];
        let file = file("ListenPort = 7\nFwMark = 3", &peers);
        let found = of_device(&running(&device(&file)), &file, Some(3), &endpoints(&file));
        assert!(found.is_none(), "{found:?}");
        assert!(found.lines.is_empty());
    }

    #[test]
    fn one_peer_of_many_is_alone_in_the_request() {
        let before = file("", &[(0, "AllowedIPs = 10.0.0.1/32"), (1, ""), (2, "")]);
        let after = file("", &[(0, "AllowedIPs = 10.0.0.9/32"), (1, ""), (2, "")]);
        let found = of_device(&running(&device(&before)), &after, None, &HashMap::new());
        assert_eq!(found.request.peers.len(), 1);
        assert_eq!(found.lines, [format!("~ peer {}: +10.0.0.9/32, -10.0.0.1/32", KEYS[0])]);
        assert_eq!(found.request.private_key, None);
        assert_eq!(found.request.listen_port, None, "no ListenPort: it stays");
        assert_eq!(found.request.fwmark, None, "no FwMark: it stays");
    }

    #[test]
    fn the_request_makes_what_the_file_says_and_the_other_takes_it_back() {
        let files = [
            file("ListenPort = 7", &[(0, "AllowedIPs = 10.0.0.0/8"), (1, "AllowedIPs = ::/0")]),
            file("ListenPort = 8", &[(1, "AllowedIPs = 10.0.0.0/8"), (0, "AllowedIPs = ::/0")]),
            file("ListenPort = 8", &[(2, "AllowedIPs = 10.0.0.0/8\nEndpoint = 192.0.2.1:1")]),
            file("ListenPort = 7", &[(0, "PersistentKeepalive = 3"), (2, "AllowedIPs = ::/0")]),
            file("ListenPort = 7", &[(0, "PersistentKeepalive = 3\n#! Name = a"), (2, "")]),
            file("ListenPort = 7", &[(0, "#! Name = b"), (1, "#! Name = a")]),
            file("ListenPort = 9", &[]),
        ];
        let sorted = |device: &Device| {
            let mut running = running(device);
            running.peers.sort_by_key(|peer| peer.public_key);
            running.peers.iter_mut().for_each(|peer| peer.allowed_ips.sort());
            running
        };
        for before in &files {
            for after in &files {
                let mut changed = device(before);
                let was = sorted(&changed);
                let found = of_device(&was, after, None, &endpoints(after));
                changed.apply(found.request.clone());
                changed.apply(found.removal.clone());
                let mut is = sorted(&changed);
                let mut at_once = device(before);
                at_once.apply(found.at_once());
                assert_eq!(sorted(&at_once), is);
                let mut expected = sorted(&device(after));
                for peer in is.peers.iter_mut().chain(&mut expected.peers) {
                    // No file takes an endpoint away.
                    peer.endpoint = None;
                }
                assert_eq!(is, expected);
                changed.apply(found.back.clone());
                assert_eq!(sorted(&changed), was);
                let mut without_removal = device(before);
                without_removal.apply(found.request);
                without_removal.apply(found.back);
                assert_eq!(sorted(&without_removal), was);
            }
        }
    }

    #[test]
    fn a_name_that_changes_is_all_that_changes() {
        let rest =
            "AllowedIPs = 10.0.0.1/32\nPresharedKey = IiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiI=";
        let named = |name: &str| file("", &[(0, &format!("{rest}\n{name}"))]);
        for (before, after, said) in [
            ("", "#! Name = a", format!("~ peer a ({}): named", KEYS[0])),
            (
                "#! Name = a",
                "# friendly_name = b",
                format!("~ peer b ({}): renamed from a", KEYS[0]),
            ),
            ("#! Name = b", "", format!("~ peer {}: no more named b", KEYS[0])),
        ] {
            let mut device = device(&named(before));
            let found = of_device(&running(&device), &named(after), None, &HashMap::new());
            assert_eq!(found.lines, [said]);
            let effects = device.apply(found.request);
            assert!(matches!(effects[..], [Effect::Name { .. }]), "{effects:?}");
            let effects = device.apply(found.back);
            assert!(matches!(effects[..], [Effect::Name { .. }]), "{effects:?}");
            let found = of_device(&running(&device), &named(before), None, &HashMap::new());
            assert!(found.is_none());
        }
        let gone = of_device(
            &running(&device(&named("#! Name = a"))),
            &file("", &[]),
            None,
            &HashMap::new(),
        );
        assert_eq!(gone.lines, [format!("- peer a ({})", KEYS[0])]);
    }

    #[test]
    fn pulled_peers_stay_unless_they_are_configured() {
        let before = file("", &[]);
        let mut running = running(&device(&before));
        running.peers.push(RunningPeer {
            public_key: PublicKey::from_base64(KEYS[0]).unwrap(),
            preshared_key: crate::key::PresharedKey::default(),
            endpoint: None,
            is_by_name: false,
            persistent_keepalive: 0,
            name: String::new(),
            allowed_ips: Vec::new(),
            is_pulled: true,
        });
        assert!(of_device(&running, &before, None, &HashMap::new()).is_none());
        let found = of_device(&running, &file("", &[(0, "")]), None, &HashMap::new());
        assert_eq!(found.request.peers.len(), 1);
        running.peers[0].is_pulled = false;
        let found = of_device(&running, &before, None, &HashMap::new());
        assert!(found.removal.peers[0].remove && found.request.peers.is_empty());
    }

    #[test]
    fn a_line_names_a_peer_and_shows_no_secret() {
        let before = file("", &[(0, "")]);
        let secret =
            "PresharedKey = IiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiI=\n#! Name = laptop";
        let after = file("", &[(0, secret), (1, "AllowedIPs = 10.0.0.2/32")]);
        let mut device = device(&before);
        let found = of_device(&running(&device), &after, None, &HashMap::new());
        let expected = [
            format!("~ peer laptop ({}): preshared key added, named", KEYS[0]),
            format!("+ peer {}: 10.0.0.2/32", KEYS[1]),
        ];
        assert_eq!(found.lines, expected);
        let effects = device.apply(found.request);
        assert!(effects.iter().any(|effect| matches!(effect, Effect::PeerAdded { .. })));
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn route(text: &str) -> Step {
        Step::Route { prefix: net(text), table: MAIN_TABLE }
    }

    /// A ledger of these steps, all of them done.
    fn noted(steps: &[Step]) -> Vec<Noted> {
        let ids = (0..).map(|id: usize| serde_json::from_value(id.into()).unwrap());
        steps
            .iter()
            .zip(ids)
            .map(|(step, id)| Noted { id, step: step.clone(), done: true })
            .collect()
    }

    fn of_addresses(addresses: &[IpNet]) -> Present {
        Present { addresses: addresses.to_vec(), routes: None }
    }

    fn steps(noted: &[Noted]) -> Vec<&Step> {
        noted.iter().map(|noted| &noted.step).collect()
    }

    #[test]
    fn new_steps_are_done_and_vanished_ones_undone_backwards() {
        let address = |text| Step::Address(net(text));
        let before = noted(&[
            Step::Daemon,
            address("10.0.0.1/24"),
            address("10.0.0.3/24"),
            route("10.1.0.0/16"),
            route("10.2.0.0/16"),
        ]);
        let wanted = [
            address("10.0.0.1/24"),
            address("10.0.0.2/24"),
            route("10.2.0.0/16"),
            route("10.3.0.0/16"),
        ];
        let present = ["10.0.0.1/24", "10.0.0.3/24"].map(net);
        let found = of_host(&before, &wanted, &of_addresses(&present));
        assert_eq!(found.add, [address("10.0.0.2/24"), route("10.3.0.0/16")]);
        assert_eq!(steps(&found.remove), [&route("10.1.0.0/16"), &address("10.0.0.3/24")]);
        assert!(found.adopt.is_empty() && found.forget.is_empty());
        // By hand somebody took one address and gave another.
        let found =
            of_host(&before, &wanted, &of_addresses(&["10.0.0.1/24", "10.0.0.2/24"].map(net)));
        assert_eq!(found.adopt, [address("10.0.0.2/24")]);
        assert_eq!(steps(&found.forget), [&address("10.0.0.3/24")]);
        assert_eq!(steps(&found.remove), [&route("10.1.0.0/16")]);
    }

    #[test]
    fn a_route_that_has_vanished_is_added_again() {
        let before = noted(&[route("10.1.0.0/16"), route("10.2.0.0/16"), route("10.3.0.0/16")]);
        let wanted = [route("10.1.0.0/16"), route("10.2.0.0/16")];
        let routes = [(net("10.1.0.0/16"), MAIN_TABLE), (net("10.2.0.0/16"), 7)];
        let present = Present { addresses: Vec::new(), routes: Some(routes.into()) };
        let found = of_host(&before, &wanted, &present);
        assert_eq!(found.add, [route("10.2.0.0/16")]);
        assert_eq!(steps(&found.forget), [&route("10.3.0.0/16"), &route("10.2.0.0/16")]);
        assert!(found.remove.is_empty() && found.adopt.is_empty());
    }

    #[test]
    fn what_was_begun_and_can_be_seen_is_not_done_anew() {
        let address = |text| Step::Address(net(text));
        let all = [address("10.0.0.1/24"), address("10.0.1.1/24"), route("10.2.0.0/16")];
        let mut before = noted(&all);
        before.iter_mut().for_each(|noted| noted.done = false);
        let routes = Some([(net("10.2.0.0/16"), MAIN_TABLE)].into());
        let present = Present { addresses: vec![net("10.0.0.1/24")], routes };
        let found = of_host(&before, &all, &present);
        assert_eq!(steps(&found.confirm), [&all[2], &all[0]]);
        assert_eq!((found.add, steps(&found.forget)), (vec![all[1].clone()], vec![&all[1]]));
        assert!(found.remove.is_empty() && found.adopt.is_empty());
        let found = of_host(&before, &[], &present);
        assert_eq!(steps(&found.remove), [&all[2], &all[0]]);
    }

    #[test]
    fn what_the_host_said_makes_no_difference() {
        let rule = |priority| Step::Rule {
            family: Family::V4,
            kind: RuleKind::MainWithoutDefault,
            priority,
        };
        let found = of_host(&noted(&[rule(Some(7))]), &[rule(None)], &Present::default());
        assert!(found.add.is_empty() && found.remove.is_empty());
        // What was begun and is not known to be done is done anew.
        let mut before = noted(&[rule(Some(7))]);
        before[0].done = false;
        let found = of_host(&before, &[rule(None)], &Present::default());
        assert_eq!((found.add.len(), found.remove.len()), (1, 1));
    }

    #[test]
    fn a_route_that_an_address_covered_is_needed_without_it() {
        let wanted = || vec![route("10.0.0.2/32"), route("10.1.0.0/16")];
        let present = ["10.0.0.0/24", "10.1.0.0/16"].map(net);
        let noted = noted(&[route("10.1.0.0/16")]);
        let needed = |addresses: &[IpNet], gone: &[IpNet]| {
            without_covered_routes(wanted(), &noted, &present, addresses, gone)
        };
        assert_eq!(needed(&[net("10.0.0.1/24")], &[]), [route("10.1.0.0/16")]);
        assert_eq!(needed(&[net("10.0.0.1/32")], &[net("10.0.0.1/24")]), wanted());
        assert_eq!(needed(&[net("10.0.0.1/8")], &[net("10.0.0.1/24")]), []);
    }
}
