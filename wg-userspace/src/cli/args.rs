//! The arguments and the environment.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::builder::{EnumValueParser, FalseyValueParser, TypedValueParser};
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use wg_common::map::HEARTBEATS_LEN;

use super::{init::Shape, name::InterfaceName, peer, trace};
use crate::{
    config::Directives,
    daemon::{AeadChoice, DEVICE_COUNT_MAX, Mode},
};

/// The numbers of [`Code`](super::Code), for people.
pub const EXIT_CODES: &str = "Exit codes: 0 ok · 1 it failed while it ran · 2 wrong usage · \
    3 error in a config file · 4 missing privilege · 5 not found, or there already · \
    6 works, but not as well as was asked for · 7 the packet would be dropped (trace)";

/// A gateway that speaks the WireGuard protocol, with an AF_XDP data path.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Tidegate {
    #[command(subcommand)]
    command: Command,
}

/// The same as `tidegate run`, for tools that start an implementation with the name of an
/// interface and nothing else, as wg-quick does.
#[derive(Debug, Parser)]
#[command(name = "tidegated", version, arg_required_else_help = true)]
struct Tidegated {
    #[command(flatten)]
    run: Run,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon of one or several interfaces; wg(8) configures them (same as `tidegated`)
    Run(Run),
    /// What a keeper starts: the process with the keys and the packets.
    #[command(hide = true)]
    Data(Data),
    /// Bring an interface up as its config file says, like `wg-quick up`
    Up(Up),
    /// Take an interface down
    Down {
        /// Name of an interface, or its config file
        #[arg(value_name = "NAME|FILE")]
        what: String,
    },
    /// Make an interface that is up what its config file says now; peers that are the same notice
    /// nothing
    Reload(Reload),
    /// Write into a config file what changed while its interface was up
    Save {
        /// Name of an interface, or its config file
        #[arg(value_name = "NAME|FILE")]
        what: String,
    },
    /// Print a config file without what wg(8) does not know, for `wg setconf`
    Strip {
        /// Name of an interface, or its config file
        #[arg(value_name = "NAME|FILE")]
        what: String,
    },
    /// Look for everything that is wrong with config files, alone and as ends of the same tunnels
    Check(Check),
    /// Add, remove and list the peers of a config file
    #[command(subcommand)]
    Peer(peer::args::Peer),
    /// Show interfaces, their peers and what is wrong with them, and the data path in use
    #[command(visible_alias = "status")]
    Show(Show),
    /// Say step by step what would become of a packet: peer, worker, route, NAT, rule, way out; nothing is sent
    Trace(Trace),
    /// End all keys of an interface and make none until it is resumed: for a snapshot of this machine
    Quiesce(Quiesce),
    /// Write commented config files for all ends of a new tunnel, with new keys
    #[command(subcommand)]
    Init(Shape),
    /// Print a new private key
    Genkey,
    /// Print a new preshared key
    Genpsk,
    /// Read a private key from standard input and print its public key
    Pubkey,
    /// Print what a shell completes
    #[command(hide = true)]
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Write the pages of the manual
    #[command(hide = true)]
    Man {
        /// Where they go
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

/// Arguments of `run`.
#[derive(Args, Debug)]
pub struct Run {
    /// Names of the interfaces to make; one process serves all of them
    #[arg(value_name = "IF", required = true, num_args = 1..=DEVICE_COUNT_MAX)]
    pub interfaces: Vec<InterfaceName>,
    /// Stay in the foreground and log to standard error (also with WG_PROCESS_FOREGROUND=1)
    #[arg(short, long)]
    pub foreground: bool,
    /// We are the process that another `run` or `up` started in the background.
    #[arg(long, hide = true)]
    pub background_child: bool,
    /// A NIC by whose XSKs nothing is to be sent, and why: `eth0=a rule`.
    #[arg(long, hide = true, value_parser = nic_and_reason)]
    pub by_socket: Vec<(String, String)>,
    #[command(flatten)]
    pub data_path: DataPathArgs,
    /// What to log: error, warn, info, debug, trace, off, or directives such as `info,wg_userspace::bpf=trace`
    #[arg(long, value_name = "FILTER", env = "LOG_LEVEL", value_parser = log_filter)]
    pub log: Option<String>,
}

/// Arguments of `data`. All that matters comes from the keeper.
#[derive(Args, Debug)]
pub struct Data {
    /// Names of the interfaces, for those who look at the list of processes
    #[arg(value_name = "IF")]
    pub interfaces: Vec<InterfaceName>,
    /// Process with which this one ends
    #[arg(long, value_name = "PID")]
    pub keeper: u32,
    /// Let go of standard error when wg(8) is answered
    #[arg(long)]
    pub in_background: bool,
    /// Log lines with their time
    #[arg(long)]
    pub with_time: bool,
    /// What to log
    #[arg(long, value_name = "FILTER", value_parser = log_filter)]
    pub log: String,
}

/// Arguments of every command that starts a daemon: its data path, and where its peers come from.
#[derive(Args, Clone, Debug, Default, Eq, PartialEq)]
pub struct DataPathArgs {
    /// NICs on which XDP hands WireGuard datagrams to AF_XDP sockets
    #[arg(long, value_name = "IF,..", env = "TIDEGATE_XDP", value_parser = parse_nics)]
    xdp: Option<Nics>,
    /// How datagrams come in on those NICs: by XDP, by ordinary sockets, or by what works best
    #[arg(long, value_enum, env = "TIDEGATE_MODE")]
    pub mode: Option<Mode>,
    /// Have threads ask those NICs for packets themselves while there is work, and the NICs interrupt less
    /// often; a thread that has none sleeps all the same
    #[arg(long, env = "TIDEGATE_BUSY_POLL", value_parser = FalseyValueParser::new())]
    pub busy_poll: bool,
    /// What seals and opens packets; it changes nothing but speed
    #[arg(long, env = "TIDEGATE_AEAD", default_value = "auto", value_parser = aead_choice())]
    pub aead: AeadChoice,
    /// Number of workers, each with a CPU of its own [default: one for each CPU]
    #[arg(long, value_name = "N", env = "TIDEGATE_WORKERS",
          value_parser = clap::value_parser!(u16).range(1..=i64::from(HEARTBEATS_LEN)))]
    pub workers: Option<u16>,
    /// Service that knows peers which are not configured, asked when they knock: HTTP over a Unix
    /// socket
    #[arg(long, value_name = "unix:PATH", env = "TIDEGATE_PEER_SOURCE", value_parser = peer_source)]
    pub peer_source: Option<PathBuf>,
}

/// Reads `--by-socket`.
fn nic_and_reason(text: &str) -> Result<(String, String), String> {
    let (nic, reason) = text.split_once('=').ok_or("write `NIC=REASON`")?;
    Ok((nic.to_owned(), reason.to_owned()))
}

/// Reads `--aead`, and refuses what this CPU has not before anything is begun.
fn aead_choice() -> impl TypedValueParser<Value = AeadChoice> {
    EnumValueParser::<AeadChoice>::new().try_map(|choice| choice.check().map(|()| choice))
}

impl DataPathArgs {
    /// The NICs that were named; nothing if the question was left open.
    pub fn xdp(&self) -> Option<&[String]> {
        self.xdp.as_ref().map(|nics| nics.0.as_slice())
    }

    /// Takes from the file what neither the command line nor the environment says.
    pub fn fill_from(&mut self, file: &Directives) {
        self.xdp = self.xdp.take().or_else(|| file.nics().map(Nics));
        self.mode = self.mode.or_else(|| file.mode());
        self.busy_poll |= file.busy_poll();
        let of_file = file.workers.as_ref().map(|workers| workers.value);
        self.workers = self.workers.or(of_file.and_then(|count| count.try_into().ok()));
    }
}

/// Arguments of `up`.
#[derive(Args, Debug)]
pub struct Up {
    /// Name of an interface (its file is /etc/wireguard/NAME.conf), or a config file NAME.conf
    #[arg(value_name = "NAME|FILE")]
    pub what: String,
    /// Print what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Stay until the interface is taken down, and take it down at the end (for service managers)
    #[arg(short, long, conflicts_with = "dry_run")]
    pub foreground: bool,
    /// Use XDP and NAT although rules of the firewall concern what they take past it: these have no effect on
    /// that then
    #[arg(long)]
    pub bypass_firewall: bool,
    #[command(flatten)]
    pub data_path: DataPathArgs,
}

/// Arguments of `reload`.
#[derive(Args, Debug)]
pub struct Reload {
    /// Name of an interface (its file is /etc/wireguard/NAME.conf), or a config file NAME.conf
    #[arg(value_name = "NAME|FILE")]
    pub what: String,
    /// Print what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `check`.
#[derive(Args, Debug)]
pub struct Check {
    /// Config files, or names of interfaces (of files /etc/wireguard/NAME.conf); several are also
    /// compared with each other, as ends of the same tunnels
    #[arg(value_name = "FILE|NAME", required = true)]
    pub files: Vec<String>,
    /// End with exit code 6 if there are warnings
    #[arg(long)]
    pub strict: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Show notes even if there is nothing else
    #[arg(short, long)]
    pub verbose: bool,
    /// Look at the files only, and not at what this host says of them: names, ports, rights, routes
    #[arg(long)]
    pub offline: bool,
}

/// Arguments of `show`.
#[derive(Args, Debug)]
pub struct Show {
    /// Names of interfaces; `all` (the default) for all of them, `interfaces` for their names only; behind one
    /// name, `nat` for its flows, ports and rules
    #[arg(value_name = "IF")]
    pub interfaces: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `trace`.
#[derive(Args, Debug)]
pub struct Trace {
    /// Name of the interface
    #[arg(value_name = "IF")]
    pub interface: InterfaceName,
    /// From whom: an address, with a port if it matters, such as 10.9.0.2, 10.9.0.2:40000, [fd09::2]:40000. If
    /// it does not matter, the latest flow says which one
    #[arg(value_name = "SRC[:PORT]", value_parser = trace::source)]
    pub source: trace::Source,
    /// To whom: an address, and what is sent there, such as 192.0.2.1:443/tcp, [2001:db8::1]:53/udp,
    /// 192.0.2.1/icmp. With the address alone it is the latest flow, or else an echo request
    #[arg(value_name = "DST[:PORT/PROTO]", value_parser = trace::destination)]
    pub destination: trace::Destination,
    /// By which interface it comes in: IF itself if it comes out of the tunnel [default: the one by which
    /// this host reaches SRC]
    #[arg(long, value_name = "LINK")]
    pub by: Option<String>,
    /// Bytes of the packet, its IP header included [default: no data]
    #[arg(long, value_name = "BYTES")]
    pub len: Option<u16>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `quiesce`.
#[derive(Args, Debug)]
pub struct Quiesce {
    /// Name of the interface
    #[arg(value_name = "IF")]
    pub interface: InterfaceName,
    /// Go on: there may be keys and handshakes again
    #[arg(long, conflicts_with = "seconds")]
    pub resume: bool,
    /// Go on by itself after so many seconds
    #[arg(long = "for", value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: Option<u32>,
}

/// Both programs: `tidegate` and `tidegated`.
pub fn definitions() -> [clap::Command; 2] {
    [Tidegate::command(), Tidegated::command()]
}

/// Reads the arguments; their first is the name that this program was called by.
///
/// # Errors
/// When they make no sense, or ask for help or the version only.
pub fn parse(arguments: Vec<OsString>) -> Result<Command, clap::Error> {
    let called_as = arguments.first().map(Path::new).and_then(Path::file_name);
    if called_as.is_some_and(|name| name == "tidegated") {
        let run = Tidegated::try_parse_from(arguments)?.run;
        // Else `tidegated up wg0` would make two interfaces.
        if run.interfaces.len() > 1 {
            let line = "tidegated runs one interface; `tidegate run` runs several";
            return Err(Tidegated::command().error(clap::error::ErrorKind::TooManyValues, line));
        }
        Ok(Command::Run(run))
    } else {
        Ok(Tidegate::try_parse_from(arguments)?.command)
    }
}

/// Names with commas between them. A variable that is set but empty names none.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Nics(Vec<String>);

fn parse_nics(text: &str) -> Result<Nics, String> {
    let mut nics = Vec::new();
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        // A NIC's name may have characters that wg-quick does not allow for a device's.
        if name.len() > InterfaceName::LEN_MAX || name.contains(['/', ':', ' ']) {
            return Err(format!(
                "`{name}` cannot be the name of a network interface; `ip link` lists them"
            ));
        }
        if !nics.iter().any(|known| known == name) {
            nics.push(name.to_owned());
        }
    }
    Ok(Nics(nics))
}

/// The path in `unix:PATH`. The daemon leaves the working directory, so that the path is absolute.
fn peer_source(text: &str) -> Result<PathBuf, String> {
    /// Longest path of a Unix socket (`sun_path`), without the zero at its end.
    const LEN_MAX: usize = 107;
    let path = text
        .strip_prefix("unix:")
        .ok_or("a source of peers is `unix:` and a path; write it like unix:/run/peers.sock")?;
    if !path.starts_with('/') {
        return Err(format!(
            "the path `{path}` does not begin with `/`; write it like unix:/run/peers.sock"
        ));
    }
    if path.len() > LEN_MAX {
        return Err(format!(
            "the path of a Unix socket has at most {LEN_MAX} bytes, this has {}; take a shorter one",
            path.len()
        ));
    }
    Ok(PathBuf::from(path))
}

/// Checks a filter and turns the words of other WireGuard tools (`verbose`, `silent`) into ours.
fn log_filter(text: &str) -> Result<String, String> {
    use tracing_subscriber::filter::LevelFilter;
    let mut directives = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let directive = match part.to_ascii_lowercase().as_str() {
            "verbose" => "debug",
            "silent" => "off",
            "warning" => "warn",
            level if LevelFilter::from_str(level).is_ok() => part,
            _ if part.contains('=') => part,
            _ => {
                return Err(format!(
                    "`{part}` is neither a level nor TARGET=LEVEL; levels are error, warn, info, debug, trace, \
                     off"
                ));
            }
        };
        directives.push(directive);
    }
    let filter = directives.join(",");
    tracing_subscriber::EnvFilter::builder().parse(&filter).map_err(|error| error.to_string())?;
    Ok(filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Command, clap::Error> {
        parse(line.split_whitespace().map(OsString::from).collect())
    }

    fn run(line: &str) -> Run {
        match read(line) {
            Ok(Command::Run(run)) => run,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Tidegate::command().debug_assert();
        Tidegated::command().debug_assert();
    }

    #[test]
    fn called_as_tidegated_it_runs() {
        for line in ["tidegated wg0", "/usr/bin/tidegated -f wg0", "tidegate run wg0 -f"] {
            let run = run(line);
            assert_eq!(run.interfaces, ["wg0".parse().unwrap()], "{line}");
            assert_eq!(run.foreground, line.contains("-f"), "{line}");
        }
        assert!(read("tidegated up wg0").is_err());
        assert!(read("tidegate wg0").is_err());
    }

    #[test]
    fn the_data_path_is_chosen() {
        let run = run("tidegate run --xdp eth0,eth1,eth0 --mode native --workers 4 wg0");
        assert_eq!(run.data_path.xdp().unwrap(), ["eth0", "eth1"]);
        assert_eq!(run.data_path.mode, Some(Mode::Native));
        assert!(!run.data_path.busy_poll);
        assert_eq!(run.data_path.workers, Some(4));
    }

    #[test]
    fn one_process_may_serve_several_interfaces() {
        let names = |line: &str| {
            let names = run(line).interfaces;
            names.iter().map(|name| name.as_str().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names("tidegate run wg0 -f wg1"), ["wg0", "wg1"]);
        assert_eq!(names("tidegate run --mode udp -- wg0 -x wg2"), ["wg0", "-x", "wg2"]);
        assert!(read("tidegated wg0 wg1").is_err());
        let many = |count: usize| {
            let names: Vec<_> = (0..count).map(|number| format!("wg{number}")).collect();
            format!("tidegate run {}", names.join(" "))
        };
        assert_eq!(names(&many(DEVICE_COUNT_MAX)).len(), DEVICE_COUNT_MAX);
        assert!(read(&many(DEVICE_COUNT_MAX + 1)).is_err());
    }

    #[test]
    fn the_file_says_what_nobody_else_does() {
        let text = "[Interface]\n#! Xdp = eth9 mode=udp busy-poll\n#! Workers = 7\n";
        let (file, problems) = crate::config::directives("wg0.conf", text);
        assert!(problems.is_empty());
        for (line, nics, mode, workers) in [
            ("", &["eth9"][..], Mode::Udp, 7),
            ("--workers 2", &["eth9"], Mode::Udp, 2),
            ("--mode native", &["eth9"], Mode::Native, 7),
            ("--xdp eth0", &["eth0"], Mode::Udp, 7),
            ("--xdp=", &[], Mode::Udp, 7),
        ] {
            let mut data_path = run(&format!("tidegate run wg0 {line}")).data_path;
            data_path.fill_from(&file);
            assert_eq!(data_path.xdp().unwrap(), nics, "{line}");
            assert_eq!((data_path.mode, data_path.workers), (Some(mode), Some(workers)), "{line}");
            assert!(data_path.busy_poll, "{line}");
        }
    }

    #[test]
    fn nothing_said_is_nothing_chosen() {
        assert_eq!(run("tidegate run wg0").data_path, DataPathArgs::default());
        assert_eq!(parse_nics("").unwrap(), Nics(Vec::new()));
    }

    #[test]
    fn nonsense_is_wrong_usage() {
        for line in [
            "tidegate",
            "tidegate run",
            "tidegate run wg0 a/b",
            "tidegate run this-name-is-too-long",
            "tidegate run a/b",
            "tidegate run wg0 --workers 0",
            "tidegate run wg0 --workers 257",
            "tidegate run wg0 --mode generic",
            "tidegate run wg0 --xdp this-name-is-too-long",
            "tidegate run wg0 --log loud",
            "tidegate run wg0 --peer-source /run/peers.sock",
            "tidegate run wg0 --peer-source unix:peers.sock",
            "tidegate run wg0 --peer-source unix:",
            "tidegate run wg0 --peer-source http://localhost/",
            "tidegate up wg0 --peer-source unix:run/x",
            "tidegate up",
            "tidegate down",
            "tidegate reload",
            "tidegate reload wg0 --force",
            "tidegate save",
            "tidegate strip wg0 wg1",
            "tidegate check",
            "tidegate check --strict",
            "tidegate pubkey key",
            "tidegate peer",
            "tidegate peer add wg0",
            "tidegate peer add wg0 laptop --qr --out x",
            "tidegate peer add wg0 laptop --route-all --routes 10.0.0.0/8",
            "tidegate peer add wg0 laptop --public-key short",
            "tidegate peer add wg0 laptop --endpoint http://x",
            "tidegate peer add wg0 laptop --allowed-ips 10.9.0.300",
            "tidegate peer add wg0 no#1",
            "tidegate peer remove wg0",
            "tidegate peer list",
            "tidegate trace",
            "tidegate trace wg0 10.9.0.2",
            "tidegate trace a/b 10.9.0.2 192.0.2.1",
            "tidegate trace wg0 10.9.0.2 192.0.2.1:443",
            "tidegate trace wg0 10.9.0.2 192.0.2.1 --len 70000",
            "tidegate quiesce",
            "tidegate quiesce a/b",
            "tidegate quiesce wg0 wg1",
            "tidegate quiesce wg0 --for 0",
            "tidegate quiesce wg0 --for 5 --resume",
        ] {
            let error = read(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn a_source_of_peers_is_a_unix_socket() {
        let run = run("tidegate run wg0 --peer-source unix:/run/peers.sock");
        assert_eq!(run.data_path.peer_source, Some("/run/peers.sock".into()));
        let error = read("tidegate run wg0 --peer-source tcp:1").unwrap_err().to_string();
        assert!(
            error.contains(
                "a source of peers is `unix:` and a path; write it like unix:/run/peers.sock"
            ),
            "{error}"
        );
        assert!(peer_source(&format!("unix:/{}", "x".repeat(106))).is_ok());
        assert!(peer_source(&format!("unix:/{}", "x".repeat(107))).is_err());
    }

    #[test]
    fn log_words_of_other_tools_are_known() {
        assert_eq!(log_filter("verbose").unwrap(), "debug");
        assert_eq!(log_filter("silent").unwrap(), "off");
        assert_eq!(log_filter("INFO").unwrap(), "INFO");
        assert_eq!(
            log_filter("warn,wg_userspace::bpf=trace").unwrap(),
            "warn,wg_userspace::bpf=trace"
        );
        assert!(log_filter("wg_userspace=loud").is_err());
    }
}
