//! `reload`: makes an interface that is up what its config file says now, by the difference alone.
//!
//! What can fail and disturbs nobody comes first: addresses, routes, the MTU, filters, name servers.
//! Then one request changes the device, then rules lead to new default routes, then what the file has
//! no more is undone. Peers leave last, for their sessions do not come back. If something fails,
//! everything is taken back in reverse. Each step is noted before it is done, and what is about to be
//! undone as well, so that another reload knows what one that was killed has left in doubt.

mod change;

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::Context as _;
use ipnet::IpNet;

use self::change::Work;
use super::{
    Code, Failure,
    applied::{self, Applied, AppliedEndpoint, AtStart},
    args::{self, DataPathArgs},
    difference::{self, DeviceDifference, HostDifference, Label, Present, described, is_same},
    down::runtime,
    forwarding,
    ledger::{Ledger, Noted, Record},
    name::{ConfigFile, InterfaceName},
    nat,
    plan::{Plan, RoutesTo},
    print, resolve,
    running::Running,
    show,
    socket::Socket,
    steps::{self, Context, Step},
    up::{self, Interruption},
};
use crate::{
    config::{self, Config, ConfigErrors, Endpoint, HookEvent},
    device::SetRequest,
    host::{Family, Host, HostError, Link},
    key::PublicKey,
};

pub fn reload(arguments: &args::Reload) -> Result<Code, Failure> {
    let file = ConfigFile::which(&arguments.what, Path::exists)
        .map_err(|error| Failure::new(Code::Usage, error))?;
    let text = up::read(&file.path)?;
    follow(&file, &text, arguments.dry_run, print)
}

/// Tells people what differs; each line ends with `\n`.
pub type Say = fn(&str) -> Result<(), Failure>;

/// Makes an interface that is up what its file says, which is `text`.
///
/// # Errors
/// If it cannot: all is as it was then, as far as the text of the error does not say otherwise.
pub fn follow(file: &ConfigFile, text: &str, is_dry: bool, say: Say) -> Result<Code, Failure> {
    let interface = &file.interface;
    let config = config::parse(&file.path.display().to_string(), text).map_err(Failure::config)?;
    if let Some(errors) = ConfigErrors::new(config.unsupported()) {
        return Err(Failure::config(errors));
    }
    let plan = Plan::new(interface, &config, &DataPathArgs::default())?;
    let plan = plan.with_routers(&config, &forwarding::with_routers());
    // What goes round the firewall already was looked at, or let, by who brought it up.
    let is_same = nat::state(interface)?.is_some_and(|state| state.lines == nat::lines_of(&config));
    forwarding::check(interface, &config, is_same)?;
    let ledger = Ledger::open(interface).map_err(|failure| failure.within(interface))?;
    let ledger = ledger.filter(|ledger| !ledger.record().is_left_over());
    let socket = Socket::find(interface)?.ok_or_else(|| show::not_found(interface))?;
    if ledger.as_ref().is_some_and(|ledger| !ledger.record().header.is_of_this_netns()) {
        let line = "it was brought up in another network namespace; reload it there (`ip netns exec NAME \
                    tidegate reload`)";
        return Err(Failure::new(Code::Existence, line).within(interface));
    }
    if ledger.as_ref().is_some_and(|ledger| !ledger.record().is_up) {
        let line =
            "an `up` that was killed has brought up a part of it; use `tidegate down`, then `up`";
        return Err(Failure::new(Code::Existence, line).within(interface));
    }
    let running = Running::ask(interface, &socket).map_err(|failure| failure.within(interface))?;
    let known = ledger.as_ref().map_or_else(Known::default, |ledger| Known::of(ledger.record()));
    // A name service may take long, and nothing has begun yet: signals end this process as ever.
    let endpoints = new_endpoints(&config, &running, &known)?;

    let runtime = runtime()?;
    let host = runtime.block_on(async { Host::new() })?;
    let (path, host) = (&file.path, &host);
    let reload = Reload { interface, host, path, config: &config, plan: &plan, say };
    let outcome = match ledger {
        Some(ledger) => {
            let state = State { ledger, running, known, endpoints };
            runtime.block_on(reload.by_ledger(state, is_dry))
        }
        None => reload.device_only(&running, &endpoints, is_dry),
    };
    runtime.shutdown_background();
    outcome.map_err(|failure| failure.within(interface))
}

/// The endpoints that are to be set: of new peers, and where the file has another one than it had when
/// it was carried out last. A peer that has roamed stays where it is else.
fn new_endpoints(
    config: &Config,
    running: &Running,
    known: &Known,
) -> Result<HashMap<PublicKey, SocketAddr>, Failure> {
    let now: HashMap<PublicKey, Option<SocketAddr>> =
        running.peers.iter().map(|peer| (peer.public_key, peer.endpoint)).collect();
    let mut endpoints = HashMap::new();
    for peer in &config.peers {
        let Some(endpoint) = peer.endpoint.as_deref() else { continue };
        let has_none = now.get(&*peer.public_key).copied().flatten().is_none();
        let written = applied::written(endpoint);
        let is_new = known.either(|known| {
            known.endpoint(&peer.public_key).is_none_or(|before| before.written != written)
        });
        if has_none || is_new {
            let address = match endpoint {
                Endpoint::Address(address) => *address,
                Endpoint::Host { host, port } => resolve::resolve(host, *port, resolve::retries())
                    .map_err(|failure| failure.within(format_args!("peer {}", Label(peer))))?,
            };
            endpoints.insert(*peer.public_key, address);
        }
    }
    Ok(endpoints)
}

/// What was carried out before.
#[derive(Default)]
struct Known {
    /// What is in force.
    applied: Option<Applied>,
    /// What a reload that was killed had begun: any of it may be in force instead.
    begun: Option<Applied>,
}

impl Known {
    fn of(record: &Record) -> Known {
        Known { applied: record.applied.clone(), begun: record.applying.clone() }
    }

    /// Whether something can be said of what may be in force.
    fn either(&self, is_so: impl Fn(&Applied) -> bool) -> bool {
        self.applied.iter().chain(&self.begun).any(is_so)
    }
}

/// What is known before anything changes.
struct State {
    ledger: Ledger,
    running: Running,
    known: Known,
    endpoints: HashMap<PublicKey, SocketAddr>,
}

struct Reload<'a> {
    interface: &'a InterfaceName,
    host: &'a Host,
    path: &'a Path,
    config: &'a Config,
    plan: &'a Plan,
    say: Say,
}

/// All that differs.
struct Difference {
    device: DeviceDifference,
    host: HostDifference,
    /// The MTU that is to be set, and the one that is.
    mtu: Option<(Step, u32)>,
    /// Filters that are to be made anew, for they name the interface's addresses.
    filters: Vec<Noted>,
    applied: Applied,
    /// Lines about NAT, if the running ones are others.
    nat: Option<String>,
    lines: Vec<String>,
    /// What this file wants and a reload cannot do.
    left: Vec<String>,
}

impl Reload<'_> {
    /// Of an interface that something else has brought up: keys and peers only.
    fn device_only(
        &self,
        running: &Running,
        endpoints: &HashMap<PublicKey, SocketAddr>,
        is_dry: bool,
    ) -> Result<Code, Failure> {
        let mark = self.config.interface.fwmark.as_deref().copied();
        let found = difference::of_device(running, self.config, mark, endpoints);
        let (nat, nat_lines) = self.nat()?;
        if !is_dry && let Some(nat) = &nat {
            nat::follow(self.interface, nat)?;
        }
        if !is_dry && !found.is_none() {
            up::configure(self.interface, &found.at_once())?;
        }
        if !is_dry {
            up::tell_names(self.interface, self.config);
        }
        self.tell(&[found.lines.clone(), nat_lines].concat(), &[])?;
        eprintln!(
            "tidegate: warning: {}: it was not brought up by `tidegate up`, so that its addresses, \
             routes and name servers are left as they are",
            self.interface
        );
        Ok(Code::Ok)
    }

    async fn by_ledger(&self, mut state: State, is_dry: bool) -> Result<Code, Failure> {
        let mut interruption = Interruption::new()?;
        let found = self.difference(&mut state, is_dry).await?;
        if !is_dry {
            let mut work = Work::new(self, &mut state, &found);
            let outcome = tokio::select! {
                outcome = work.run(&found) => outcome,
                () = interruption.wait() => Err(Failure::new(Code::Runtime, "interrupted")),
            };
            if let Err(failure) = outcome {
                let is_back = work.take_back().await;
                return Err(failure.and(if is_back {
                    "everything is as it was before"
                } else {
                    "not everything could be taken back"
                }));
            }
            up::tell_names(self.interface, self.config);
        }
        self.tell(&found.lines, &found.left)
    }

    fn tell(&self, lines: &[String], left: &[String]) -> Result<Code, Failure> {
        let interface = self.interface;
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        if lines.is_empty() && left.is_empty() {
            (self.say)(&format!("{interface}: nothing to do\n"))?;
        } else {
            (self.say)(&text)?;
        }
        for line in left {
            eprintln!("tidegate: warning: {interface}: {line}");
        }
        Ok(if left.is_empty() { Code::Ok } else { Code::Degraded })
    }

    async fn difference(&self, state: &mut State, is_dry: bool) -> Result<Difference, Failure> {
        let (plan, config) = (self.plan, self.config);
        let noted: Vec<Noted> = state.ledger.record().steps().cloned().collect();
        let automatic = noted.iter().find_map(|noted| match noted.step {
            Step::Mark(mark) => Some(mark),
            _ => None,
        });
        let table = match automatic.or(state.ledger.record().table) {
            Some(table) => Some(table),
            None if plan.needs_policy_table() => {
                // It is not given to two interfaces at once, nor another one to this if it is killed.
                let _choosing = Ledger::choose().context("waiting for another `tidegate`")?;
                let table = up::free_table(self.interface, self.host).await?;
                if !is_dry {
                    state.ledger.takes_table(table).context("noting a routing table")?;
                }
                Some(table)
            }
            None => None,
        };
        let state = &*state;
        let record = state.ledger.record();
        let link = self.link().await?;
        let present = self.present(&link).await?;
        let mut left = Vec::new();
        let mut wanted = plan.steps(table.filter(|_| plan.needs_policy_table()));
        wanted.extend(addresses_kept_for_routes(&noted, &wanted, &present.addresses, &mut left));
        let is_wanted_address = |net: &IpNet| wanted.contains(&Step::Address(*net));
        if plan.routes_to == RoutesTo::Auto {
            let addresses: Vec<IpNet> = wanted.iter().filter_map(address_of).collect();
            let gone: Vec<IpNet> = noted
                .iter()
                .filter_map(|noted| address_of(&noted.step))
                .filter(|net| !is_wanted_address(net))
                .collect();
            let routes = self.host.routes(link.index).await?;
            wanted = difference::without_covered_routes(
                wanted.clone(),
                &noted,
                &routes,
                &addresses,
                &gone,
            );
        }
        let mut host = difference::of_host(&noted, &wanted, &present);
        host.add = self.needed(host.add).await?;
        let mark = self.mark(state, automatic, table);
        let device = difference::of_device(&state.running, config, mark, &state.endpoints);
        let mtu = self.mtu(state, &link).await?;
        let filters = filters_to_renew(&noted, &wanted, &present.addresses, &host);

        let mut lines = device.lines.clone();
        let (nat, nat_lines) = self.nat()?;
        lines.extend(nat_lines);
        let is_told = |step: &&Step| !matches!(step, Step::Mark(_));
        lines.extend(host.add.iter().filter(is_told).map(|step| format!("+ {}", described(step))));
        let removed = host.remove.iter().map(|noted| &noted.step);
        lines.extend(removed.filter(is_told).map(|step| format!("- {}", described(step))));
        if let Some((Step::Mtu(Some(mtu)), before)) = &mtu {
            lines.push(format!("~ MTU: {before} → {mtu}"));
        }
        let hooks = |hooks: &[super::ledger::Hook]| -> Vec<(HookEvent, String)> {
            hooks.iter().map(|hook| (hook.event, hook.command.clone())).collect()
        };
        if hooks(&record.header.down_hooks) != hooks(&plan.down_hooks) {
            lines.push("~ PreDown and PostDown: `down` runs those of the file as it is now".into());
        }
        let ran = noted.iter().filter_map(|noted| match &noted.step {
            Step::Hook(hook) => Some(hook.clone()),
            _ => None,
        });
        let ran: Vec<_> = ran.collect();
        if hooks(&ran) != hooks(&[plan.pre_up.clone(), plan.post_up.clone()].concat()) {
            lines.push("~ PreUp and PostUp: not run now, but by the next `up`".into());
        }
        let at_start = AtStart::of(config);
        if let Some(known) = state.known.applied.as_ref().filter(|known| known.at_start != at_start)
        {
            let differs = [
                ("Xdp", known.at_start.xdp != at_start.xdp),
                ("mode", known.at_start.mode != at_start.mode),
                ("Workers", known.at_start.workers != at_start.workers),
            ];
            let names: Vec<&str> =
                differs.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
            left.push(format!(
                "{} changed: only a new start takes that up; `tidegate down`, then `up`",
                names.join(", ")
            ));
        }
        let applied = self.applied(state)?;
        Ok(Difference { device, host, mtu, filters, applied, nat, lines, left })
    }

    /// The lines about NAT to follow, if others are followed at present, and what that changes.
    fn nat(&self) -> Result<(Option<String>, Vec<String>), Failure> {
        let before = nat::state(self.interface)?.unwrap_or_default().lines;
        let after = nat::lines_of(self.config);
        if before == after {
            return Ok((None, Vec::new()));
        }
        let gone = before.lines().filter(|line| !after.lines().any(|after| after == *line));
        let new = after.lines().filter(|line| !before.lines().any(|before| before == *line));
        let mut lines: Vec<String> = gone.map(|line| format!("- {line}")).collect();
        lines.extend(new.map(|line| format!("+ {line}")));
        if lines.is_empty() {
            lines.push("~ `#!` lines about NAT: in another order".to_owned());
        }
        Ok((Some(after), lines))
    }

    /// The steps without those that this host has no need of, or no program for.
    async fn needed(&self, steps: Vec<Step>) -> Result<Vec<Step>, Failure> {
        let mut needed = Vec::new();
        for step in steps {
            let depends = matches!(step, Step::Sysctl { .. } | Step::Dns { .. });
            if !depends || steps::settle(step.clone(), &self.context(&[])).await?.is_some() {
                needed.push(step);
            }
        }
        Ok(needed)
    }

    /// The mark that the device is to have, if it is not to keep its own.
    fn mark(&self, state: &State, automatic: Option<u32>, table: Option<u32>) -> Option<u32> {
        if let Some(mark) = self.plan.mark {
            return Some(mark);
        }
        if self.plan.needs_policy_table() {
            return table;
        }
        // Of a device without the file's mark it is not known who has set it; but these were ours.
        let running = Some(state.running.fwmark);
        let is_off = self.config.interface.fwmark.is_some();
        let is_ours = running == automatic || state.known.either(|known| known.fwmark == running);
        (is_off || is_ours).then_some(0)
    }

    /// The MTU to set: the file's, or what it would be of itself if the file has none any more.
    async fn mtu(&self, state: &State, link: &Link) -> Result<Option<(Step, u32)>, Failure> {
        let had_one = state.known.either(|known| known.mtu.is_some());
        let step = match self.plan.mtu {
            Some(mtu) => Step::Mtu(Some(mtu)),
            None if had_one => {
                let endpoints: Vec<SocketAddr> =
                    state.running.peers.iter().filter_map(|peer| peer.endpoint).collect();
                let context = self.context(&endpoints);
                match steps::settle(Step::Mtu(None), &context).await? {
                    Some(step) => step,
                    None => return Ok(None),
                }
            }
            None => return Ok(None),
        };
        Ok((step != Step::Mtu(Some(link.mtu))).then_some((step, link.mtu)))
    }

    fn applied(&self, state: &State) -> Result<Applied, Failure> {
        let mut applied = Applied::new(self.path, self.config, self.plan, &SetRequest::default())
            .context("noting what was done")?;
        let resolved = |key: &PublicKey| {
            let before = state.known.applied.as_ref().and_then(|known| known.endpoint(key));
            let before = before.and_then(|before: &AppliedEndpoint| before.resolved);
            state.endpoints.get(key).copied().or(before)
        };
        applied.endpoints = applied::endpoints(self.config, resolved);
        if let Some(known) = &state.known.applied {
            applied.at_start = known.at_start.clone();
        }
        Ok(applied)
    }

    fn context<'a>(&'a self, endpoints: &'a [SocketAddr]) -> Context<'a> {
        Context { interface: self.interface, host: self.host, endpoints }
    }

    async fn link(&self) -> Result<Link, Failure> {
        let name = self.interface.as_str();
        let link = self.host.link(name).await?;
        Ok(link.ok_or_else(|| HostError::NoLink(name.to_owned()))?)
    }

    async fn present(&self, link: &Link) -> Result<Present, Failure> {
        let addresses = self.addresses(link).await?;
        let routes = match link.is_up {
            true => Some(self.host.routes_of_all_tables(link.index).await?.into_iter().collect()),
            false => None,
        };
        Ok(Present { addresses, routes })
    }

    async fn addresses(&self, link: &Link) -> Result<Vec<IpNet>, Failure> {
        let all = self.host.addresses().await?;
        let ours = all.iter().filter(|address| address.link_index == link.index);
        Ok(ours.map(|address| address.net).collect())
    }

    /// Puts back what the kernel took away with an address: other addresses, and all IPv4 routes with
    /// the last one.
    async fn mend(&self, noted: &[Noted]) -> Result<(), Failure> {
        let link = self.link().await?;
        for noted in noted.iter().filter(|noted| noted.done) {
            self.add_unless_there(link.index, &noted.step).await?;
        }
        Ok(())
    }

    /// Adds an address or a route; false for other steps.
    async fn add_unless_there(&self, link_index: u32, step: &Step) -> Result<bool, HostError> {
        let outcome = match step {
            Step::Address(net) => self.host.add_address(link_index, *net).await,
            Step::Route { prefix, table } => self.host.add_route(link_index, *prefix, *table).await,
            _ => return Ok(false),
        };
        match outcome {
            Ok(()) | Err(HostError::Exists { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

fn address_of(step: &Step) -> Option<IpNet> {
    match step {
        Step::Address(net) => Some(*net),
        _ => None,
    }
}

/// Filters that stay and do not name the addresses that the interface is to have.
fn filters_to_renew(
    noted: &[Noted],
    wanted: &[Step],
    present: &[IpNet],
    host: &HostDifference,
) -> Vec<Noted> {
    let leaves = |net: &&IpNet| {
        host.remove.iter().any(|noted| address_of(&noted.step).as_ref() == Some(*net))
    };
    let stay = present.iter().filter(|net| !leaves(net)).copied();
    let addresses: HashSet<IpAddr> = stay
        .chain(host.add.iter().filter_map(address_of))
        .map(|net| net.addr())
        .filter(is_filtered)
        .collect();
    let is_other = |noted: &&Noted| match &noted.step {
        Step::Firewall { family, addresses: named, .. } => {
            let named: HashSet<IpAddr> = named.iter().copied().filter(is_filtered).collect();
            let of_family = |ip: &&IpAddr| ip.is_ipv4() == (*family == Family::V4);
            named != addresses.iter().filter(of_family).copied().collect()
        }
        _ => false,
    };
    let stays = |noted: &&Noted| noted.done && wanted.iter().any(|step| is_same(step, &noted.step));
    noted.iter().filter(stays).filter(is_other).cloned().collect()
}

/// The kernel gives an interface addresses of this link by itself, and when it likes.
fn is_filtered(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    }
}

/// The kernel takes all IPv4 routes away with the last IPv4 address. While there is a default route,
/// what should go through the tunnel would go elsewhere then, so that this address stays.
fn addresses_kept_for_routes(
    noted: &[Noted],
    wanted: &[Step],
    present: &[IpNet],
    left: &mut Vec<String>,
) -> Option<Step> {
    let is_v4 = |net: &IpNet| matches!(net, IpNet::V4(_));
    let has_default = |step: &Step| matches!(step, Step::Route { prefix: IpNet::V4(net), .. } if net.prefix_len() == 0);
    let is_kept = |net: &IpNet| {
        wanted.iter().any(|step| address_of(step).as_ref() == Some(net))
            || !noted.iter().any(|noted| address_of(&noted.step).as_ref() == Some(net))
    };
    let is_default_kept =
        wanted.iter().any(has_default) && noted.iter().any(|noted| has_default(&noted.step));
    let has_new = wanted.iter().filter_map(address_of).any(|net| is_v4(&net));
    if !is_default_kept || has_new || present.iter().filter(|net| is_v4(net)).any(is_kept) {
        return None;
    }
    let last = present.iter().copied().find(is_v4)?;
    left.push(format!(
        "address {last} stays, for the kernel would take the default route away with it: only a new \
         start does that safely; `tidegate down`, then `up`"
    ));
    Some(Step::Address(last))
}
