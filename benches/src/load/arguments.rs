//! The command line of `tidegate-load`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use wg_userspace::key::PublicKey;

use super::packet::Size;

/// Port of the inner datagrams of a flood: "discard", which nobody answers.
pub const INNER_PORT: u16 = 9;
/// Port of `echo` and `latency` where none is given.
pub const ECHO_PORT: u16 = 7117;

/// Puts load on any gateway that speaks the WireGuard protocol, and counts what comes out of it.
///
/// Its peers are synthetic: their private keys are derived from a seed and a number, so that anybody can derive
/// them. They are for benchmarks only; no gateway that matters may have them. It sends only to the addresses
/// and by the interface that it is given.
///
/// Each command but `peers` prints one JSON object to standard output.
#[derive(Debug, Parser)]
#[command(name = "tidegate-load", version)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prints the `[Peer]` sections for the gateway, for `wg setconf` or `wg addconf`.
    Peers(Peers),
    /// A storm of handshake initiations: how many are answered, and how soon.
    Handshakes(Handshakes),
    /// Sends packets that were sealed in advance, each of them once.
    Flood(Flood),
    /// Counts and drops what arrives by an interface: the other end of `flood`.
    Count(Count),
    /// Looks for the highest rate at which nothing is lost, by floods and their counter.
    LossFree(LossFree),
    /// Round trips of datagrams to `echo`, by the times at which they were to be sent.
    Latency(Latency),
    /// Sends every datagram back to who sent it, until it is ended.
    Echo(Echo),
}

/// Which synthetic peers.
#[derive(Args, Clone, Debug)]
pub struct Seed {
    /// What all private keys are derived from.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where the peers' inner addresses are, in order, from the second on.
    #[arg(long, default_value = "10.64.0.0/10")]
    pub network: IpNet,
}

/// Arguments of `peers`.
#[derive(Args, Debug)]
pub struct Peers {
    /// How many.
    #[arg(long)]
    pub count: u32,
    /// Which.
    #[command(flatten)]
    pub seed: Seed,
    /// `wg`: sections of a `wg0.conf`; `keys`: number, private key, public key and address of each.
    #[arg(long, value_enum, default_value_t = Format::Wg)]
    pub format: Format,
}

/// What `peers` prints.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Format {
    /// Sections of a `wg0.conf`.
    Wg,
    /// A line for each, with the private key.
    Keys,
}

/// The gateway.
#[derive(Args, Clone, Debug)]
pub struct Gateway {
    /// Its address and port.
    #[arg(long, value_name = "ADDR:PORT")]
    pub to: SocketAddr,
    /// Its public key.
    #[arg(long, value_name = "BASE64", value_parser = PublicKey::from_base64)]
    pub server_key: PublicKey,
    /// The interface by which it is reached: if another one would be taken, nothing is sent.
    #[arg(long, value_name = "IF")]
    pub nic: Option<String>,
    /// Which peers it has.
    #[command(flatten)]
    pub seed: Seed,
}

/// Arguments of `handshakes`.
#[derive(Args, Debug)]
pub struct Handshakes {
    /// The gateway.
    #[command(flatten)]
    pub gateway: Gateway,
    /// How many peers take part, in turn. A peer sends 40 initiations a second at most: gateways ignore more.
    #[arg(long)]
    pub count: u32,
    /// For how long.
    #[arg(long, value_parser = seconds)]
    pub seconds: f64,
    /// Initiations per second; without, a new one follows each answer.
    #[arg(long)]
    pub rate: Option<f64>,
    /// Initiations that wait for their answer at most, without --rate.
    #[arg(long, default_value_t = 256)]
    pub outstanding: u32,
    /// Addresses of this host that the peers have, in turn; without, the one that the kernel chooses. Under load, a
    /// gateway may answer only 20 initiations a second of one address. `ip route add local PREFIX dev lo` makes a
    /// whole prefix this host's.
    #[arg(long, value_name = "PREFIX")]
    pub from: Option<IpNet>,
    /// UDP ports that the peers share.
    #[arg(long, default_value_t = 16)]
    pub ports: u16,
}

/// Arguments of `flood`.
#[derive(Args, Clone, Debug)]
pub struct Flood {
    /// The gateway.
    #[command(flatten)]
    pub gateway: Gateway,
    /// How many peers send, in turn.
    #[arg(long)]
    pub peers: u32,
    /// Bytes of an inner packet with its IP header, or `imix`: 7 of 64, 4 of 576 and 1 of 1,372 bytes.
    #[arg(long)]
    pub size: Size,
    /// Inner address to which the packets go.
    #[arg(long, value_name = "INNER_ADDR")]
    pub dst: IpAddr,
    /// Inner UDP port to which the packets go; `count` must be given the same.
    #[arg(long, default_value_t = INNER_PORT)]
    pub inner_port: u16,
    /// How they leave.
    #[arg(long, value_enum, default_value_t = By::Sockets)]
    pub by: By,
    /// Packets per second, or `max`.
    #[arg(long)]
    pub pps: Rate,
    /// For how long; with `max` it ends earlier if all packets that were sealed have been sent.
    #[arg(long, value_parser = seconds)]
    pub seconds: f64,
    /// UDP ports that the peers share; without, each has its own, up to 64 ports.
    #[arg(long)]
    pub ports: Option<u16>,
    /// Packets that a peer sends in a row, all of one size: the longest run that crosses the kernel as one (with
    /// sockets), and what a gateway can join. Without: 32 with sockets, 1 with live frames.
    #[arg(long)]
    pub burst: Option<u32>,
    /// Most memory for packets that are sealed in advance, in MiB.
    #[arg(long, default_value_t = 1024)]
    pub memory: usize,
    /// For how long peers without an answer try to shake hands before the flood is given up, in seconds.
    #[arg(long, default_value_t = 60.0, value_parser = seconds)]
    pub patience: f64,
    /// Socket of a `count` that sees the other end: says what was delivered.
    #[arg(long, value_name = "PATH")]
    pub counter: Option<PathBuf>,
    /// Processes whose CPU time is told, with all of their threads.
    #[arg(long = "pid", value_name = "PID")]
    pub pids: Vec<u32>,
    /// CPU to which the sender is pinned.
    #[arg(long)]
    pub cpu: Option<usize>,
}

/// How packets leave.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum By {
    /// UDP sockets, in runs that cross the kernel as one where it can do that.
    Sockets,
    /// Frames that a BPF program in a test run puts on the interface of --nic (`BPF_F_TEST_XDP_LIVE_FRAMES`).
    Live,
    /// An AF_XDP socket on the first queue of the interface of --nic.
    Xsk,
}

impl By {
    /// The word on the command line and in reports.
    pub const fn word(self) -> &'static str {
        match self {
            By::Sockets => "sockets",
            By::Live => "live",
            By::Xsk => "xsk",
        }
    }
}

/// Packets per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// As many as will go.
    Max,
    /// So many.
    PerSecond(f64),
}

impl Rate {
    /// The number, unless it is as many as will go.
    pub const fn number(self) -> Option<f64> {
        match self {
            Rate::Max => None,
            Rate::PerSecond(rate) => Some(rate),
        }
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            return Ok(Rate::Max);
        }
        match text.parse::<f64>() {
            Ok(rate) if (1.0..=1e9).contains(&rate) => Ok(Rate::PerSecond(rate)),
            _ => Err(format!("`{text}` is neither `max` nor a number from 1 to 1,000,000,000")),
        }
    }
}

/// Arguments of `count`.
#[derive(Args, Debug)]
pub struct Count {
    /// The interface by which the packets arrive.
    #[arg(long, value_name = "IF")]
    pub nic: String,
    /// For how long; without, until SIGTERM or SIGINT.
    #[arg(long, value_parser = seconds)]
    pub seconds: Option<f64>,
    /// UDP port of the packets; everything else passes.
    #[arg(long, default_value_t = INNER_PORT)]
    pub inner_port: u16,
    /// Where to make a Unix socket that tells the count to whoever connects. Namespaces of the network do not
    /// matter to it.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// Arguments of `loss-free`.
#[derive(Args, Debug)]
pub struct LossFree {
    /// Each trial is such a flood; --pps is the highest rate that is tried, --seconds the length of a trial.
    #[command(flatten)]
    pub flood: Flood,
    /// The lowest rate that is tried.
    #[arg(long, default_value_t = 1000.0)]
    pub lowest: f64,
    /// Part of the packets that may be lost.
    #[arg(long, default_value_t = 0.0)]
    pub loss: f64,
    /// Trials of a rate, of which more than half must lose nothing.
    #[arg(long, default_value_t = 3)]
    pub trials: u32,
    /// The search ends when the rates that pass and fail differ by less than this part.
    #[arg(long, default_value_t = 0.03)]
    pub resolution: f64,
    /// Trials of the rate that was found, at the end.
    #[arg(long, default_value_t = 5)]
    pub confirm: u32,
}

/// Arguments of `latency`.
#[derive(Args, Debug)]
pub struct Latency {
    /// Address, and port if it is not 7117, of `echo`.
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = echo_address)]
    pub to: SocketAddr,
    /// For how long.
    #[arg(long, value_parser = seconds)]
    pub seconds: f64,
    /// Datagrams per second.
    #[arg(long)]
    pub rate: f64,
    /// Bytes of a datagram's payload.
    #[arg(long, default_value_t = 64)]
    pub len: usize,
    /// The interface by which the address is reached: if another one would be taken, nothing is sent.
    #[arg(long, value_name = "IF")]
    pub nic: Option<String>,
}

/// Arguments of `echo`.
#[derive(Args, Debug)]
pub struct Echo {
    /// Where to listen.
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = echo_address)]
    pub listen: SocketAddr,
    /// For how long; without, until SIGTERM or SIGINT.
    #[arg(long, value_parser = seconds)]
    pub seconds: Option<f64>,
}

/// A time that can be waited for: a day at most.
fn seconds(text: &str) -> Result<f64, String> {
    const DAY: f64 = 86_400.0;
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= DAY => Ok(seconds),
        _ => Err(format!("`{text}` is no number of seconds above 0, up to {DAY}")),
    }
}

fn echo_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, ECHO_PORT)))
        .map_err(|_| format!("`{text}` is no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E=";

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.replace("KEY", KEY).split_whitespace())
    }

    #[test]
    fn the_arguments_do_not_contradict_each_other() {
        <Arguments as clap::CommandFactory>::command().debug_assert();
        for line in [
            "load peers --count 3 --seed 1 --network 10.64.0.0/10",
            "load peers --count 3 --format keys --network fd64::/64",
            "load handshakes --to 198.51.100.1:51820 --server-key KEY --count 9 --seed 1 --seconds 2 --rate 50",
            "load flood --to [2001:db8::1]:1 --server-key KEY --peers 5 --seed 1 --size imix --dst fd00::1 \
             --by live --nic eth1 --pps max --seconds 2.5 --pid 7 --pid 8",
            "load count --nic lan --seconds 1",
            "load loss-free --to 198.51.100.1:51820 --server-key KEY --peers 5 --size 64 --dst 10.0.0.1 \
             --pps max --seconds 1 --counter /run/counter",
            "load latency --to 10.0.0.1 --seconds 1 --rate 100",
            "load echo --listen 10.0.0.1:7",
        ] {
            let parsed = parse(line);
            assert!(parsed.is_ok(), "{line}: {parsed:?}");
        }
    }

    #[test]
    fn nothing_has_a_destination_unless_it_is_given() {
        for line in [
            "load flood --server-key KEY --peers 5 --size 64 --dst 10.0.0.1 --pps 5 --seconds 1",
            "load flood --to 10.0.0.1:5 --server-key KEY --peers 5 --size 64 --pps 5 --seconds 1",
            "load handshakes --server-key KEY --count 9 --seconds 2",
            "load latency --seconds 1 --rate 100",
            "load count --seconds 1",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_time_ends() {
        assert_eq!(seconds("0.5"), Ok(0.5));
        for text in ["", "0", "-1", "nan", "inf", "1e300"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_rate_is_a_number_or_max() {
        assert_eq!("max".parse(), Ok(Rate::Max));
        assert_eq!("2.5e5".parse(), Ok(Rate::PerSecond(250_000.0)));
        for text in ["", "0", "-5", "nan", "inf", "2e9", "much"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }
}
