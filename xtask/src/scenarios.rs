//! `cargo xtask run --scenario …`: what people use such tunnels for, from the files of `examples/`.
//!
//! ```text
//!  bridge    laptop ══ server1
//!
//!  gateway   laptop ══ internet ══ gateway         the gateway is a host of the internet like the
//!                          │                       others; nobody there knows the way to 10.9.0.0/24
//!                         web
//!
//!  jumpbox   laptop ══ jumpbox ── vlan             the VLAN knows the jumpbox, and nothing behind it
//!
//!  mesh      server1 ══╗
//!            server2 ══╬ a switch
//!            server3 ══╝
//! ```
//!
//! The files are used as they are: addresses and names of NICs are those that they say, for each host
//! has a `/run` and an `/etc/wireguard` of its own. All ends come up by `tidegate up`, or by the real
//! wg-quick(8) with a daemon in user space.

mod nat;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fmt::Write as _,
    fs::{self, Permissions},
    net::IpAddr,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::{
    demonstration::{
        self, DataPath, Mode, OTHER_MODE, Programs, SHARE_MIN, STEP_LIMIT, Tools, Transfer, share,
        step,
    },
    lab::{self, End, Layout, Site, Space, conf_values, find_program, wait_for},
};

use self::nat::Translator;
pub use self::nat::{Nat, Translated};

/// The public interface of every host, as the files call it.
const NIC: &str = "eth0";
/// How long a daemon may take to leave nothing behind.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Echo requests of one way.
const PING_COUNT: u32 = 5;

/// A use of tunnels.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scenario {
    /// A laptop reaches one server
    Bridge,
    /// A laptop sends everything through a gateway, which masquerades
    Gateway,
    /// A laptop reaches a VLAN behind a server
    Jumpbox,
    /// Servers reach each other
    Mesh,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Scenario; 4] =
        [Scenario::Bridge, Scenario::Gateway, Scenario::Jumpbox, Scenario::Mesh];

    /// The word on the command line, and the folder in `examples/`.
    pub fn word(self) -> &'static str {
        match self {
            Scenario::Bridge => "bridge",
            Scenario::Gateway => "gateway",
            Scenario::Jumpbox => "jumpbox",
            Scenario::Mesh => "mesh",
        }
    }

    /// Where it takes place.
    pub fn layout(self) -> &'static Layout {
        &self.description().layout
    }

    /// The hosts with a file of `examples/`, and its text; those that wait for others come first.
    pub fn files(self) -> &'static [(&'static str, &'static str)] {
        self.description().files
    }

    fn description(self) -> &'static Description {
        match self {
            Scenario::Bridge => &BRIDGE,
            Scenario::Gateway => &GATEWAY,
            Scenario::Jumpbox => &JUMPBOX,
            Scenario::Mesh => &MESH,
        }
    }
}

/// How an end is brought up and down.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// `tidegate up`
    Tidegate,
    /// wg-quick(8) with `tidegated`
    WgQuick,
    /// wg-quick(8) with wireguard-go
    WireguardGo,
}

impl By {
    /// The word on the command line and in reports.
    pub fn word(self) -> &'static str {
        match self {
            By::Tidegate => "tidegate",
            By::WgQuick => "wg-quick",
            By::WireguardGo => "wireguard-go",
        }
    }

    /// The daemon that wg-quick(8) is told to use.
    fn userspace(self) -> Option<&'static str> {
        match self {
            By::Tidegate => None,
            By::WgQuick => Some("tidegated"),
            By::WireguardGo => Some("wireguard-go"),
        }
    }
}

/// What to show.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// As without a scenario
    #[command(flatten)]
    pub common: demonstration::Options,
    /// Which scenario, if any
    #[arg(long, value_enum)]
    pub scenario: Option<Scenario>,
    /// How the last end is brought up
    #[arg(long, value_enum, default_value_t = By::Tidegate)]
    pub peer: By,
    /// Who translates in a scenario with a gateway
    #[arg(long, value_enum, default_value_t = Nat::Iptables)]
    pub nat: Nat,
}

struct Description {
    layout: Layout,
    files: &'static [(&'static str, &'static str)],
    ways: &'static [Way],
    /// A host, and what it must not reach.
    silent: &'static [(&'static str, &'static str)],
    /// Who translates, if anybody does.
    translator: Option<Translator>,
}

/// A way through the tunnel, in the order in which they are tried.
struct Way {
    from: &'static str,
    to: &'static str,
    address: &'static str,
    /// Where the far end must see it come from.
    seen_as: &'static str,
}

const fn way(
    from: &'static str,
    to: &'static str,
    address: &'static str,
    seen_as: &'static str,
) -> Way {
    Way { from, to, address, seen_as }
}

const fn end(host: &'static str, nic: &'static str, addresses: &'static [&'static str]) -> End {
    End { host, nic, addresses }
}

const BRIDGE: Description = Description {
    layout: Layout {
        hosts: &["laptop", "server1"],
        routers: &[],
        links: &[&[
            end("server1", NIC, &["198.51.100.1/24", "2001:db8:51::1/64"]),
            end("laptop", NIC, &["198.51.100.2/24", "2001:db8:51::2/64"]),
        ]],
        routes: &[],
        private: true,
    },
    files: &[
        ("server1", include_str!("../../examples/bridge/server1.conf")),
        ("laptop", include_str!("../../examples/bridge/laptop.conf")),
    ],
    ways: &[
        way("laptop", "server1", "10.9.0.1", "10.9.0.2"),
        way("laptop", "server1", "fd09::1", "fd09::2"),
        way("server1", "laptop", "10.9.0.2", "10.9.0.1"),
        way("server1", "laptop", "fd09::2", "fd09::1"),
    ],
    silent: &[],
    translator: None,
};

const GATEWAY: Description = Description {
    layout: Layout {
        hosts: &["laptop", "internet", "gateway", "web"],
        routers: &["internet", "gateway"],
        links: &[
            &[
                end("internet", "gateway", &["198.51.100.254/24", "2001:db8:51::fe/64"]),
                end("gateway", NIC, &["198.51.100.1/24", "2001:db8:51::1/64"]),
            ],
            &[
                end("internet", "laptop", &["192.0.2.1/24", "2001:db8:2::1/64"]),
                end("laptop", NIC, &["192.0.2.2/24", "2001:db8:2::2/64"]),
            ],
            &[
                end("internet", "web", &["203.0.113.1/24", "2001:db8:113::1/64"]),
                end("web", NIC, &["203.0.113.10/24", "2001:db8:113::10/64"]),
            ],
        ],
        routes: &[
            ("gateway", "default via 198.51.100.254"),
            ("gateway", "::/0 via 2001:db8:51::fe"),
            ("laptop", "default via 192.0.2.1"),
            ("laptop", "::/0 via 2001:db8:2::1"),
            ("web", "default via 203.0.113.1"),
            ("web", "::/0 via 2001:db8:113::1"),
        ],
        private: true,
    },
    files: &[
        ("gateway", include_str!("../../examples/gateway/gateway.conf")),
        ("laptop", include_str!("../../examples/gateway/laptop.conf")),
    ],
    ways: &[
        way("laptop", "gateway", "10.9.0.1", "10.9.0.2"),
        way("laptop", "gateway", "fd09::1", "fd09::2"),
        way("laptop", "web", "203.0.113.10", "198.51.100.1"),
        way("laptop", "web", "2001:db8:113::10", "2001:db8:51::1"),
    ],
    silent: &[],
    translator: Some(Translator {
        host: "gateway",
        lines: &[
            "#! Nat = masquerade out=eth0 from=10.9.0.0/24",
            "#! Nat = masquerade out=eth0 from=fd09::/64",
            "#! Allow = 10.9.0.0/24 -> 0.0.0.0/0",
            "#! Allow = fd09::/64 -> ::/0",
        ],
        far: ("web", &["203.0.113.10", "2001:db8:113::10"]),
        near: "laptop",
    }),
};

const JUMPBOX: Description = Description {
    layout: Layout {
        hosts: &["laptop", "jumpbox", "vlan"],
        routers: &["jumpbox"],
        links: &[
            &[
                end("jumpbox", NIC, &["198.51.100.1/24", "2001:db8:51::1/64"]),
                end("laptop", NIC, &["198.51.100.2/24", "2001:db8:51::2/64"]),
            ],
            &[
                end("jumpbox", "eth1", &["192.168.20.1/24", "fd20::1/64"]),
                end("vlan", NIC, &["192.168.20.2/24", "fd20::2/64"]),
            ],
        ],
        routes: &[],
        private: true,
    },
    files: &[
        ("jumpbox", include_str!("../../examples/jumpbox/jumpbox.conf")),
        ("laptop", include_str!("../../examples/jumpbox/laptop.conf")),
    ],
    ways: &[
        way("laptop", "jumpbox", "10.9.0.1", "10.9.0.2"),
        way("laptop", "jumpbox", "fd09::1", "fd09::2"),
        way("laptop", "vlan", "192.168.20.2", "192.168.20.1"),
    ],
    silent: &[("laptop", "fd20::2")],
    translator: Some(Translator {
        host: "jumpbox",
        lines: &[
            "#! Nat = masquerade out=eth1 from=10.9.0.0/24",
            "#! Allow = 10.9.0.0/24 -> 192.168.20.0/24",
        ],
        far: ("vlan", &["192.168.20.2"]),
        near: "laptop",
    }),
};

const MESH: Description = Description {
    layout: Layout {
        hosts: &["server1", "server2", "server3"],
        routers: &[],
        links: &[&[
            end("server1", NIC, &["198.51.100.1/24", "2001:db8:51::1/64"]),
            end("server2", NIC, &["198.51.100.2/24", "2001:db8:51::2/64"]),
            end("server3", NIC, &["198.51.100.3/24", "2001:db8:51::3/64"]),
        ]],
        routes: &[],
        private: true,
    },
    files: &[
        ("server1", include_str!("../../examples/mesh/server1.conf")),
        ("server2", include_str!("../../examples/mesh/server2.conf")),
        ("server3", include_str!("../../examples/mesh/server3.conf")),
    ],
    ways: &[
        way("server1", "server2", "10.9.0.2", "10.9.0.1"),
        way("server1", "server2", "fd09::2", "fd09::1"),
        way("server1", "server3", "10.9.0.3", "10.9.0.1"),
        way("server1", "server3", "fd09::3", "fd09::1"),
        way("server2", "server1", "10.9.0.1", "10.9.0.2"),
        way("server2", "server1", "fd09::1", "fd09::2"),
        way("server2", "server3", "10.9.0.3", "10.9.0.2"),
        way("server2", "server3", "fd09::3", "fd09::2"),
        way("server3", "server1", "10.9.0.1", "10.9.0.3"),
        way("server3", "server1", "fd09::1", "fd09::3"),
        way("server3", "server2", "10.9.0.2", "10.9.0.3"),
        way("server3", "server2", "fd09::2", "fd09::3"),
    ],
    silent: &[],
    translator: None,
};

/// What came of one way.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Seen {
    /// Who sent first.
    pub from: String,
    /// Who was reached.
    pub to: String,
    /// By which address.
    pub address: IpAddr,
    /// Echo requests sent.
    pub sent: u32,
    /// Echo requests answered.
    pub answered: u32,
    /// Mean round trip of the answered ones.
    pub mean_ms: Option<f64>,
    /// Files by TCP, one each way.
    pub transfers: Vec<Transfer>,
    /// Where the far end saw them come from.
    pub seen_as: Option<IpAddr>,
    /// Where they had to come from.
    pub expected: IpAddr,
}

impl Seen {
    fn is_good(&self) -> bool {
        self.answered > 0
            && self.transfers.iter().all(|transfer| transfer.equal)
            && self.seen_as == Some(self.expected)
    }
}

/// What was seen; `--report` writes it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Report {
    /// What was shown.
    pub scenario: Scenario,
    /// How each end was brought up.
    pub by: BTreeMap<String, By>,
    /// How each of our ends received.
    pub modes: BTreeMap<String, String>,
    /// How the ends that listen on a port of their own were to receive.
    pub requested_mode: Mode,
    /// Every way through the tunnel.
    pub ways: Vec<Seen>,
    /// Whether every file arrived as it left.
    pub hashes_equal: bool,
    /// What had to stay out of reach, and how many echo requests it answered.
    pub out_of_reach: BTreeMap<String, u32>,
    /// Tunnel packets received by those ends, by the path that they came.
    pub paths: BTreeMap<String, u64>,
    /// Who translated, and what it cost, if anybody did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat: Option<Translated>,
    /// What was there after the ends had gone down, and was not before, or the reverse.
    pub left: Vec<String>,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// How it ended: 0, 1 or 6.
    pub exit_code: u8,
}

impl Report {
    /// 0, 6 or 1: see [`OTHER_MODE`].
    fn verdict(&self, rootless: bool) -> u8 {
        let all_good = self.ways.iter().all(Seen::is_good)
            && self.out_of_reach.values().all(|&answered| answered == 0)
            && self.nat.as_ref().is_none_or(Translated::is_good)
            && self.left.is_empty();
        if !all_good {
            return 1;
        }
        let asked_for = match self.requested_mode {
            Mode::Auto => !rootless,
            mode => share(&self.paths, mode) >= SHARE_MIN,
        };
        if asked_for { 0 } else { OTHER_MODE }
    }

    /// The table at the end.
    pub fn table(&self) -> String {
        let list = |texts: Vec<String>| match texts.is_empty() {
            true => "none".to_owned(),
            false => texts.join(", "),
        };
        let ends = self.by.iter().map(|(host, by)| format!("{host} by {}", by.word()));
        let modes = self.modes.iter().map(|(host, mode)| format!("{host} {mode}"));
        let paths = self.paths.iter().filter(|&(_, &count)| count > 0);
        let paths = paths.map(|(path, count)| format!("{path} {count}"));
        let mut rows = vec![
            ("scenario".to_owned(), self.scenario.word().to_owned()),
            ("ends".to_owned(), list(ends.collect())),
            ("mode".to_owned(), list(modes.collect())),
            ("requested".to_owned(), self.requested_mode.word().to_owned()),
        ];
        for seen in &self.ways {
            let Seen { address, sent, answered, transfers, expected, .. } = seen;
            let ms = seen.mean_ms.map_or_else(String::new, |ms| format!(" {ms:.2} ms"));
            let equal = transfers.iter().filter(|transfer| transfer.equal).count();
            let mut text = format!(
                "{address:<16} {answered}/{sent}{ms}, {equal} of {} files equal, seen as ",
                transfers.len()
            );
            match seen.seen_as {
                Some(seen_as) => write!(text, "{seen_as}"),
                None => write!(text, "nobody"),
            }
            .expect("a string takes everything");
            if seen.seen_as != Some(*expected) {
                write!(text, " instead of {expected}").expect("a string takes everything");
            }
            rows.push((format!("{} → {}", seen.from, seen.to), text));
        }
        for (what, answered) in &self.out_of_reach {
            let text = match answered {
                0 => format!("{what}, as it should be"),
                _ => format!("NOT: {what} answered"),
            };
            rows.push(("out of reach".to_owned(), text));
        }
        rows.extend(self.nat.iter().flat_map(Translated::rows));
        rows.push(("came by".to_owned(), list(paths.collect())));
        rows.push(("left behind".to_owned(), list(self.left.clone())));
        rows.extend(self.notes.iter().map(|note| ("note".to_owned(), note.clone())));
        let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let rule = "─".repeat(72);
        let mut table = format!("{rule}\n");
        for (name, value) in rows {
            writeln!(table, " {name:<width$}  {value}").expect("a string takes everything");
        }
        table + &rule
    }
}

/// Shows it, prints the table and writes the report; without a scenario, the demonstration.
///
/// # Errors
/// If something did not work at all.
pub fn demonstrate(options: &Options) -> Result<ExitCode> {
    let common = &options.common;
    let Some(scenario) = options.scenario else { return demonstration::demonstrate(common) };
    demonstration::present(common, |programs| {
        let mut ends = vec![By::Tidegate; scenario.files().len()];
        *ends.last_mut().expect("every scenario has ends") = options.peer;
        let amount = Amount { file_len: 4 << 20, load: Some(Duration::from_secs(4)) };
        let report = show(scenario, programs, &ends, common, options.nat, amount)?;
        Ok((serde_json::to_value(&report)?, report.table(), report.exit_code))
    })
}

/// How much traffic to send.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// Bytes of the file that goes each way between two ends.
    pub file_len: u64,
    /// How long a load goes each way through who translates, if it does.
    pub load: Option<Duration>,
}

/// The whole of a scenario, at a site of its own: up, every way with a file there and back, and down. `ends` says how those of [`Scenario::files`] are brought up.
///
/// # Errors
/// If something did not work at all; what is not as it should be is a result.
pub fn show(
    scenario: Scenario,
    programs: &Programs,
    ends: &[By],
    options: &demonstration::Options,
    nat: Nat,
    amount: Amount,
) -> Result<Report> {
    let description = scenario.description();
    let translator = description.translator.as_ref();
    ensure!(
        nat == Nat::Iptables || translator.is_some(),
        "nobody translates in the scenario {}: `--nat` is for gateway and jumpbox",
        scenario.word()
    );
    let mut site = Site::new(&description.layout)?;
    if options.keep {
        site.keep();
    }
    let mut notes = Vec::new();
    if options.rootless {
        notes.push("no root and no sudo: a user namespace, where XDP cannot be used".to_owned());
    }
    let mode = if options.rootless { Mode::Udp } else { options.mode };
    let ends: Vec<_> = description
        .files
        .iter()
        .zip(ends)
        .map(|(&(host, conf), &by)| {
            let conf = translator.map_or_else(|| conf.to_owned(), |at| at.conf(host, conf, nat));
            Tunnel::new(&site, programs, host, &conf, by)
        })
        .collect::<Result<_>>()?;
    if let Some(translator) = translator {
        translator.track(&site)?;
    }
    let before = ends.iter().map(|end| state(end.space)).collect::<Result<Vec<_>>>()?;

    for end in &ends {
        step(&format!("{} comes up", end.host));
        end.up(mode, &mut notes)?;
    }
    let mut ways = Vec::new();
    for way in description.ways {
        ways.push(go(&site, programs, way, amount.file_len)?);
    }
    let mut out_of_reach = BTreeMap::new();
    for (from, to) in description.silent {
        step(&format!("{from} pings {to}, in vain"));
        // Without a route `ping` itself fails.
        let answered = site.space(from).ping(to, 2, &[]).map_or(0, |ping| ping.answered);
        out_of_reach.insert(format!("{to} from {from}"), answered);
    }
    let translated = translator
        .map(|translator| translator.look(&site, &programs.tool, nat, amount.load))
        .transpose()?;
    let (mut modes, mut paths) = (BTreeMap::new(), BTreeMap::<String, u64>::new());
    for end in ends.iter().filter(|end| end.by != By::WireguardGo) {
        let status = DataPath::of(end.space, &programs.tidegate, end.host)?;
        modes.insert(end.host.to_owned(), status.mode);
        for (path, count) in status.paths.into_iter().filter(|_| end.listens()) {
            *paths.entry(path).or_default() += count;
        }
    }

    let mut left = Vec::new();
    if options.keep {
        notes.push("kept: what goes down and leaves nothing behind was not tried".to_owned());
    } else {
        for end in &ends {
            step(&format!("{} goes down", end.host));
            end.down()?;
        }
        for (end, before) in ends.iter().zip(&before) {
            left.extend(end.left(before)?);
        }
    }
    let mut report = Report {
        scenario,
        by: ends.iter().map(|end| (end.host.to_owned(), end.by)).collect(),
        modes,
        requested_mode: options.mode,
        hashes_equal: ways.iter().flat_map(|seen| &seen.transfers).all(|transfer| transfer.equal),
        ways,
        out_of_reach,
        paths,
        nat: translated,
        left,
        notes,
        exit_code: 0,
    };
    report.exit_code = report.verdict(options.rootless);
    Ok(report)
}

fn go(site: &Site, programs: &Programs, way: &Way, file_len: u64) -> Result<Seen> {
    let &Way { from, to, address, seen_as } = way;
    step(&format!("{from} pings {to} at {address}"));
    let ping = site.space(from).ping(address, PING_COUNT, &[])?;
    // What nobody answers would only wait.
    let transfers = match ping.answered {
        0 => Vec::new(),
        _ => Tools::between(site, &programs.tool, site.space(from), site.space(to))?
            .files_with(address, file_len)?,
    };
    Ok(Seen {
        from: from.to_owned(),
        to: to.to_owned(),
        address: address.parse()?,
        sent: ping.sent,
        answered: ping.answered,
        mean_ms: ping.mean_ms,
        seen_as: transfers.iter().find_map(|transfer| transfer.seen_as),
        transfers,
        expected: seen_as.parse()?,
    })
}

/// One end, from a file in its host's `/etc/wireguard`; its interface is called like the host.
pub struct Tunnel<'a> {
    /// The host's role.
    pub host: &'static str,
    /// The host.
    pub space: &'a Space,
    /// How it is brought up.
    pub by: By,
    programs: &'a Programs,
    conf: String,
    path: OsString,
}

impl<'a> Tunnel<'a> {
    /// Puts the file where it belongs.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(
        site: &'a Site,
        programs: &'a Programs,
        host: &'static str,
        conf: &str,
        by: By,
    ) -> Result<Tunnel<'a>> {
        let space = site.space(host);
        let written = site.write(&format!("{host}.conf"), conf)?;
        let installed = format!("/etc/wireguard/{host}.conf");
        space
            .spawn(
                "install",
                space.command("install").args(["-m", "600"]).arg(written).arg(installed),
            )?
            .finish(STEP_LIMIT)?;
        let path = path_with_tools(site, programs)?;
        Ok(Tunnel { host, space, by, programs, conf: conf.to_owned(), path })
    }

    /// Whether it has a port that others know.
    fn listens(&self) -> bool {
        !conf_values(&self.conf, "ListenPort").is_empty()
    }

    /// Brings it up; with sockets if it does not come up in the mode that was asked for. Only an end
    /// that listens on a port of its own is asked for a mode, and only `tidegate up` can be.
    ///
    /// # Errors
    /// If it does not come up at all, with what was said about it.
    pub fn up(&self, mode: Mode, notes: &mut Vec<String>) -> Result<String> {
        if let Some(userspace) = self.by.userspace() {
            return self.wg_quick("up", userspace);
        }
        let up = |mode: Mode| {
            let mut command = self.command(&self.programs.tidegate);
            command.arg("up").arg(self.host);
            if self.listens() {
                command.args(["--mode", mode.word()]);
                if mode != Mode::Udp {
                    command.args(["--xdp", NIC]);
                }
            }
            self.space.spawn("tidegate-up", &mut command)?.finish(STEP_LIMIT)
        };
        let said = up(mode).or_else(|error| {
            lab::check_interrupted()?;
            if mode == Mode::Udp || !self.listens() {
                return Err(error);
            }
            let why = format!("--mode {} did not come up: {error:#}", mode.word());
            eprintln!("{why}");
            notes.push(why.lines().next_back().unwrap_or_default().to_owned());
            up(Mode::Udp)
        })?;
        for line in said.lines() {
            eprintln!("    {line}");
        }
        Ok(said)
    }

    /// Takes it down.
    ///
    /// # Errors
    /// If that fails.
    pub fn down(&self) -> Result<String> {
        match self.by.userspace() {
            Some(userspace) => self.wg_quick("down", userspace),
            None => {
                let mut command = self.command(&self.programs.tidegate);
                command.arg("down").arg(self.host);
                self.space.spawn("tidegate-down", &mut command)?.finish(STEP_LIMIT)
            }
        }
    }

    fn wg_quick(&self, verb: &str, userspace: &str) -> Result<String> {
        let mut command = self.command(Path::new("wg-quick"));
        command.args([verb, self.host]).env("WG_QUICK_USERSPACE_IMPLEMENTATION", userspace);
        self.space.spawn(&format!("wg-quick-{verb}"), &mut command)?.finish(STEP_LIMIT)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = self.space.command(program);
        command.env("PATH", &self.path);
        command
    }

    /// Waits until the host is as it was `before`, and gives what is not.
    ///
    /// # Errors
    /// If the host's state cannot be read.
    pub fn left(&self, before: &[String]) -> Result<Vec<String>> {
        // wg-quick(8) sets it and leaves it.
        let counts = |line: &&String| self.by == By::Tidegate || !line.contains("src_valid_mark");
        let differences = || -> Result<Vec<String>> {
            let after = state(self.space)?;
            let new = after.iter().filter(|line| !before.contains(line));
            let gone = before.iter().filter(|line| !after.contains(line));
            let new = new.filter(counts).map(|line| format!("{}: {line}", self.host));
            let gone = gone.filter(counts).map(|line| format!("{}: not {line}", self.host));
            Ok(new.chain(gone).collect())
        };
        let nothing = || Ok(differences()?.is_empty().then_some(Vec::new()));
        wait_for("nothing left", END_LIMIT, nothing).or_else(|_| {
            lab::check_interrupted()?;
            differences()
        })
    }
}

/// PATH with our daemon under its second name, and the administrator's programs.
///
/// wg-quick(8) asks for a daemon in user space only where the kernel has no WireGuard of its own. So that
/// it does everywhere, it is a copy that finds an `ip` beside it that knows no such links.
fn path_with_tools(site: &Site, programs: &Programs) -> Result<OsString> {
    let folder = site.path("bin");
    let tidegated = folder.join("tidegated");
    if !folder.exists() {
        fs::create_dir(&folder)?;
        symlink(&programs.tidegate, &tidegated)
            .with_context(|| format!("making {}", tidegated.display()))?;
        let ip = find_program("ip").context("no program `ip`")?;
        let script = format!(
            "#!/bin/sh\n\
             case \"$*\" in\n\
             'link add '*' type wireguard') echo 'Error: no WireGuard of the kernel here.' >&2; exit 2 ;;\n\
             esac\n\
             exec '{}' \"$@\"\n",
            ip.display()
        );
        fs::write(folder.join("ip"), script)?;
        fs::set_permissions(folder.join("ip"), Permissions::from_mode(0o755))?;
        if let Some(wg_quick) = find_program("wg-quick") {
            fs::copy(wg_quick, folder.join("wg-quick"))?;
        }
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = [folder].into_iter().chain(env::split_paths(&path));
    Ok(env::join_paths(folders.chain(["/usr/sbin".into(), "/sbin".into()]))?)
}

/// What a tunnel could leave behind on a private host, a line each.
///
/// # Errors
/// If it cannot be read.
pub fn state(space: &Space) -> Result<Vec<String>> {
    // Link-local addresses come when they like, and so do the namespaces of others.
    const SCRIPT: &str = r#"
        PATH=$PATH:/usr/sbin:/sbin
        ip -o link | sed 's/^[0-9]*: /link /; s/<[^>]*>//; s/ state [A-Z]*//'
        ip -o address | sed 's/^[0-9]*: /address /' | grep -v ' fe80:'
        for family in -4 -6; do
            ip $family rule | sed "s/^/rule $family /"
            ip $family route show table all | grep -v -e fe80: -e ff00: | sed "s/^/route $family /"
        done
        for save in iptables-save ip6tables-save; do
            command -v $save > /dev/null && $save | grep '^-' | sed "s/^/$save /"
        done
        # Those of iptables stay, with nothing in them.
        command -v nft > /dev/null && nft list tables | grep -e wg-quick- -e tidegate-
        grep -v ^nsfs /proc/self/mounts | sed 's/^/mount /'
        # A lock stays as a file that nobody holds.
        find /run/wireguard /run/tidegate /etc/wireguard ! -type d ! -path '/run/tidegate/ports/*' 2> /dev/null
        echo src_valid_mark $(cat /proc/sys/net/ipv4/conf/all/src_valid_mark)
    "#;
    let text = space.run("sh", &["-c", SCRIPT])?;
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.extend(space.processes().into_iter().map(|name| format!("process {name}")));
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values<'a>(conf: &'a str, key: &str) -> Vec<&'a str> {
        conf_values(conf, key)
    }

    /// Without the prefix length.
    fn addresses<'a>(conf: &'a str, key: &str) -> Vec<&'a str> {
        values(conf, key).into_iter().map(|net| net.split('/').next().unwrap()).collect()
    }

    #[test]
    fn the_examples_pair() {
        for scenario in Scenario::ALL {
            let files = scenario.files();
            for (host, conf) in files {
                let others = files.iter().filter(|(other, _)| other != host);
                let own = addresses(conf, "Address");
                for (other, theirs) in others {
                    let owned = addresses(theirs, "AllowedIPs");
                    let all = owned.contains(&"0.0.0.0") && owned.contains(&"::");
                    let named = own.iter().all(|address| owned.contains(address));
                    assert!(all || named, "{scenario:?}: {other} does not know {host}");
                }
                for endpoint in values(conf, "Endpoint") {
                    let (address, port) = endpoint.rsplit_once(':').unwrap();
                    let at = scenario.layout().links.iter().copied().flatten().find(|end| {
                        end.addresses.iter().any(|net| net.split('/').next() == Some(address))
                    });
                    let at = at.unwrap_or_else(|| panic!("{scenario:?}: nobody is at {endpoint}"));
                    let (_, there) = files.iter().find(|(host, _)| *host == at.host).unwrap();
                    assert_eq!(values(there, "ListenPort"), [port]);
                }
            }
        }
    }

    fn report(seen_as: &str) -> Report {
        Report {
            scenario: Scenario::Bridge,
            by: BTreeMap::new(),
            modes: BTreeMap::new(),
            requested_mode: Mode::Native,
            ways: vec![Seen {
                from: "laptop".to_owned(),
                to: "server1".to_owned(),
                address: "10.9.0.1".parse().unwrap(),
                sent: 5,
                answered: 5,
                mean_ms: Some(0.5),
                transfers: Vec::new(),
                seen_as: Some(seen_as.parse().unwrap()),
                expected: "10.9.0.2".parse().unwrap(),
            }],
            hashes_equal: true,
            out_of_reach: [("fd20::2 from laptop".to_owned(), 0)].into(),
            paths: [("xsk".to_owned(), 990), ("socket".to_owned(), 10)].into(),
            nat: None,
            left: Vec::new(),
            notes: Vec::new(),
            exit_code: 0,
        }
    }

    #[test]
    fn a_source_that_is_not_the_expected_one_is_a_failure() {
        assert_eq!(report("10.9.0.2").verdict(false), 0);
        let other = report("198.51.100.2");
        assert_eq!(other.verdict(false), 1);
        assert!(other.table().contains("seen as 198.51.100.2 instead of 10.9.0.2"));
    }

    #[test]
    fn what_is_left_silent_or_in_reach_is_a_failure() {
        let mut left = report("10.9.0.2");
        left.left.push("laptop: link laptop".to_owned());
        let mut silent = report("10.9.0.2");
        silent.ways[0].answered = 0;
        let mut reached = report("10.9.0.2");
        reached.out_of_reach.insert("fd20::2 from laptop".to_owned(), 1);
        for report in [left, silent, reached] {
            assert_eq!(report.verdict(false), 1);
        }
    }

    #[test]
    fn another_mode_than_the_requested_one_is_told() {
        let mut by_socket = report("10.9.0.2");
        by_socket.paths.insert("socket".to_owned(), 11);
        assert_eq!(by_socket.verdict(false), OTHER_MODE);
        by_socket.requested_mode = Mode::Auto;
        assert_eq!(by_socket.verdict(false), 0);
        assert_eq!(by_socket.verdict(true), OTHER_MODE);
    }
}
