//! Who the ends of a tunnel are, and what the file of each says.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand_core::CryptoRng;

use super::{
    args::{Common, EndName, Mesh, Node, Shape, Star},
    network::{Networks, unique_local},
};
use crate::{
    cli::end_file::{EndConfig, EndPeer, OwnKey, Place},
    config::{Allow, Endpoint, Nat, NatSource, OwnEndpoint, Spanned, Traffic},
    key::{PresharedKey, PrivateKey, PublicKey},
};

/// Seconds after which a NAT may forget a way.
const KEEPALIVE_S: u16 = 25;

/// Each end of a mesh has a peer for each other one: more than so many want something else.
const MESH_MAX: usize = 250;

/// An end, and what its file says.
#[derive(Debug)]
pub struct End {
    /// What it is called.
    pub name: String,
    /// What its file says.
    pub config: EndConfig,
}

/// The ends of a shape, with new keys.
///
/// # Errors
/// What does not go together.
pub fn ends(shape: &Shape, rng: &mut (impl CryptoRng + ?Sized)) -> Result<Vec<End>, String> {
    match shape {
        Shape::Bridge(of) => {
            let middle = Middle { name: &of.name, of: "bridge", behind: Vec::new(), out: None };
            star(&middle, &of.star, &of.common, rng)
        }
        Shape::Gateway(of) => {
            let out = Some(of.out.as_str());
            let middle = Middle { name: &of.name, of: "gateway", behind: Vec::new(), out };
            star(&middle, &of.star, &of.common, rng)
        }
        Shape::Jumpbox(of) => {
            let (behind, out) = (of.vlan.clone(), Some(of.out.as_str()));
            let middle = Middle { name: &of.name, of: "jumpbox", behind, out };
            star(&middle, &of.star, &of.common, rng)
        }
        Shape::Mesh(of) => mesh(of, rng),
    }
}

/// The end in the middle of a star.
struct Middle<'a> {
    name: &'a EndName,
    /// The shape's word on the command line.
    of: &'a str,
    /// The networks behind it. Of a gateway, which has none of them here, it is everything.
    behind: Vec<IpNet>,
    /// Its interface to what is behind it, if anything is.
    out: Option<&'a str>,
}

impl Middle<'_> {
    /// What clients send through it, beside what is for itself.
    fn reaches(&self, networks: &Networks) -> Vec<IpNet> {
        match self.out {
            Some(_) if self.behind.is_empty() => {
                networks.each().map(|network| everything(&network)).collect()
            }
            _ => self.behind.clone(),
        }
    }

    /// Whose packets go where, for each network inside.
    fn ways(&self, networks: &Networks) -> Vec<(IpNet, Vec<IpNet>)> {
        let (Some(_), reaches) = (self.out, self.reaches(networks)) else { return Vec::new() };
        let ways = networks.each().map(|from| {
            let is_alike = |to: &IpNet| to.addr().is_ipv4() == from.addr().is_ipv4();
            (from, reaches.iter().copied().filter(is_alike).collect::<Vec<_>>())
        });
        ways.filter(|(_, reaches)| !reaches.is_empty()).collect()
    }

    fn nat(&self, networks: &Networks) -> Vec<Nat> {
        let Some(out) = self.out else { return Vec::new() };
        let nat = |(from, _)| Nat {
            source: NatSource::Masquerade,
            out: Spanned::nowhere(out.to_owned()),
            from: Some(Spanned::nowhere(from)),
            bypass_firewall: false,
        };
        self.ways(networks).into_iter().map(nat).collect()
    }

    fn allow(&self, networks: &Networks) -> Vec<Allow> {
        let allow = |from: IpNet, to: IpNet| {
            let (from, to) = (Spanned::nowhere(from), Spanned::nowhere(to));
            Allow { from, to, traffic: Traffic::All }
        };
        let ways = self.ways(networks).into_iter();
        ways.flat_map(|(from, reaches)| reaches.into_iter().map(move |to| allow(from, to)))
            .collect()
    }

    fn about_forwarding(&self, networks: &Networks) -> Vec<String> {
        let Some(out) = self.out else { return Vec::new() };
        let what = if self.behind.is_empty() { "the internet" } else { "the networks behind it" };
        vec![
            format!(
                "Forwards what clients send to {what}, with {out}'s own address as the source, \
                 and nothing else."
            ),
            "`tidegate up` lets the host forward, and `down` sets that back. Without it:"
                .to_owned(),
            format!("sysctl -w {}", self.sysctls(networks).join(" ")),
        ]
    }

    /// What its host has to be told.
    fn sysctls(&self, networks: &Networks) -> Vec<String> {
        let reaches = self.reaches(networks);
        let mut sysctls = Vec::new();
        if reaches.iter().any(|to| to.addr().is_ipv4()) {
            sysctls.push("net.ipv4.ip_forward=1".to_owned());
        }
        if reaches.iter().any(|to| to.addr().is_ipv6()) {
            sysctls.push("net.ipv6.conf.all.forwarding=1".to_owned());
            // Who forwards learns no addresses and routes from routers, unless told to.
            if let (Some(out), true) = (self.out, self.behind.is_empty()) {
                sysctls.push(format!("net.ipv6.conf.{}.accept_ra=2", out.replace('.', "/")));
            }
        }
        sysctls
    }

    /// What a client's file says about it.
    fn about(&self, networks: &Networks) -> Vec<String> {
        if self.out.is_none() || !self.behind.is_empty() {
            return Vec::new();
        }
        let missing = match networks {
            Networks { v4: None, .. } => "IPv4",
            Networks { v6: None, .. } => "IPv6",
            _ => return vec!["Everything goes through it.".to_owned()],
        };
        let other = if missing == "IPv4" { "IPv6" } else { "IPv4" };
        vec![format!("All of {other} goes through it; {missing} goes its way without the tunnel.")]
    }
}

/// All of a family.
fn everything(of: &IpNet) -> IpNet {
    if of.addr().is_ipv4() { Ipv4Net::default().into() } else { Ipv6Net::default().into() }
}

fn star(
    middle: &Middle<'_>,
    star: &Star,
    common: &Common,
    rng: &mut (impl CryptoRng + ?Sized),
) -> Result<Vec<End>, String> {
    let names: Vec<&EndName> = std::iter::once(middle.name).chain(&star.clients).collect();
    let networks = networks(&names, common, rng)?;
    for (at, network) in middle.behind.iter().enumerate() {
        if network.prefix_len() == 0 {
            return Err(format!("{network} is everything: that is what `init gateway` is for"));
        }
        let overlaps = |other: &IpNet| other.contains(network) || network.contains(other);
        if let Some(other) = middle.behind[..at].iter().find(|other| overlaps(other)) {
            return Err(format!("the networks {other} and {network} overlap"));
        }
        if let Some(own) = networks.each().find(overlaps) {
            return Err(format!(
                "{network} behind {} and {own} inside the tunnel overlap; choose another one \
                 inside by {}",
                middle.name.as_str(),
                option_of(&own)
            ));
        }
        if !networks.each().any(|own| own.addr().is_ipv4() == network.addr().is_ipv4()) {
            return Err(format!(
                "nobody inside the tunnel can reach {network}; choose a network inside by {}",
                option_of(network)
            ));
        }
    }
    let endpoint = star.endpoint.endpoint(common.port);
    let inside: Vec<IpNet> = networks.each().chain(middle.behind.iter().copied()).collect();
    outside(&star.endpoint, &inside)?;

    let keys: Vec<PrivateKey> = names.iter().map(|_| PrivateKey::generate(rng)).collect();
    let preshared: Vec<Option<PresharedKey>> =
        star.clients.iter().map(|_| common.psk.then(|| PresharedKey::generate(rng))).collect();
    let mut ends = vec![End {
        name: middle.name.as_str().to_owned(),
        config: EndConfig {
            about: about(middle.name, middle.of, &names, common),
            addresses: networks.addresses(0),
            listen_port: Some(endpoint.port()),
            endpoint: Some(OwnEndpoint::at_listen_port(endpoint.clone())),
            key: OwnKey::Private(keys[0].clone()),
            dns: Vec::new(),
            mtu: None,
            about_forwarding: middle.about_forwarding(&networks),
            nat: middle.nat(&networks),
            allow: middle.allow(&networks),
            peers: (1..names.len())
                .map(|client| EndPeer {
                    name: Some(names[client].as_str().to_owned()),
                    about: Vec::new(),
                    public_key: keys[client].public_key(),
                    preshared_key: preshared[client - 1].clone(),
                    allowed_ips: networks.hosts(client),
                    place: Place::None,
                    persistent_keepalive: None,
                })
                .collect(),
        },
    }];
    let public_key = keys[0].public_key();
    let reaches = middle.reaches(&networks);
    // What is for everything is for the end in the middle, too.
    let is_all = reaches.iter().any(|network| network.prefix_len() == 0);
    let own = if is_all { Vec::new() } else { networks.hosts(0) };
    let allowed_ips: Vec<IpNet> = own.into_iter().chain(reaches).collect();
    for (client, key) in keys.into_iter().enumerate().skip(1) {
        ends.push(End {
            name: names[client].as_str().to_owned(),
            config: EndConfig {
                about: about(names[client], middle.of, &names[..1], common),
                addresses: networks.addresses(client),
                listen_port: None,
                endpoint: None,
                key: OwnKey::Private(key),
                dns: star.dns.iter().map(ToString::to_string).collect(),
                mtu: None,
                about_forwarding: Vec::new(),
                nat: Vec::new(),
                allow: Vec::new(),
                peers: vec![EndPeer {
                    name: Some(middle.name.as_str().to_owned()),
                    about: middle.about(&networks),
                    public_key,
                    preshared_key: preshared[client - 1].clone(),
                    allowed_ips: allowed_ips.clone(),
                    place: Place::At(endpoint.clone()),
                    persistent_keepalive: Some(KEEPALIVE_S),
                }],
            },
        });
    }
    Ok(ends)
}

fn mesh(mesh: &Mesh, rng: &mut (impl CryptoRng + ?Sized)) -> Result<Vec<End>, String> {
    let (nodes, common) = (&mesh.nodes, &mesh.common);
    let names: Vec<&EndName> = nodes.iter().map(|node| &node.name).collect();
    if !(2..=MESH_MAX).contains(&nodes.len()) {
        return Err(format!("a mesh has 2 to {MESH_MAX} nodes, this has {}", nodes.len()));
    }
    let networks = networks(&names, common, rng)?;
    let inside: Vec<IpNet> = networks.each().collect();
    let mut unfound: Option<&Node> = None;
    for (at, node) in nodes.iter().enumerate() {
        let Some(place) = &node.endpoint else {
            if let Some(first) = unfound.replace(node) {
                let (one, other) = (first.name.as_str(), node.name.as_str());
                return Err(format!(
                    "neither `{one}` nor `{other}` says where it is found: they could not reach \
                     each other; write `{one}=host:port`"
                ));
            }
            continue;
        };
        outside(place, &inside)?;
        let endpoint = place.endpoint(common.port);
        let is_there = |other: &&Node| {
            let other = other.endpoint.as_ref().map(|other| other.endpoint(common.port));
            other.as_ref() == Some(&endpoint)
        };
        if let Some(other) = nodes[..at].iter().find(is_there) {
            return Err(format!(
                "`{}` and `{}` cannot both be found at {endpoint}",
                other.name.as_str(),
                node.name.as_str(),
            ));
        }
    }
    let keys: Vec<PrivateKey> = names.iter().map(|_| PrivateKey::generate(rng)).collect();
    let public_keys: Vec<PublicKey> = keys.iter().map(PrivateKey::public_key).collect();
    // Of each two, at the row of the later one.
    let preshared: Vec<Vec<Option<PresharedKey>>> = (0..nodes.len())
        .map(|row| (0..row).map(|_| common.psk.then(|| PresharedKey::generate(rng))).collect())
        .collect();
    let found = |node: &Node| node.endpoint.as_ref().map(|place| place.endpoint(common.port));
    let peer = |own: usize, other: usize| EndPeer {
        name: Some(names[other].as_str().to_owned()),
        about: Vec::new(),
        public_key: public_keys[other],
        preshared_key: preshared[own.max(other)][own.min(other)].clone(),
        allowed_ips: networks.hosts(other),
        place: found(&nodes[other]).map_or(Place::None, Place::At),
        // Who is not found by the others keeps the way to them open.
        persistent_keepalive: nodes[own].endpoint.is_none().then_some(KEEPALIVE_S),
    };
    let end = |(own, private_key): (usize, PrivateKey)| {
        let others: Vec<usize> = (0..nodes.len()).filter(|&other| other != own).collect();
        let other_names: Vec<&EndName> = others.iter().map(|&other| names[other]).collect();
        let endpoint = found(&nodes[own]);
        End {
            name: names[own].as_str().to_owned(),
            config: EndConfig {
                about: about(names[own], "mesh", &other_names, common),
                addresses: networks.addresses(own),
                listen_port: endpoint.as_ref().map(Endpoint::port),
                endpoint: endpoint.map(OwnEndpoint::at_listen_port),
                key: OwnKey::Private(private_key),
                dns: Vec::new(),
                mtu: None,
                about_forwarding: Vec::new(),
                nat: Vec::new(),
                allow: Vec::new(),
                peers: others.iter().map(|&other| peer(own, other)).collect(),
            },
        }
    };
    Ok(keys.into_iter().enumerate().map(end).collect())
}

/// The networks inside, if the ends fit.
fn networks(
    names: &[&EndName],
    common: &Common,
    rng: &mut (impl CryptoRng + ?Sized),
) -> Result<Networks, String> {
    for (at, name) in names.iter().enumerate() {
        // Folders of some systems do not tell cases apart.
        let lower = name.as_str().to_lowercase();
        if names[..at].iter().any(|other| other.as_str().to_lowercase() == lower) {
            return Err(format!("two ends cannot both be called `{}`", name.as_str()));
        }
    }
    let v6 = common.network6.map_or_else(|| Some(unique_local(rng)), |choice| choice.0);
    let networks = Networks { v4: common.network.0, v6 };
    let Some(first) = networks.each().next() else {
        return Err("a tunnel without IPv4 and without IPv6 carries nothing: \
                    leave one `none` away"
            .to_owned());
    };
    networks.hold(names.len()).map_err(|error| {
        let small = networks.each().find(|network| error.starts_with(&network.to_string()));
        format!("{error}; choose a larger one by {}", option_of(&small.unwrap_or(first)))
    })?;
    Ok(networks)
}

/// Looks whether an endpoint is outside of what goes through the tunnel: else its own datagrams
/// would be sent into it.
fn outside(place: &OwnEndpoint, inside: &[IpNet]) -> Result<(), String> {
    let Some(address) = place.address() else { return Ok(()) };
    match inside.iter().find(|network| network.contains(&address)) {
        None => Ok(()),
        Some(network) => Err(format!(
            "the endpoint {address} lies in {network}, which is reached through the tunnel only"
        )),
    }
}

/// Comment at the top of a file.
fn about(own: &EndName, of: &str, others: &[&EndName], common: &Common) -> Vec<String> {
    /// More names than these help nobody.
    const NAMES_MAX: usize = 8;
    let others: Vec<&str> =
        others.iter().filter(|&&other| other != own).map(|other| other.as_str()).collect();
    let named = others[..others.len().min(NAMES_MAX)].join(", ");
    let rest = match others.len().saturating_sub(NAMES_MAX) {
        0 => String::new(),
        rest => format!(" and {rest} more"),
    };
    let ends = if others.len() == 1 { "end is" } else { "ends are" };
    vec![
        format!("{}, made by `tidegate init {of}`; the other {ends} {named}{rest}.", own.as_str()),
        format!(
            "It goes to /etc/wireguard/{}.conf of that host, readable by root alone.",
            common.interface
        ),
        "\"There\" is the other end's file: where the two do not match, packets are dropped \
         without a word."
            .to_owned(),
    ]
}

/// The option by which the network of a family is chosen.
fn option_of(network: &IpNet) -> &'static str {
    if network.addr().is_ipv4() { "--network" } else { "--network6" }
}
