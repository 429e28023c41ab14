//! `show IF nat`, and how lines about NAT reach who carries them out.
//!
//! Both ask the keeper at a socket of its own. Flows are read from the kernel's maps by this process, so that a
//! list of many costs the daemon nothing.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::Context as _;
use serde::Serialize;
use wg_common::{
    headers::{PROTOCOL_TCP, PROTOCOL_UDP},
    nat::{
        map::{Flow, FlowKey, FlowKind, SEEN_IN},
        tcp,
    },
    upper::{PROTOCOL_ICMP, PROTOCOL_ICMPV6},
};

use super::{
    Code, Failure,
    name::InterfaceName,
    print, show,
    text::{self, Paint},
};
use crate::{
    bpf::NatView,
    keeper::nat::{Asked, ExternalState, State, Told, socket_path},
    nat::{Lines, address, sweep::is_permit},
    sys::clock,
};

/// The kernel may look at programs for some seconds before it takes them.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Flows and talkers that are shown as text.
const FLOWS_SHOWN: usize = 50;
const TALKERS_SHOWN: usize = 10;

/// Has the keeper of an interface follow these lines from now on, and no others; gives the lines of before.
///
/// # Errors
/// If it cannot; it goes on as before then.
pub fn follow(interface: &InterfaceName, lines: &str) -> Result<String, Failure> {
    match ask(interface, &Asked::Follow(lines.to_owned()))? {
        Some(Told::Followed(before)) => Ok(before),
        Some(Told::Refused(why)) => Err(Failure::new(Code::Runtime, why)),
        Some(Told::State(_)) => Err(other_version()),
        // Who asks for nothing gets that from one who knows nothing.
        None if lines.is_empty() => Ok(String::new()),
        None => Err(other_version()),
    }
}

/// How things stand, if the keeper of an interface knows of NAT.
///
/// # Errors
/// If it does not answer.
pub fn state(interface: &InterfaceName) -> Result<Option<State>, Failure> {
    match ask(interface, &Asked::State)? {
        Some(Told::State(state)) => Ok(Some(state)),
        Some(_) => Err(other_version()),
        None => Ok(None),
    }
}

fn other_version() -> Failure {
    Failure::new(
        Code::Runtime,
        "its daemon is of another version, which does not know of NAT; `tidegate down`, then `up`",
    )
}

fn ask(interface: &InterfaceName, asked: &Asked) -> Result<Option<Told>, Failure> {
    let path = socket_path(interface.as_str());
    let mut stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let path = path.display();
            let line = format_args!("{path} may be used by root only; run it as root");
            return Err(Failure::new(Code::Privilege, line));
        }
        Err(error) => {
            let doing = format!("connecting to {}", path.display());
            return Err(anyhow::Error::new(error).context(doing).into());
        }
    };
    let mut talk = || -> anyhow::Result<Told> {
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        stream.write_all(&serde_json::to_vec(asked)?)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut text = Vec::new();
        loop {
            match stream.read_to_end(&mut text) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(serde_json::from_slice(&text)?)
    };
    match talk() {
        // It has ended meanwhile, and takes its socket away before it lets go of who waits there.
        Err(error) if is_hung_up(&error) && UnixStream::connect(&path).is_err() => Ok(None),
        told => {
            let doing = || format!("asking the keeper of {interface} about NAT");
            Ok(Some(told.with_context(doing)?))
        }
    }
}

/// Whether somebody hung up before he answered.
fn is_hung_up(error: &anyhow::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(kind, Some(BrokenPipe | ConnectionReset | NotConnected))
        || error.downcast_ref::<serde_json::Error>().is_some_and(serde_json::Error::is_eof)
}

/// `show IF nat`
pub fn show(interface: &InterfaceName, as_json: bool) -> Result<Code, Failure> {
    let Some(state) = state(interface)? else { return Err(show::not_found(interface)) };
    let report = NatShown::read(interface, state).map_err(|failure| failure.within(interface))?;
    if as_json {
        let json = serde_json::to_string_pretty(&report).context("writing JSON")?;
        print(&format!("{json}\n"))?;
    } else {
        print(&report.text(Paint { is_on: show::wants_colour() }))?;
    }
    Ok(Code::Ok)
}

/// What `tidegate show IF nat --json` prints.
#[derive(Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct NatShown {
    /// The name of the interface.
    interface: String,
    /// Lines as in the file.
    lines: Vec<String>,
    /// Interfaces with a program.
    attached: Vec<AttachedReport>,
    /// How many flows there are.
    flow_count: usize,
    /// How many there may be.
    flow_count_max: usize,
    /// Addresses that stand for inner ones.
    externals: Vec<ExternalReport>,
    /// By inner address, who has most bytes first.
    talkers: Vec<Talker>,
    /// Packets dropped, by reason; reasons that never occurred are left out.
    drops: BTreeMap<&'static str, u64>,
    /// What else was counted, as above.
    events: BTreeMap<&'static str, u64>,
    /// How many flows each `Allow` line let begin.
    allows: Vec<AllowReport>,
    /// Who has most bytes first.
    flows: Vec<FlowReport>,
}

/// Where a program is.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct AttachedReport {
    /// The interface; `tunnel` for the one that was asked about.
    interface: String,
    /// `tcx`, or `clsact` on kernels before 6.6.
    by: &'static str,
}

/// An external address.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct ExternalReport {
    /// The address; nothing if the NIC has none of this family at present.
    address: Option<IpAddr>,
    /// The NIC that has it.
    nic: String,
    /// Ports in use, by protocol.
    used: BTreeMap<&'static str, u32>,
    /// Ports that there are.
    ports: BTreeMap<&'static str, u32>,
}

/// An `Allow` line.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct AllowReport {
    /// As in the file.
    line: String,
    /// How many flows it let begin.
    flows: u64,
}

/// Somebody inside the tunnel.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Talker {
    /// The address.
    inner: IpAddr,
    /// How many flows it has.
    flow_count: usize,
    /// Bytes of them from inside.
    bytes_out: u64,
    /// Bytes of them from outside.
    bytes_in: u64,
}

/// A flow.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FlowReport {
    /// `tcp`, `udp`, `echo`, or the number of another protocol.
    pub protocol: String,
    /// The end inside the tunnel; the port of an echo is its identifier.
    #[cfg_attr(test, schemars(with = "String"))]
    pub inner: SocketAddr,
    /// The other end; port 0 of an echo.
    #[cfg_attr(test, schemars(with = "String"))]
    pub remote: SocketAddr,
    /// The external end, if it is translated.
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub external: Option<SocketAddr>,
    /// `source` (by a `Nat` line) or `forward`; `plain` or `plain_inbound` (begun outside) if it is not translated.
    pub kind: &'static str,
    /// Of TCP its state; else whether it was answered.
    pub state: String,
    /// Seconds since its first packet.
    pub age_s: u64,
    /// Seconds since its last packet.
    pub idle_s: u64,
    /// Packets from inside.
    pub packets_out: u64,
    /// Packets from outside.
    pub packets_in: u64,
    /// Bytes from inside, IP headers included.
    pub bytes_out: u64,
    /// Bytes from outside, likewise.
    pub bytes_in: u64,
}

const PROTOCOLS: [&str; 3] = ["tcp", "udp", "echo"];

impl NatShown {
    fn read(interface: &InterfaceName, state: State) -> Result<Self, Failure> {
        let State { lines, ids, flow_count_max, externals, attached } = state;
        let mut report = Self {
            interface: interface.to_string(),
            lines: lines.lines().map(str::to_owned).collect(),
            flow_count_max,
            externals: externals.into_iter().map(ExternalReport::new).collect(),
            ..Self::default()
        };
        report.attached = attached
            .into_iter()
            .map(|(interface, is_link)| AttachedReport {
                interface,
                by: if is_link { "tcx" } else { "clsact" },
            })
            .collect();
        report.attached.sort_by(|a, b| a.interface.cmp(&b.interface));
        let Some(ids) = ids else { return Ok(report) };
        let mut view = NatView::open(ids)
            .map_err(anyhow::Error::new)
            .context("opening the maps of NAT, which only root may")?;
        report.read_flows(&mut view)?;
        let counters = view.counters().map_err(anyhow::Error::new)?;
        let seen = |(_, count): &(_, u64)| *count != 0;
        let drops = counters.drops().map(|(reason, count)| (reason.name(), count));
        report.drops = drops.filter(seen).collect();
        let events = counters.events().map(|(event, count)| (event.name(), count));
        report.events = events.filter(seen).collect();
        let allows = report.lines.iter().filter(|line| line.starts_with("#! Allow"));
        for (number, line) in (0..).zip(allows) {
            let flows = view.allowed(number).map_err(anyhow::Error::new)?;
            report.allows.push(AllowReport { line: line.clone(), flows });
        }
        Ok(report)
    }

    fn read_flows(&mut self, view: &mut NatView) -> Result<(), Failure> {
        let now_ns = clock::boot_now().boot_ns();
        // One may come twice.
        let mut found: HashMap<FlowKey, Flow> = HashMap::new();
        for entry in view.flows().each() {
            let (key, flow) = entry.context("reading the flows of NAT")?;
            if !is_permit(&key) {
                found.insert(key, flow);
            }
        }
        self.flow_count = found.len();
        self.flows = found.iter().map(|(key, flow)| FlowReport::new(key, flow, now_ns)).collect();
        self.flows.sort_by_key(|flow| {
            (std::cmp::Reverse(flow.bytes_out + flow.bytes_in), flow.inner, flow.remote)
        });
        let mut talkers: HashMap<IpAddr, Talker> = HashMap::new();
        for flow in &self.flows {
            let inner = flow.inner.ip();
            let talker = talkers.entry(inner).or_insert(Talker {
                inner,
                flow_count: 0,
                bytes_out: 0,
                bytes_in: 0,
            });
            talker.flow_count += 1;
            talker.bytes_out += flow.bytes_out;
            talker.bytes_in += flow.bytes_in;
        }
        self.talkers = talkers.into_values().collect();
        self.talkers.sort_by_key(|talker| {
            (std::cmp::Reverse(talker.bytes_out + talker.bytes_in), talker.inner)
        });
        Ok(())
    }

    fn text(&self, paint: Paint) -> String {
        let mut out = String::new();
        self.write(&mut out, paint).expect("a text takes everything");
        out
    }

    fn write(&self, out: &mut String, paint: Paint) -> std::fmt::Result {
        let bytes = |count| text::bytes(count, paint);
        writeln!(out, "interface: {}", self.interface)?;
        if self.lines.is_empty() {
            return writeln!(out, "  no `#! Nat`, `#! Forward` or `#! Allow` line is followed");
        }
        for line in &self.lines {
            writeln!(out, "  {line}")?;
        }
        let attached: Vec<String> =
            self.attached.iter().map(|at| format!("{} ({})", at.interface, at.by)).collect();
        writeln!(out, "  programs: {}", attached.join(", "))?;
        writeln!(out, "  flows: {} of {}", self.flow_count, self.flow_count_max)?;
        for external in &self.externals {
            let address = external.address.map_or("no address".to_owned(), |is| is.to_string());
            let ports: Vec<String> = PROTOCOLS
                .iter()
                .map(|name| format!("{name} {} of {}", external.used[name], external.ports[name]))
                .collect();
            writeln!(out, "  ports of {address} on {}: {}", external.nic, ports.join(", "))?;
        }
        for allow in &self.allows {
            let flows = text::plural(allow.flows, "flow");
            writeln!(out, "  allowed: {flows} by `{}`", allow.line)?;
        }
        for (name, count) in &self.events {
            writeln!(out, "  {name}: {count}")?;
        }
        for (name, count) in &self.drops {
            writeln!(out, "  dropped {name}: {count}")?;
        }
        if !self.talkers.is_empty() {
            writeln!(out, "\ntop talkers:")?;
        }
        for talker in self.talkers.iter().take(TALKERS_SHOWN) {
            let Talker { inner, flow_count, bytes_out, bytes_in } = talker;
            let flows = text::plural(*flow_count as u64, "flow");
            let (sent, received) = (bytes(*bytes_out), bytes(*bytes_in));
            writeln!(out, "  {inner}: {sent} out, {received} in, {flows}")?;
        }
        if !self.flows.is_empty() {
            writeln!(out, "\nflows:")?;
        }
        for flow in self.flows.iter().take(FLOWS_SHOWN) {
            let external = flow.external.map_or(String::new(), |is| format!(" as {is}"));
            let (sent, received) = (bytes(flow.bytes_out), bytes(flow.bytes_in));
            let FlowReport { protocol, inner, remote, state, idle_s, .. } = flow;
            // Who began it stands first.
            let way = match flow.kind {
                "forward" | "plain_inbound" => format!("{remote} -> {inner}"),
                _ => format!("{inner} -> {remote}"),
            };
            writeln!(
                out,
                "  {protocol} {way}{external}: {state}, {sent} out, {received} in, idle for {idle_s} s"
            )?;
        }
        if self.flows.len() > FLOWS_SHOWN {
            writeln!(out, "  … and {} more; `--json` has all", self.flows.len() - FLOWS_SHOWN)?;
        }
        Ok(())
    }
}

impl ExternalReport {
    fn new(external: ExternalState) -> Self {
        let ExternalState { address, nic, ports } = external;
        let by_name = |of: fn((u32, u32)) -> u32| {
            PROTOCOLS.iter().copied().zip(ports.into_iter().map(of)).collect()
        };
        Self { address, nic, used: by_name(|(used, _)| used), ports: by_name(|(_, all)| all) }
    }
}

impl FlowReport {
    /// A flow as it is at `now_ns`, which is boot time.
    pub fn new(key: &FlowKey, flow: &Flow, now_ns: u64) -> Self {
        let seconds = |then_ns: u64| now_ns.saturating_sub(then_ns) / 1_000_000_000;
        let end = |at, port: u16| SocketAddr::new(address(at), u16::from_be(port));
        let is_translated =
            flow.kind == FlowKind::Source as u8 || flow.kind == FlowKind::Forward as u8;
        let protocol = match key.protocol {
            PROTOCOL_TCP => "tcp".to_owned(),
            PROTOCOL_UDP => "udp".to_owned(),
            PROTOCOL_ICMP | PROTOCOL_ICMPV6 => "echo".to_owned(),
            other => other.to_string(),
        };
        let state = match key.protocol {
            PROTOCOL_TCP => format!("{:?}", tcp::State::of(flow.state)),
            _ if flow.state & SEEN_IN != 0 => "answered".to_owned(),
            _ => "unanswered".to_owned(),
        };
        Self {
            protocol,
            inner: end(key.inner, key.inner_port),
            remote: end(key.remote, key.remote_port),
            external: is_translated.then(|| end(flow.external, flow.external_port)),
            kind: match flow.kind {
                kind if kind == FlowKind::Source as u8 => "source",
                kind if kind == FlowKind::Forward as u8 => "forward",
                kind if kind == FlowKind::PlainInbound as u8 => "plain_inbound",
                _ => "plain",
            },
            state,
            age_s: seconds(flow.created_ns),
            idle_s: seconds(flow.last_seen_ns),
            packets_out: flow.packets[0],
            packets_in: flow.packets[1],
            bytes_out: flow.bytes[0],
            bytes_in: flow.bytes[1],
        }
    }
}

/// The lines of a file, as they are told.
pub fn lines_of(config: &crate::config::Config) -> String {
    Lines::of(&config.interface).text()
}

#[cfg(test)]
mod tests {
    use super::*;

    impl NatShown {
        /// One with something in every field.
        pub fn full() -> Self {
            let mut report = NatShown {
                interface: "wg0".to_owned(),
                lines: vec!["#! Nat = masquerade out=eth0".to_owned()],
                attached: vec![AttachedReport { interface: "eth0".to_owned(), by: "tcx" }],
                flow_count: 1,
                flow_count_max: 262_144,
                externals: vec![ExternalReport::new(ExternalState {
                    address: Some([192, 0, 2, 1].into()),
                    nic: "eth0".to_owned(),
                    ports: [(1, 8192), (0, 8192), (0, 8192)],
                })],
                ..NatShown::default()
            };
            report.drops.insert("no_port", 3);
            let flow = FlowReport {
                protocol: "tcp".to_owned(),
                inner: "10.9.0.2:40000".parse().unwrap(),
                remote: "198.51.100.7:443".parse().unwrap(),
                external: Some("192.0.2.1:5000".parse().unwrap()),
                kind: "source",
                state: "Established".to_owned(),
                age_s: 9,
                idle_s: 2,
                packets_out: 3,
                packets_in: 4,
                bytes_out: 300,
                bytes_in: 2048,
            };
            report.flows = vec![flow; FLOWS_SHOWN + 1];
            report.talkers = vec![Talker {
                inner: [10, 9, 0, 2].into(),
                flow_count: 1,
                bytes_out: 300,
                bytes_in: 0,
            }];
            report
                .allows
                .push(AllowReport { line: "#! Allow = 10.9.0.0/24 -> ::/0".to_owned(), flows: 1 });
            report.events.insert("passed_allowed", 1);
            report
        }
    }

    #[test]
    fn a_report_reads_well() {
        let mut report = NatShown::full();
        report.allows.clear();
        report.events.clear();
        let text = report.text(Paint { is_on: false });
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            &lines[..11],
            [
                "interface: wg0",
                "  #! Nat = masquerade out=eth0",
                "  programs: eth0 (tcx)",
                "  flows: 1 of 262144",
                "  ports of 192.0.2.1 on eth0: tcp 1 of 8192, udp 0 of 8192, echo 0 of 8192",
                "  dropped no_port: 3",
                "",
                "top talkers:",
                "  10.9.0.2: 300 B out, 0 B in, 1 flow",
                "",
                "flows:",
            ]
        );
        assert_eq!(
            lines[11],
            "  tcp 10.9.0.2:40000 -> 198.51.100.7:443 as 192.0.2.1:5000: Established, 300 B out, 2.00 KiB in, \
             idle for 2 s"
        );
        assert_eq!(lines.last().unwrap(), &"  … and 1 more; `--json` has all");
        assert!(NatShown::default().text(Paint { is_on: false }).contains("no `#! Nat`"));
    }
}
